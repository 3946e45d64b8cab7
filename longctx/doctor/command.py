"""`longctx doctor`: what this machine has, and what that allows; and how fast it is."""

import json
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch

import longctx
from longctx.config import apply_overrides
from longctx.doctor import machine, services, storage, versions
from longctx.doctor.cluster_file import MEASURED, as_written, cluster_of, merged, write_cluster
from longctx.doctor.config_checks import checkpoint_bytes, config_fits
from longctx.doctor.crew import GROUP, Crew, examine
from longctx.doctor.crew_step import seconds_of_a_call
from longctx.doctor.findings import Check, Finding, as_record, as_text, exit_code, run_checks
from longctx.doctor.measure import Bench, bench_of, product_rate
from longctx.errors import InputError, OutsideError
from longctx.parallel.links import Peers, as_line
from longctx.parallel.mesh import is_first_here, local_rank, processes_here, world_size
from longctx.train.settings import Settings, load_settings

COMMAND = "longctx doctor"
FLAGS = ("--json", "--measure")
DEFAULT = "tiny"


@dataclass(frozen=True)
class DoctorConfig:
    """Options of `longctx doctor`."""

    output: str = "cluster.toml"
    """File that --measure writes, for `longctx plan --cluster FILE`."""
    timeout_seconds: int = 60
    """How long processes wait to meet, and for a message."""

    def __post_init__(self) -> None:
        if self.timeout_seconds < 1:
            raise InputError(f"--timeout_seconds = {self.timeout_seconds}: must be at least 1")
        if not Path(self.output).name or Path(self.output).is_dir():
            raise InputError(f"--output {self.output}: is a folder; name a file")
        if not Path(self.output).parent.is_dir():
            raise InputError(f"--output {self.output}: its folder is not there; make it first")


def run(argv: Sequence[str]) -> int:
    """Prints what there is; 1 if something keeps a run from working. `argv` may begin with a config
    and hold --json and --measure."""
    words = [word for word in argv if word not in FLAGS]
    name = words.pop(0) if words and not words[0].startswith("-") else ""
    config = apply_overrides(DoctorConfig(), words, COMMAND)
    settings = load_settings(name or DEFAULT)
    checks = local_checks(settings, name)
    measured = name if "--measure" in argv else None
    speaks, findings = is_first_here(), []
    try:
        # Before checks, which may take longer on one host than others wait to meet.
        peers = Peers(device_here(), config.timeout_seconds) if world_size() > 1 else None
        findings = run_checks(checks) if is_first_here() else []
        speaks, findings = _examine(config, settings, peers, findings, measured)
    except OutsideError as error:
        findings = findings or (run_checks(checks) if is_first_here() else [])
        findings = [*findings, Finding("problem", "processes", f"failed: {error}", GROUP)]
    if speaks:
        show(findings, "--json" in argv)
    return exit_code(findings)


def _examine(
    config: DoctorConfig,
    settings: Settings,
    peers: Peers | None,
    local: list[Finding],
    measured: str | None,
) -> tuple[bool, list[Finding]]:
    """Whether this process speaks for all, and what all of them find; measures what stands for the
    config of that name, "" being none."""
    device = device_here()
    bench = None if measured is None else bench_of(device, settings, own=bool(measured))
    if peers is None:
        return True, [*local, *(_measured(bench, config.output) if bench else ())]
    crew = examine(peers, local, settings.run.path, partial(product_rate, device))
    findings = crew.findings
    if bench and exit_code(findings):
        findings.append(Finding("problem", "nothing was measured", "mend what is above", MEASURED))
    elif bench:
        findings += _measured_by_all(bench, peers, crew, config)
    peers.close()
    return peers.rank == 0, findings


def _measured_by_all(bench: Bench, peers: Peers, crew: Crew, config: DoctorConfig) -> list[Finding]:
    """Measures all processes at once; the first of them writes the file."""
    machines, errors = peers.together(bench.measure)
    calls: list[float] = []
    if not errors:
        cluster = cluster_of(merged(machines), crew, bench)
        wanted = bench, cluster, peers.size, config.timeout_seconds
        calls, errors = peers.together(lambda: seconds_of_a_call(*wanted))
    if errors:
        return [Finding("problem", "measuring", f"failed: {errors[0]}", MEASURED)]
    if peers.rank > 0:
        return []
    return [write_cluster(replace(cluster, call_seconds=as_written(median(calls))), config.output)]


def _measured(bench: Bench, output: str) -> list[Finding]:
    """Measures one process alone."""
    try:
        machine_here = bench.measure()
    except Exception as error:
        return [Finding("problem", "measuring", f"failed: {as_line(error)}", MEASURED)]
    return [write_cluster(cluster_of(machine_here, None, bench), output)]


def device_here() -> torch.device:
    """The GPU of this process, the CPU if there are too few."""
    # The driver may count devices that torch cannot use.
    if torch.cuda.is_available() and processes_here() <= torch.cuda.device_count():
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def local_checks(settings: Settings, name: str) -> dict[str, list[Check]]:
    """Checks of one host by group; those of a config only if one is named."""
    folder, kept = settings.run.path, settings.checkpoints
    size = checkpoint_bytes(settings)
    groups: dict[str, list[Check]] = {
        "versions": [
            versions.required_versions,
            versions.cuda_versions,
            versions.known_bad_versions,
            versions.optional_packages,
        ],
        "machine": [
            partial(machine.devices, processes_here()),
            machine.compiler,
            machine.cores_and_memory,
            machine.limits,
            machine.network,
        ],
        "storage": [
            partial(storage.kind_of_storage, folder),
            partial(storage.what_files_can, folder),
            partial(storage.space_and_speed, kept, name or DEFAULT, size),
        ],
        "services": [services.slurm, partial(services.wandb, settings.log.wandb)],
    }
    if name:
        groups["config"] = [partial(config_fits, settings, name, world_size())]
    return groups


def show(findings: Sequence[Finding], as_json: bool) -> None:
    """Writes the report."""
    host = socket.gethostname()
    if as_json:
        record = {"longctx": longctx.__version__, "host": host} | as_record(findings)
        sys.stdout.write(json.dumps(record, indent=2) + "\n")
    else:
        sys.stdout.write(as_text(findings, f"longctx {longctx.__version__} on {host}"))
