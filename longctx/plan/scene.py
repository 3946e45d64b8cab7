"""Ranks of a run for the event simulator, as many as can be simulated, and what they do in a step.

They compute as long as the cost model says and send what it says, but each waits only for those
that it needs something of. What else a step takes is added as it is.
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial

from longctx.plan import exchange_time
from longctx.plan.clusters import ClusterConfig, LinkConfig
from longctx.plan.costs import slowest_of, step_time
from longctx.plan.events import Program
from longctx.plan.programs import (
    Crew,
    Scheme,
    Sharded,
    Work,
    gather,
    gather_in_parts,
    local,
    ring,
    scan,
    serial,
    step,
)
from longctx.plan.traffic_engine import GRADIENTS, WEIGHTS
from longctx.plan.waiting import Exchanges, Way
from longctx.plan.waiting_engine import gathered_weights, summed_gradients
from longctx.plan.workload import Workload
from longctx.sequence.ledger import OUTSIDE_LAYERS
from longctx.sequence.sharded import SCAN_BLOCKS

MOST_RANKS, MOST_ON_RINGS = 256, 64
"""Simulated; each stands for several where there are more."""
MOST_LAYERS, MOST_OPERATIONS = 16, 60_000
TIERS = ("node", "fabric")
ENGINE = "engine"
IN_LAYERS = ("prefix", "handoff", "stream")
"""Exchanges that are simulated, beside those of FSDP2 on GPUs."""


@dataclass(frozen=True)
class Route(Crew):
    """Ranks between which what one kind of layer needs takes known times."""

    name: str = ""

    def link(self, source: int, to: int) -> str:
        """Of a hop: node or fabric, for that kind of layer."""
        return f"{self.name} {super().link(source, to)}"

    def all_gather(self, program: Program, kind: str, size: float, after: list[int]) -> int:
        """In the time that is known for it, whatever its size; one after another."""
        link = f"{self.name} {kind}"
        return program.collective(self.name, link, self.ranks, (1, 0.0), after)


@dataclass(frozen=True)
class Pass(Work):
    """One pass of one layer, and how it exchanges."""

    scheme: Scheme = local
    name: str = ""
    """Of its links."""
    stride: int = 1
    """Every which ranks of a sequence exchange with one another."""


@dataclass
class Scene:
    """Ranks of a run, as many as are simulated, and what they do."""

    work: Workload
    cluster: ClusterConfig
    links: dict[str, LinkConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.compute = slowest_of(self.work, self.cluster)
        self.exchanges = Exchanges(self.compute)
        self.time = step_time(self.work, self.cluster)
        self.verbs = {verb for own in self.exchanges.by_letter.values() for verb, _ in own}
        self.is_sharded = self.work.split.engine == "fsdp2" and self.cluster.device == "cuda"
        split, self.all_letters = self.work.split, self.work.settings.model.letters
        is_ring = split.transports.stream == "ring" and "stream" in self.verbs
        most, ring = MOST_ON_RINGS if is_ring else MOST_RANKS, split.sp // split.transports.heads
        self.stride = min(split.transports.heads, most // min(2, ring))
        self.ring = min(ring, most // self.stride)
        self.sequence = self.stride * self.ring
        self.ranks = self.sequence * max(1, min(split.dp, most // self.sequence))
        each = self.ranks * (4 * self.ring if is_ring else 2 * SCAN_BLOCKS + 8)
        self.letters = _first(self.all_letters, min(MOST_LAYERS, MOST_OPERATIONS // each))

    def whole(self, simulated: float) -> float:
        """Seconds of a step of which so much was simulated: all layers and passes, and the rest."""
        inside = {*IN_LAYERS, *((WEIGHTS, GRADIENTS) if self.is_sharded else ())}
        outside = sum(s for verb, s in self.time.exposed.items() if verb not in inside)
        if self.is_sharded:
            outside += gathered_weights(self.exchanges, OUTSIDE_LAYERS)
            outside += summed_gradients(self.exchanges, OUTSIDE_LAYERS)
        outside += self.compute.head + self.time.optimizer
        outside += self.time.fixed + self.time.calling
        own, whole = (
            sum(self.compute.layers[a].forward + self.compute.layers[a].backward for a in letters)
            for letters in (self.letters, self.all_letters)
        )
        return simulated * self._passes * whole / own + outside

    @property
    def _passes(self) -> int:
        return len(self.work.micro_rows)

    def _share(self, letter: str, seconds: float) -> float:
        """Of one layer and pass, of what all layers with its letter take in a step."""
        return seconds / self.all_letters.count(letter) / self._passes

    def program(self) -> Program:
        """A forward and a backward pass of the layers."""
        program, split = Program(), self.work.split
        per_node = self.cluster.processes_per_node * self.sequence // (split.tp * split.sp)
        crew = Route(tuple(range(self.ranks)), max(1, per_node), ENGINE)
        passes = {a: (self._pass(a, False), self._pass(a, True)) for a in {*self.letters}}
        layers = [passes[a] for a in self.letters]
        step(program, crew, layers, self._exchange, self._sharded())
        return program

    def _exchange(self, program: Program, crew: Crew, work: Work) -> list[int]:
        """A pass of a layer, by each group of ranks that exchange with one another."""
        assert isinstance(work, Pass)
        last = []
        for first in range(0, self.ranks, self.sequence):
            ranks = crew.ranks[first : first + self.sequence]
            for n in range(work.stride):
                group = Route(ranks[n :: work.stride], crew.per_node, work.name)
                last += work.scheme(program, group, work)
        return last

    def _sharded(self) -> Sharded | None:
        """Weights of every layer take what those of all take on average."""
        if not self.is_sharded:
            return None
        depth = len(self.all_letters)
        gathers = sum(gathered_weights(self.exchanges, n) for n in range(depth)) / 2
        sums = sum(summed_gradients(self.exchanges, n) for n in range(depth))
        self._link(f"{ENGINE} {WEIGHTS}", gathers / depth / self._passes)
        self._link(f"{ENGINE} {GRADIENTS}", sums / depth / self._passes)
        return Sharded(0.0, 0.0)

    def _link(self, name: str, seconds: float) -> None:
        """What takes so long, whatever goes over it."""
        self.links[name] = LinkConfig(seconds, math.inf)

    def _pass(self, letter: str, backward: bool) -> Pass:
        """Half of what is around the core comes before it."""
        exchanges, layer = self.exchanges, self.compute.layers[letter]
        count = self.all_letters.count(letter)
        core, first = (exchanges.core(letter, way) / count for way in (backward, False))
        repeated = first - layer.core.forward
        whole = layer.backward - repeated if backward else layer.forward + repeated
        work = Work((whole - core) / 2 / self._passes, core / self._passes, 0.0)
        for verb, is_backward in exchanges.by_letter.get(letter, {}):
            if is_backward == backward and verb == "stream":
                return self._stream(letter, backward, work)
            if is_backward == backward and verb in IN_LAYERS:
                return self._chain(letter, (verb, backward), work)
        return Pass(work.before, work.beside, 0.0, work.before)

    def _stream(self, letter: str, backward: bool, work: Work) -> Pass:
        """Keys and values, of a layer whose core is `work.beside`."""
        traffic, group = self.exchanges.by_letter[letter], self.exchanges.groups["ring"]
        sent, name = traffic["stream", backward], f"{letter}{int(backward)}"
        around, core, stride = work.before, work.beside, self.stride
        if self.work.split.transports.stream == "ring":
            for tier in TIERS:
                link: LinkConfig = getattr(group, tier)
                seconds = sent.calls * link.latency + sent.received / link.bandwidth
                self._link(f"{name} {tier}", self._share(letter, seconds) / max(1, self.ring - 1))
            return Pass(around, core, 0.0, around, scheme=ring, name=name, stride=stride)
        parts = self.exchanges.chunks(letter, traffic["stream", False].calls)
        seconds = self._share(letter, exchange_time.gathered(group, sent))
        self._link(f"{name} gather", seconds / parts)
        own, scheme = self.exchanges.own_share * core, partial(gather_in_parts, parts=parts)
        return Pass(around, own, core - own, around, scheme=scheme, name=name, stride=stride)

    def _chain(self, letter: str, way: Way, work: Work) -> Pass:
        """States, of a layer whose core is `work.beside`."""
        (verb, backward), exchanges = way, self.exchanges
        transport = "serial" if verb == "handoff" else self.work.split.transports.prefix
        around, core, name = work.before, work.beside, f"{letter}{int(backward)}"
        beside = core * exchanges.local_share(letter, backward)
        found = Pass(around + core - beside, beside, 0.0, around, name=name)
        if transport in ("allgather", "ulysses"):
            group = exchanges.groups["ring" if transport == "ulysses" else "sequence"]
            seconds = exchange_time.gathered(group, exchanges.by_letter[letter][way])
            self._link(f"{name} gather", self._share(letter, seconds))
            stride = self.stride if transport == "ulysses" else 1
            return replace(found, scheme=gather, stride=stride)
        blocks = SCAN_BLOCKS if transport == "scan" else 1
        chains, size = exchanges.chains(letter, way, blocks)
        longer = (sum(exchanges.hops) + blocks - 1) / (self.sequence + blocks - 2)
        for tier in TIERS:
            link = getattr(exchanges.groups["sequence"], tier)
            seconds = longer * (chains * link.latency + size / blocks / link.bandwidth)
            self._link(f"{name} {tier}", self._share(letter, seconds))
        if transport == "scan":
            return replace(found, scheme=partial(scan, blocks=blocks))
        used = core if verb == "handoff" else 0.0
        return Pass(around, core - used, used, around, scheme=serial, name=name)


def _first(letters: str, count: int) -> str:
    """So many layers from the front, and what kinds are not among them."""
    missing = dict.fromkeys(a for a in letters if a not in letters[:count])
    return letters[:count] + "".join(missing)
