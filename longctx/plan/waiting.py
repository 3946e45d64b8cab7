"""How long a process waits for others in a step, and what is hidden beside its own work.

Which work lies between an exchange's start and its end is read off the cores: states travel beside
what a segment does from a zero state, gathered keys beside own keys or another chunk of heads, a
block of a ring beside the block before it, weights of FSDP2 beside the layer before. What else a
process asks for, it waits for.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

from longctx.plan import exchange_time
from longctx.plan.exchange_time import Group, group_of
from longctx.plan.flops import contexts_of
from longctx.plan.kernel_time import Compute, kernels_of
from longctx.plan.traffic import traffic_of
from longctx.plan.traffic_engine import GRADIENTS, WEIGHTS
from longctx.plan.workload import Workload
from longctx.sequence.expected import WIDTHS
from longctx.sequence.ledger import OUTSIDE_LAYERS, Label, Traffic
from longctx.sequence.sharded import SCAN_BLOCKS

LOCAL_SHARE = 2 / 3
"""Of a core with a state, what follows the pass that finds the states to send."""
NOTHING = Traffic(0, 0)
Way = tuple[str, bool]
"""A verb, and whether in the backward pass."""


@dataclass
class Waits:
    """Seconds by verb."""

    exposed: Counter[str] = field(default_factory=Counter)
    hidden: Counter[str] = field(default_factory=Counter)

    def add(self, verb: str, seconds: float, exposed: float) -> None:
        """Of an exchange, of which so much is not beside work."""
        self.exposed[verb] += exposed
        self.hidden[verb] += seconds - exposed

    def beside(self, verb: str, seconds: float, work: float = 0.0) -> None:
        """Of an exchange that so much work is beside."""
        self.add(verb, seconds, max(0.0, seconds - work))


@dataclass(frozen=True)
class Stream:
    """Seconds of all softmax layers with one letter: what keys take, and what they are beside."""

    there: float
    """Keys and values, forward."""
    again: float
    """And backward."""
    gradients: float
    """Of keys and values, backward."""
    core: tuple[float, float]
    """Attention, forward and backward."""
    own_share: float
    """Of it, what is between own queries and own keys."""

    def ring(self, hops: int) -> tuple[float, float]:
        """What is not hidden, forward and backward: each hop has a block beside it; own keys hide
        the first one, and backward by halves the first one and the last one."""
        own, others = self.own_share, (1 - self.own_share) / hops
        forward, backward = self.core
        there, again, home = (x / hops for x in (self.there, self.again, self.gradients))
        ahead = max(0.0, there - own * forward)
        ahead += (hops - 1) * max(0.0, there - others * forward)
        back = max(0.0, again - own * backward / 2) + max(0.0, home - own * backward / 2)
        back += (hops - 1) * max(0.0, again + home - others * backward)
        return ahead, back

    def gather(self, chunks: int) -> tuple[float, float]:
        """The same: own keys hide the first of so many chunks of heads, and backward by halves the
        first and the last; what is done with one chunk hides the next."""
        forward, backward = (x / chunks for x in self.core)
        there, again, home = (x / chunks for x in (self.there, self.again, self.gradients))
        ahead = max(0.0, there - self.own_share * forward)
        ahead += (chunks - 1) * max(0.0, there - forward)
        half = self.own_share * backward / 2
        back = max(0.0, again - half) + max(0.0, home - half)
        back += (chunks - 1) * max(0.0, again + home - backward)
        return ahead, back


@dataclass(frozen=True)
class Exchanges:
    """What one process of a run exchanges in a step, beside what it computes."""

    compute: Compute

    @property
    def work(self) -> Workload:
        """The run."""
        return self.compute.work

    @cached_property
    def inner(self) -> int:
        """A rank in the middle of its sequence, to whose either side others are."""
        order = self.work.placement.order
        return order[len(order) // 2][0]

    @cached_property
    def traffic(self) -> dict[Label, Traffic]:
        """By label, of that rank; in collectives all have the same."""
        return traffic_of(self.work, self.inner * self.work.split.tp)

    def waits(self) -> Waits:
        """What layers ask for in a step, but for their weights."""
        waits = Waits()
        for letter, own in self.by_letter.items():
            stream = tuple(own.get(("stream", backward), NOTHING) for backward in (False, True))
            if stream != (NOTHING, NOTHING):
                self._stream(waits, letter, stream)
            for way, traffic in own.items():
                if way[0] in ("prefix", "handoff"):
                    self._chain(waits, letter, way, traffic)
                elif way[0] != "stream":
                    waits.beside(way[0], self._blocking(way[0], traffic))
        return waits

    @cached_property
    def by_letter(self) -> dict[str, dict[Way, Traffic]]:
        """Added up over all layers with a letter."""
        letters, found = self.work.settings.model.letters, dict[str, dict[Way, Traffic]]()
        for label, (calls, received) in self.traffic.items():
            if label.layer != OUTSIDE_LAYERS and label.verb not in (WEIGHTS, GRADIENTS):
                own = found.setdefault(letters[label.layer], {})
                before = own.get(label[1:], NOTHING)
                own[label[1:]] = Traffic(before.calls + calls, before.received + received)
        return found

    def group(self, size: int, stride: int) -> Group:
        """Of so many processes, one of which is every `stride`-th."""
        split = self.work.split
        total = split.dp * split.sp * split.tp
        return group_of(self.compute.cluster, total, size, stride)

    @cached_property
    def groups(self) -> dict[str, Group]:
        """By purpose."""
        split = self.work.split
        heads, holders = split.transports.heads, split.dp * split.sp
        shards = holders // split.replicas
        return {
            "sequence": self.group(split.sp, split.tp),
            "heads": self.group(heads, split.tp),
            "ring": self.group(split.sp // heads, split.tp * heads),
            "tensor": self.group(split.tp, 1),
            "shards": self.group(shards, split.tp),
            "replicas": self.group(split.replicas, split.tp * shards),
            "holders": self.group(holders, split.tp),
            "copy": self.group(shards * split.tp, 1),
            "all": self.group(holders * split.tp, 1),
        }

    def _blocking(self, verb: str, traffic: Traffic) -> float:
        """What nothing is beside."""
        if verb.startswith("shared"):
            return exchange_time.reduced(self.groups["tensor"], traffic)
        if verb == "heads":
            return exchange_time.traded(self.groups["heads"], traffic)
        if verb == "reduce":
            return exchange_time.reduced(self.groups["sequence"], traffic)
        if verb in ("halo", "fetch"):
            return exchange_time.passed(self.groups["sequence"], traffic)
        return exchange_time.gathered(self.groups["sequence"], traffic)

    def core(self, letter: str, backward: bool) -> float:
        """Seconds of the cores of all layers with a letter, in passes that exchange."""
        core = self.compute.layers[letter].core
        count = self.work.settings.model.letters.count(letter)
        is_repeated = self.work.settings.memory.of_layer(letter) == "full"
        forward = core.forward + core.repeated * is_repeated
        return count * (core.backward if backward else forward)

    def _chain(self, waits: Waits, letter: str, way: Way, traffic: Traffic) -> None:
        """States of all segments, or from each to the next."""
        verb, backward = way
        transport = "serial" if verb == "handoff" else self.work.split.transports.prefix
        core, group = self.core(letter, backward), self.groups["sequence"]
        if transport in ("allgather", "ulysses"):
            group = self.groups["ring"] if transport == "ulysses" else group
            seconds = exchange_time.gathered(group, traffic)
        else:
            blocks = SCAN_BLOCKS if transport == "scan" else 1
            chains, size = self.chains(letter, way, blocks)
            seconds = exchange_time.chained(group, self.hops, chains, size, blocks)
        if verb == "handoff":
            seconds += (group.size - 1) * core
        beside = 0.0 if transport == "serial" else core * self.local_share(letter, backward)
        waits.beside(verb, seconds, beside)

    def local_share(self, letter: str, backward: bool) -> float:
        """Which share of a core with a state lies between sending states and needing them."""
        if kernels_of(self.work.settings.model.mixers[letter]) == "delta":
            return 0.0 if backward else 1.0
        return LOCAL_SHARE

    def chains(self, letter: str, way: Way, blocks: int) -> tuple[float, float]:
        """How many there are, and how large together, follows from what the inner rank has."""
        own, (verb, backward) = self.by_letter[letter], way
        calls, size = own[way]
        if not size:  # nothing comes to the end of a chain: as much as goes the other way
            other = own[verb, not backward]
            size = other.received * calls / other.calls
        touching = sum(self.inner in border for border in self._borders)
        return calls / blocks / touching, size

    @cached_property
    def _borders(self) -> list[tuple[int, int]]:
        """Ranks to the left and right of every cut between two of them."""
        owners = [rank for rank, _ in self.work.placement.order]
        return [(a, b) for a, b in zip(owners, owners[1:]) if a != b]

    @cached_property
    def hops(self) -> tuple[int, int]:
        """How many of these lie in one node, and how many between two."""
        tp, here = self.work.split.tp, self.compute.cluster.processes_per_node
        across = sum(a * tp // here != b * tp // here for a, b in self._borders)
        return len(self._borders) - across, across

    @cached_property
    def own_share(self) -> float:
        """Of the pairs of a query and a key that this process computes, those with own keys."""
        contexts, _ = contexts_of(self.work, self.compute.sp_rank)
        rows = len(self.work.documents) or 1
        own = self.compute.own_tokens * (self.compute.own_tokens + 1) / 2 * rows
        return min(1.0, own / sum(each.pairs for each in contexts))

    def _stream(self, waits: Waits, letter: str, traffic: tuple[Traffic, Traffic]) -> None:
        """Keys and values forward; backward again, with their gradients."""
        group, widths, split = self.groups["ring"], WIDTHS[self.work.precision], self.work.split
        is_ring = split.transports.stream == "ring"
        time = exchange_time.passed if is_ring else exchange_time.gathered
        there, back = (time(group, each) for each in traffic)
        keys = back * widths.activation / sum(widths)
        core = self.core(letter, False), self.core(letter, True)
        stream = Stream(there, keys, back - keys, core, self.own_share)
        hops, chunks = group.size - 1, self.chunks(letter, traffic[0].calls)
        exposed = stream.ring(hops) if is_ring else stream.gather(chunks)
        waits.add("stream", there, exposed[0])
        waits.add("stream", back, exposed[1])

    def chunks(self, letter: str, calls: int) -> int:
        """How many gathers bring all key heads of a layer, forward."""
        work, is_again = self.work, self.work.settings.memory.of_layer(letter) == "full"
        passes = len(work.micro_rows) * (1 + is_again)
        return max(1, calls // passes // work.settings.model.letters.count(letter))
