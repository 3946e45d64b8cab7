"""Finds the fastest way to run a config on a cluster, among those that fit."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from math import log
from typing import Any, NamedTuple

from longctx.errors import InputError
from longctx.model.memory import MemoryConfig
from longctx.model.saved_formulas import formula_of
from longctx.plan import choices
from longctx.plan.choices import Changes, changed, differences, joined
from longctx.plan.clusters import GIB, ClusterConfig
from longctx.plan.costs import StepTime, step_time
from longctx.plan.memory import Memory, memory_of
from longctx.plan.sizes import hollow_model
from longctx.plan.traffic import by_verb, traffic_of
from longctx.plan.workload import Workload, workload
from longctx.sequence.ledger import Traffic
from longctx.sequence.sharded import Transports
from longctx.train.settings import Settings

REFINED = 5
"""Meshes of which every other choice is tried."""
PROMISING = 1.3
"""Times the step of the best so far, within which a mesh has to start for that."""
SAME = 3e-3
"""Part of a step by which two ways may differ that count as equally fast."""
SWEEPS = 3
"""How often each choice is tried again after others have changed."""


class Room(NamedTuple):
    """Bytes that a process may take."""

    device: float
    host: float
    is_apart: bool = True
    """Whether the host's is another memory than that of the device."""

    def lacks(self, memory: Memory) -> float:
        """How many more it would take, of whichever is shorter; 0 if it fits."""
        if not self.is_apart:
            return max(0.0, memory.device + memory.host - self.device)
        return max(0.0, memory.device - self.device, memory.host - self.host)


def room_of(cluster: ClusterConfig) -> Room:
    """Of a process of a full node."""
    device, host = cluster.memory_gib * GIB, cluster.host_memory_gib * GIB
    return Room(device, host / cluster.processes_per_node, cluster.device == "cuda")


@dataclass(frozen=True)
class Candidate:
    """A way to run, and what it is predicted to take."""

    work: Workload
    cluster: ClusterConfig
    overrides: dict[str, Any]
    """Fields by dotted name that differ from the config."""
    stand_in: Workload | None = None
    """Whose memory counts instead, where that of each way would take long to find."""

    @cached_property
    def memory(self) -> Memory:
        """Of the process that takes most."""
        return largest_memory(self.stand_in or self.work, self.cluster.device == "cuda")

    @cached_property
    def time(self) -> StepTime:
        """Of the slowest process."""
        return step_time(self.work, self.cluster)

    @cached_property
    def traffic(self) -> dict[str, Traffic]:
        """Of a step by verb, of a process in the middle of its sequence."""
        order, tp = self.work.placement.order, self.work.split.tp
        return by_verb(traffic_of(self.work, order[len(order) // 2][0] * tp))

    @cached_property
    def lacks(self) -> float:
        """Bytes that a process has too few; 0 if it fits."""
        return room_of(self.cluster).lacks(self.memory)

    @property
    def fits(self) -> bool:
        """Whether every process has the memory."""
        return self.lacks == 0

    @property
    def order(self) -> tuple[float, float, int]:
        """What candidates are sorted by: what lacks, then time, then how much differs from the
        config; small differences in time are none."""
        if not self.fits:
            return self.lacks, 0.0, len(self.overrides)
        return 0.0, round(log(self.time.total) / SAME), len(self.overrides)


def largest_memory(work: Workload, on_gpu: bool) -> Memory:
    """Of the process that takes most: one with the most tokens, or with the last of them, which see
    most others."""
    placement, tp = work.placement, work.split.tp
    most = placement.lengths.index(max(placement.lengths))
    found = [memory_of(work, rank * tp, on_gpu) for rank in {most, placement.order[-1][0]}]
    return max(found, key=lambda memory: memory.device)


@dataclass
class Search:
    """What was tried so far."""

    settings: Settings
    cluster: ClusterConfig
    processes: int
    vocab_size: int
    precision: str
    tried: dict[str, Candidate] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)
    """How many ways were illegal, by what the first layer or table that refused them said."""

    @cached_property
    def _probe(self) -> Settings:
        """As far as legality goes, layers beyond the first of each letter change nothing."""
        model = self.settings.model
        return changed(self.settings, {"model.depth": min(model.depth, len(model.pattern))})

    @cached_property
    def _verbs(self) -> set[str]:
        """What layers ask for."""
        return {verb for layer in self._probe.model.layers for verb in layer.verbs()}

    @cached_property
    def _runs_layers(self) -> bool:
        """Whether there are layers whose memory is found by running them at small sizes."""
        layers = hollow_model(self.settings.model, self.vocab_size, (0, 1)).layers()
        mixers = (layer.block.mixer for layer, _ in layers)
        return any(mixer is not None and formula_of(mixer) is None for mixer in mixers)

    def legal(self, changes: Changes) -> Workload | None:
        """The work under these changes; None if it is refused, on whatever machine."""
        try:
            probe = workload(
                changed(self._probe, changes), self.processes, self.vocab_size, self.precision
            )
        except InputError as error:
            self.refused[str(error)] += 1
            return None
        return replace(probe, settings=changed(self.settings, changes))

    def candidate(self, changes: Changes) -> Candidate | None:
        """A way to run; None if it is illegal."""
        if (work := self.legal(changes)) is None:
            return None
        key = _key(work)
        if key not in self.tried:
            overrides = differences(self.settings, changes)
            stand_in = _alone(work) if self._runs_layers else None
            self.tried[key] = Candidate(work, self.cluster, overrides, stand_in)
        return self.tried[key]

    def plainest(self, candidate: Candidate) -> Candidate:
        """The same without overrides that come to what the config says."""
        needed = candidate.overrides
        for name in candidate.overrides:
            fewer = {other: value for other, value in needed.items() if other != name}
            work = self.legal(fewer)
            needed = fewer if work and _key(work) == _key(candidate.work) else needed
        return replace(candidate, overrides=needed)

    def run(self) -> list[Candidate]:
        """All that was tried, the best first."""
        node, batch_size = self.cluster.processes_per_node, self.settings.train.batch_size
        meshes = choices.meshes(self.processes, node, batch_size)
        starts = [found for mesh in meshes if (found := self._start(mesh))]
        for way in sorted(starts, key=self._order)[:REFINED]:
            if self._is_promising(way):
                self._refine(way)
        found = sorted(self.tried.values(), key=lambda each: each.order)
        exact = (replace(each, stand_in=None) for each in found)
        first = next((n for n, each in enumerate(exact) if each.fits), 0)
        best = self.plainest(replace(found[first], stand_in=None))
        return [best, *found[:first], *found[first + 1 :]]

    def _order(self, way: Changes) -> tuple[float, float, int]:
        found = self.candidate(way)
        assert found is not None
        return found.order

    def _is_promising(self, way: Changes) -> bool:
        fitting = [each.time.total for each in self.tried.values() if each.fits]
        found = self.candidate(way)
        if not fitting or found is None or not found.fits:
            return not fitting
        return found.time.total < PROMISING * min(fitting)

    def _best_of(self, ways: Sequence[Changes]) -> Changes | None:
        return min((way for way in ways if self.candidate(way)), key=self._order, default=None)

    def _start(self, mesh: Changes) -> Changes | None:
        """A way to run on this mesh, one that fits if that is found quickly."""
        groups = choices.head_groups(mesh["parallel.sp"])
        ways = [joined(mesh, choices.SPREAD, group) for group in groups]
        legal = [way for way in ways if self.legal(way)]
        if not legal:
            return None
        ends = {str(way): way for way in (legal[0], legal[-1])}.values()
        found = [way for each in ends for way in self._fitting(each)]
        return self._best_of(found)

    def _fitting(self, way: Changes) -> list[Changes]:
        """With the fastest saving of memory with which it fits, and with a faster one if it fits
        where keys or weights come otherwise; if none does, with the one that saves most."""
        if (work := self.legal(way)) is None:
            return []
        ways = [joined(way, saving) for saving in self._savings(work)]
        legal = [each for each in ways if self.legal(each)]
        first = next((n for n, each in enumerate(legal) if self._fits(each)), len(legal))
        others = [a for a in self._arrivals(work) if a.get("parallel.weights") != "fp32"]
        frugal = (joined(each, other) for each in legal[:first] for other in others)
        faster = next((each for each in frugal if self._fits(each)), None)
        return [*legal[: first + 1][-1:], *([faster] if faster else [])]

    def _arrivals(self, work: Workload) -> list[Changes]:
        """Ways for keys and weights to come; all but the first take less memory, or may."""
        is_split = "stream" in self._verbs and work.split.sp > 1
        streams: Sequence[Changes] = choices.streams() if is_split else [{}]
        weights: Sequence[Changes] = choices.weights() if self.precision == "bf16" else [{}]
        return [joined(*each) for each in product(streams, weights)]

    def _with_arrivals(self, work: Workload, ways: Sequence[Changes]) -> list[Changes]:
        return [joined(*each) for each in product(ways, self._arrivals(work))]

    def _fits(self, way: Changes) -> bool:
        found = self.candidate(way)
        return found is not None and found.fits

    def _savings(self, work: Workload) -> Sequence[Changes]:
        rows = work.settings.train.batch_size // work.split.dp
        tokens = max(work.micro_rows) * max(work.placement.lengths)
        return choices.savings(self.cluster.device, tokens, rows)

    def _refine(self, way: Changes) -> None:
        """Tries each choice with the others as they are, until none improves."""
        for _ in range(SWEEPS):
            before = way
            for options in self._factors():
                work = self.legal(way)
                assert work is not None
                way = self._best_of([way, *(joined(way, each) for each in options(work))]) or way
            if way is before:
                return

    def _factors(self) -> Iterator[Callable[[Workload], Sequence[Changes]]]:
        """The choices, each with the values that it has for a work."""
        verbs, node = self._verbs, self.cluster.processes_per_node

        def where_split(ways: Sequence[Changes]) -> Callable[[Workload], Sequence[Changes]]:
            return lambda work: ways if work.split.sp > 1 else ()

        yield lambda work: self._with_arrivals(work, choices.head_groups(work.split.sp))
        yield where_split(choices.placements())
        if "prefix" in verbs:
            yield where_split(choices.prefixes())
        yield lambda work: choices.engines(work.split.dp * work.split.sp, node)
        yield lambda work: self._with_arrivals(work, self._savings(work))
        yield lambda work: choices.micro_batches(work.settings.train.batch_size // work.split.dp)


def _alone(work: Workload) -> Workload:
    """As if each process had as many tokens in one sequence of its own: what its layers keep of
    other processes is left out."""
    split, passes = work.split, len(work.micro_rows)
    holders = split.dp * split.sp
    changes = {
        "train.seq_len": max(work.micro_rows) * max(work.placement.lengths),
        "train.batch_size": holders * passes,
        "train.micro_batch": 1,
        "parallel.weights": "fp32",
    }
    own = replace(split, dp=holders, sp=1, placement="contiguous", transports=Transports())
    try:
        return replace(work, settings=changed(work.settings, changes), split=own)
    except InputError:  # a layer needs longer sequences than one process has of them
        return work


def _key(work: Workload) -> str:
    """What tells ways to run apart."""
    settings = work.settings
    return repr((work.split, work.micro_rows, settings.parallel.weights, settings.memory))


def search(
    settings: Settings,
    cluster: ClusterConfig,
    processes: int,
    vocab_size: int,
    precision: str,
) -> list[Candidate]:
    """Ways to run a config that were tried, the best first: those that fit by their time, then the
    others by what they lack."""
    return Search(settings, cluster, processes, vocab_size, precision).run()


def choose_memory(
    settings: Settings, processes: int, vocab_size: int, precision: str, room: Room
) -> MemoryConfig:
    """The fastest policy of [memory] with which a run fits; if none does, the one that saves most.

    It follows from sizes alone, so that all processes choose alike.
    """
    train, split, chosen = settings.train, settings.parallel, settings.memory
    rows = train.micro_batch or train.batch_size * split.sp * split.tp // processes
    tokens = rows * -(-train.seq_len // split.sp)
    own: Changes = {"memory.mlp_tokens": chosen.mlp_tokens} if chosen.mlp_tokens else {}
    policies = choices.policies("cuda" if room.is_apart else "cpu", tokens)
    if chosen.checkpointing == "auto" and chosen.activations == "cpu":
        own = joined(own, {"memory.activations": "cpu"})
        policies = policies[1:]  # where nothing is checkpointed, nothing waits elsewhere
    for policy in policies:
        work = workload(changed(settings, joined(policy, own)), processes, vocab_size, precision)
        chosen = work.settings.memory
        if not room.lacks(largest_memory(work, room.is_apart)):
            break
    return chosen
