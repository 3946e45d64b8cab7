"""Simulates ranks that compute and send, for what formulas cannot say: delays that add up.

Each rank has streams: one computes, others move bytes. A stream does its operations one after
another in the order in which they were added, as a GPU does, and an operation waits for those it
names, all added before it; so one pass over the program gives every start and end.
"""

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from longctx.plan.clusters import LinkConfig

COMPUTE = "compute"
"""The stream that every rank computes on."""


class Operation(NamedTuple):
    """Something that occupies streams of one or several ranks from its start to its end."""

    kind: str
    streams: tuple[tuple[int, str], ...]
    """(rank, stream)."""
    after: tuple[int, ...] = ()
    """Numbers of the operations that must have ended."""
    seconds: float = 0.0
    """Of computing."""
    link: str = ""
    """What messages cross; "" for computations."""
    messages: int = 0
    """One after another."""
    size: float = 0.0
    """Bytes of all messages."""


@dataclass
class Program:
    """What all ranks do, in an order in which nothing waits for what comes later."""

    operations: list[Operation] = field(default_factory=list)

    def add(self, operation: Operation) -> int:
        """Puts it last; returns its number, by which others wait for it."""
        assert all(i < len(self.operations) for i in operation.after), "waits for what comes later"
        self.operations.append(operation)
        return len(self.operations) - 1

    def compute(self, rank: int, kind: str, seconds: float, after: Iterable[int] = ()) -> int:
        """Work of one rank."""
        return self.add(Operation(kind, ((rank, COMPUTE),), tuple(after), seconds))

    def send(
        self, kind: str, link: str, ends: tuple[int, int], size: float, after: Iterable[int]
    ) -> int:
        """A message from one rank to another; of each kind a rank sends one at a time, and
        receives one."""
        source, to = ends
        streams = ((source, f"{kind} out"), (to, f"{kind} in"))
        return self.add(Operation(kind, streams, tuple(after), 0.0, link, 1, size))

    def collective(
        self,
        kind: str,
        link: str,
        ranks: Sequence[int],
        load: tuple[int, float],
        after: Iterable[int],
    ) -> int:
        """What ranks do together from when the last is ready; load is messages and bytes of one."""
        streams = tuple((rank, kind) for rank in ranks)
        return self.add(Operation(kind, streams, tuple(after), 0.0, link, *load))


@dataclass(frozen=True)
class Jitter:
    """How much operations differ from what they should take; the same seed, the same delays."""

    compute: float = 0.0
    """Deviation of the logarithm of each computation's time; its mean stays."""
    exchange: float = 0.0
    """The same of each message and collective."""
    slow: Mapping[int, float] = field(default_factory=dict)
    """How many times longer the computations of some ranks take."""
    seed: int = 0


STEADY = Jitter()
"""Everything takes what it should."""


@dataclass(frozen=True)
class Timeline:
    """When each operation started and ended."""

    operations: Sequence[Operation]
    starts: Sequence[float]
    ends: Sequence[float]
    causes: Sequence[int]
    """The operation whose end let each one start; -1 for those that start at once."""

    @property
    def seconds(self) -> float:
        """Until everything has ended."""
        return max(self.ends, default=0.0)

    def busy(self, rank: int, stream: str = COMPUTE) -> float:
        """Seconds that a stream of a rank is occupied."""
        mine = (rank, stream)
        spans = zip(self.operations, self.starts, self.ends)
        return sum(end - start for op, start, end in spans if mine in op.streams)

    def idle(self, rank: int) -> float:
        """Seconds, of all, in which a rank does not compute."""
        return self.seconds - self.busy(rank)

    def critical_path(self) -> list[int]:
        """The operations that follow on one another's end up to the last end of all."""
        if not self.ends:
            return []
        path = [max(range(len(self.ends)), key=self.ends.__getitem__)]
        while self.causes[path[-1]] >= 0:
            path.append(self.causes[path[-1]])
        return path[::-1]

    def critical_seconds(self) -> dict[str, float]:
        """Seconds of the critical path by kind; they add up to all."""
        found: dict[str, float] = defaultdict(float)
        for i in self.critical_path():
            found[self.operations[i].kind] += self.ends[i] - self.starts[i]
        return dict(found)


def simulate(
    program: Program, links: Mapping[str, LinkConfig], jitter: Jitter = STEADY
) -> Timeline:
    """Runs the program; `links` are those that its operations name."""
    operations, durations = program.operations, _durations(program, links, jitter)
    starts, ends, causes = [], [], []
    last: dict[tuple[int, str], int] = {}
    for number, operation in enumerate(operations):
        start, cause = 0.0, -1
        for stream in operation.streams:
            before = last.get(stream, -1)
            if before >= 0 and ends[before] > start:
                start, cause = ends[before], before
            last[stream] = number
        for before in operation.after:
            if ends[before] > start:
                start, cause = ends[before], before
        starts.append(start)
        ends.append(start + durations[number])
        causes.append(cause)
    return Timeline(operations, starts, ends, causes)


def _durations(
    program: Program, links: Mapping[str, LinkConfig], jitter: Jitter
) -> Sequence[float]:
    """Seconds of each operation, from draws in the order of the program."""
    draws = random.Random(jitter.seed)
    found = []
    for operation in program.operations:
        seconds, spread = operation.seconds, jitter.compute
        if operation.link:
            link = links[operation.link]
            seconds = operation.messages * link.latency + operation.size / link.bandwidth
            spread = jitter.exchange
        elif jitter.slow:
            seconds *= jitter.slow.get(operation.streams[0][0], 1.0)
        if spread:
            seconds *= math.exp(draws.gauss(-spread * spread / 2, spread))
        found.append(seconds)
    return found
