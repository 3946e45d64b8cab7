"""All that `longctx plan` tells, before it is laid out."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from longctx.errors import InputError
from longctx.parallel import Split
from longctx.plan.automatic import settle_within
from longctx.plan.choices import changed, divisors, savings
from longctx.plan.clusters import ClusterConfig
from longctx.plan.flops import flops_of
from longctx.plan.longest import longest
from longctx.plan.memory import Memory
from longctx.plan.reasons import Runner, advice, runners_up
from longctx.plan.search import Candidate, Search, largest_memory, room_of
from longctx.plan.sizes import Parameters, parameters_of
from longctx.plan.what_if import WhatIf
from longctx.plan.workload import Workload, workload
from longctx.sequence.sharded import Transports
from longctx.train.settings import Settings

FRUGAL = 3
"""Ways that are tried for the longest sequence."""


class Longest(NamedTuple):
    """The longest sequence that fits under some condition."""

    where: str
    tokens: int
    work: Workload | None
    """How; None if nothing fits."""


@dataclass(frozen=True)
class Prediction:
    """Of a config on so many processes of a cluster."""

    settings: Settings
    cluster: ClusterConfig
    processes: int
    vocab_size: int
    precision: str
    tokens: int
    """To train on."""
    parameters: Parameters
    flops: dict[str, float]
    """Forward, a token, by kind."""
    asked: Candidate | None
    """The config as it is; None if these processes cannot share it like that."""
    refusal: str
    """Why not."""
    candidates: Sequence[Candidate]
    """All that was tried, the best first."""
    refused: Counter[str]
    """How many ways were illegal, by what refused them."""
    policies: dict[str, Memory]
    """What the best way, or else the config as it is, takes if all layers keep so much."""
    left_out: Sequence[int]
    """Numbers of replicas of which train.batch_size is no multiple."""
    longest: Sequence[Longest]
    runners: Sequence[Runner]
    """The most telling of the ways that are not the best."""
    advice: Sequence[str]
    """What to change if the config does not fit as it is, or if nothing does."""
    seconds: float
    """That it took to find out."""
    what_if: Sequence[WhatIf] = ()
    """Simulated steps of the best way, or else of the config as it is."""

    @property
    def best(self) -> Candidate | None:
        """The fastest way that fits; None if none was found."""
        found = next(iter(self.candidates), None)
        return found if found and found.fits else None


def predict(
    settings: Settings,
    cluster: ClusterConfig,
    processes: int,
    vocab_size: int,
    tokens: int,
    searches: bool,
) -> Prediction:
    """Plans a run; InputError if it names a split that is illegal."""
    started = time.perf_counter()
    precision = settings.train.precision
    if precision == "auto":
        precision = "bf16" if cluster.device == "cuda" else "fp32"
    cluster.peak(precision)
    search = Search(settings, cluster, processes, vocab_size, precision)
    asked, reason = _asked(search, searches)
    candidates = search.run() if searches else []
    if not asked and not candidates:
        raise InputError(reason)
    shown = asked or candidates[0]
    return Prediction(
        settings=settings,
        cluster=cluster,
        processes=processes,
        vocab_size=vocab_size,
        precision=precision,
        tokens=tokens or settings.train.steps * _tokens_per_step(settings),
        parameters=parameters_of(settings.model, vocab_size),
        flops=_flops_per_token(settings, vocab_size, precision),
        asked=asked,
        refusal=reason,
        candidates=candidates,
        refused=search.refused,
        policies=_policies(candidates[0] if candidates else shown),
        left_out=_left_out(settings, processes) if searches else (),
        longest=_longest(asked, candidates),
        runners=runners_up(candidates) if candidates else (),
        advice=() if shown.fits else advice(shown, candidates),
        seconds=time.perf_counter() - started,
    )


def _tokens_per_step(settings: Settings) -> int:
    return settings.train.batch_size * settings.train.seq_len


def _asked(search: Search, searches: bool) -> tuple[Candidate | None, str]:
    """The config as it is; or, if it leaves the split open and a search will settle it, why it
    cannot run."""
    settings, own = search.settings, search.settings.parallel
    sizes = search.processes, search.vocab_size, search.precision
    try:
        settings = settle_within(settings, *sizes, room_of(search.cluster))
        work = workload(settings, *sizes)
    except InputError as error:
        if not searches or (own.dp, own.sp, own.tp) != (0, 1, 1):
            raise
        return None, str(error)
    return Candidate(work, search.cluster, {}), ""


def _flops_per_token(settings: Settings, vocab_size: int, precision: str) -> dict[str, float]:
    alone = Split(1, 1, "contiguous", Transports())
    whole = changed(settings, {"train.micro_batch": 0})
    flops = flops_of(Workload(whole, alone, vocab_size, precision), 0)
    return {kind: number / _tokens_per_step(settings) for kind, number in flops.items()}


def _policies(candidate: Candidate) -> dict[str, Memory]:
    on_gpu, found = candidate.cluster.device == "cuda", {}
    for checkpointing in ("none", "keep", "full"):
        for where in ("device", "cpu") if on_gpu and checkpointing != "none" else ("device",):
            changes = {
                "memory.checkpointing": checkpointing,
                "memory.activations": where,
                "memory.layers": {},
            }
            work = replace(candidate.work, settings=changed(candidate.work.settings, changes))
            name = checkpointing + ", cpu" * (where == "cpu")
            found[name] = largest_memory(work, on_gpu)
    return found


def _left_out(settings: Settings, processes: int) -> list[int]:
    return [dp for dp in divisors(processes) if settings.train.batch_size % dp]


def _longest(asked: Candidate | None, candidates: Sequence[Candidate]) -> list[Longest]:
    found = []
    if asked:
        room = room_of(asked.cluster)
        ways = {"as it is": [asked.work], "with this split, least memory": [_saved(asked)]}
        found += [Longest(where, *longest(works, room)) for where, works in ways.items()]
    if candidates:
        most = FRUGAL if candidates[-1].stand_in is None else 1
        frugal = sorted(candidates, key=lambda each: each.memory.device)[:most]
        works = [each.work for each in frugal]
        best = Longest("", *longest(works, room_of(candidates[0].cluster)))
        best = max([best, *found], key=lambda way: way.tokens)
        found.append(best._replace(where="with the best split"))
    return found


def _saved(asked: Candidate) -> Workload:
    """The same split with all that saves memory."""
    work = asked.work
    rows, tokens = sum(work.micro_rows), max(work.placement.lengths)
    for saving in reversed(savings(asked.cluster.device, tokens, rows)):
        try:
            settings = changed(work.settings, saving)
            return workload(settings, work.processes, work.vocab_size, work.precision)
        except InputError:  # weights stay on the device under this engine
            continue
    return work
