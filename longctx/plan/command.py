"""`longctx plan`: what a run will take, and the fastest way to run it."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from longctx.config import apply_overrides
from longctx.data.config import DataConfig
from longctx.errors import InputError, OutsideError
from longctx.plan.automatic import size_of_vocabulary
from longctx.plan.clusters import GIB, ClusterConfig, load_cluster
from longctx.plan.prediction import predict
from longctx.plan.record import as_record
from longctx.plan.show import as_text
from longctx.plan.what_if import what_if
from longctx.train.settings import load_settings

COMMAND = "longctx plan"
LIKE = {"H200": "8xh200", "H100": "8xh100", "A100": "dgx-a100"}
"""Packaged clusters by a part of the names of their devices."""
LIKE_MEMORY = 0.1
"""How far theirs may be from what the file says."""
PICTURES = ".png", ".svg", ".pdf"


@dataclass(frozen=True)
class PlanConfig:
    """Options of `longctx plan`; beside them stand fields of the config, as --table.key value."""

    cluster: str = ""
    """Name of a cluster in configs/clusters, or the path of such a file; empty takes one that is
    like this machine."""
    processes: int = 0
    """Processes of the run, one a device; 0 fills one node."""
    vocab_size: int = 0
    """Tokens of the vocabulary; 0 asks the tokenizer of [data]."""
    tokens: int = 0
    """Tokens to train on, for the cost; 0 takes those of train.steps."""
    search: bool = True
    """Whether other ways to run are tried."""
    what_if: bool = False
    """Whether a step is simulated, with other transports and with delays."""
    picture: str = ""
    """File that gets a picture, such as plan.png."""

    def __post_init__(self) -> None:
        for name in ("processes", "vocab_size", "tokens"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name} = {getattr(self, name)}: must not be negative")
        if self.picture and Path(self.picture).suffix not in PICTURES:
            raise InputError(f"--picture {self.picture}: must end in {' or '.join(PICTURES)}")


def run(argv: Sequence[str]) -> int:
    """Prints the plan of CONFIG; `argv` may hold --json and fields of the config as well.

    1 if it does not fit as it is, or, where it leaves the split open, in no way that was tried.
    """
    if "--help" in argv or "-h" in argv:
        apply_overrides(PlanConfig(), ["--help"], COMMAND)
    if not argv or argv[0].startswith("-"):
        raise InputError(f"{COMMAND} needs a config file or preset; try: {COMMAND} --help")
    own, fields = _split([word for word in argv[1:] if word != "--json"])
    options = apply_overrides(PlanConfig(), own, COMMAND)
    settings = apply_overrides(load_settings(argv[0]), fields, "longctx train")
    cluster = load_cluster(options.cluster or _cluster_here())
    processes = _processes(options, cluster)
    vocab_size = options.vocab_size or vocabulary_of(settings.data)
    run_of = settings, cluster, processes, vocab_size
    plan = predict(*run_of, options.tokens, options.search)
    shown = plan.best or plan.asked
    if options.what_if and shown:
        plan = replace(plan, what_if=what_if(shown.work, cluster))
    if options.picture:
        from longctx.plan.picture import draw

        draw(plan, options.picture)
    sys.stdout.write(json.dumps(as_record(plan), indent=2) if "--json" in argv else as_text(plan))
    sys.stdout.write("\n")
    if plan.advice:
        raise OutsideError(f"{argv[0]} does not fit: {'; '.join(plan.advice)}")
    return 0


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options of the plan, and those that name fields of the config; values follow theirs."""
    own: list[str] = []
    fields: list[str] = []
    group = own
    for word in words:
        if word.startswith("--"):
            group = fields if "." in word.partition("=")[0] else own
        group.append(word)
    return own, fields


def _cluster_here() -> str:
    if not torch.cuda.is_available():
        return "localhost"
    name = torch.cuda.get_device_name()
    found = next((cluster for part, cluster in LIKE.items() if part in name), "")
    if found == "8xh200" and torch.cuda.device_count() == 1:
        found = "h200"
    # An A100 may have half of that memory, a GH200 be no H200, and a part of a device less of all.
    gib = torch.cuda.get_device_properties(0).total_memory / GIB
    if not found or abs(gib / load_cluster(found).memory_gib - 1) > LIKE_MEMORY:
        raise InputError(
            f"--cluster is not given, and none is known with devices like {name} of {gib:.0f} GiB; "
            "longctx doctor --measure writes one for this machine"
        )
    return found


def _processes(options: PlanConfig, cluster: ClusterConfig) -> int:
    """Of the run, which fill nodes of the cluster."""
    node, most = cluster.processes_per_node, cluster.most_processes
    processes = options.processes or node
    if processes > most:
        raise InputError(
            f"--processes = {processes}: cluster {cluster.name!r} has {most}, in "
            f"{cluster.most_nodes} nodes of {node}"
        )
    if processes > node and processes % node:
        near = processes - processes % node
        raise InputError(
            f"--processes = {processes}: fill whole nodes of {node}, with {near} or "
            f"{min(most, near + node)}"
        )
    return processes


def vocabulary_of(data: DataConfig) -> int:
    """Of the tokenizer of the first source; InputError if it is not on this machine."""
    try:
        return size_of_vocabulary(data)
    except InputError as error:
        raise InputError(f"{error}; or give --vocab_size, for a plan without the data") from None
