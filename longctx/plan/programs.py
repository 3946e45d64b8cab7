"""Programs of training steps for the event simulator: how layers exchange what they need."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from longctx.plan.events import Program


@dataclass(frozen=True)
class Crew:
    """Ranks in the order in which a sequence lies on them."""

    ranks: tuple[int, ...]
    per_node: int

    @property
    def backwards(self) -> "Crew":
        """The order in which gradients travel."""
        return replace(self, ranks=self.ranks[::-1])

    def link(self, source: int, to: int) -> str:
        """What a message between two ranks crosses: node or fabric."""
        return "node" if source // self.per_node == to // self.per_node else "fabric"

    def all_gather(self, program: Program, kind: str, size: float, after: list[int]) -> int:
        """Each rank gets `size` bytes of every other one; a reduce-scatter takes as long.

        Between nodes, every device has a line of its own, and a collective uses them all.
        """
        link, others = self.link(min(self.ranks), max(self.ranks)), len(self.ranks) - 1
        lines = self.per_node if link == "fabric" else 1
        load = (others, others * size / lines)
        return program.collective(kind, link, self.ranks, load, after)


@dataclass(frozen=True)
class Work:
    """One pass of one layer on each rank: seconds of computing, and bytes for other ranks."""

    before: float
    """Until what others need is known."""
    beside: float
    """What needs no other rank."""
    behind: float
    """What needs that which the others sent, before it can be passed on."""
    rest: float = 0.0
    """What comes after that, up to the next layer."""
    size: float = 0.0
    """Bytes that a rank has for others: its state, or its keys and values."""


Scheme = Callable[[Program, Crew, Work], list[int]]
"""Adds a pass of a layer to a program; returns the last computation of each rank of the crew."""


def local(program: Program, crew: Crew, work: Work) -> list[int]:
    """Nobody needs anything: each rank has sequences of its own."""
    seconds = work.before + work.beside + work.behind + work.rest
    return [program.compute(rank, "compute", seconds) for rank in crew.ranks]


def serial(program: Program, crew: Crew, work: Work) -> list[int]:
    """A state goes from rank to rank, and each passes it on after using it (LASP-1)."""
    used: list[int] = []
    last = []
    for i, rank in enumerate(crew.ranks):
        program.compute(rank, "compute", work.before + work.beside)
        came = []
        if i:
            source = crew.ranks[i - 1]
            link = crew.link(source, rank)
            came = [program.send("serial", link, (source, rank), work.size, used[-1:])]
        used.append(program.compute(rank, "inter", work.behind, came))
        last.append(program.compute(rank, "compute", work.rest))
    return last


def scan(program: Program, crew: Crew, work: Work, blocks: int) -> list[int]:
    """A chain of blocks of the state beside the rest of the work (ZeCO's All-Scan)."""
    states = [program.compute(rank, "compute", work.before) for rank in crew.ranks]
    for rank in crew.ranks:
        program.compute(rank, "compute", work.beside)
    came: list[list[int]] = [[]]
    for i, (source, to) in enumerate(zip(crew.ranks, crew.ranks[1:])):
        link = crew.link(source, to)
        after = [[states[i], *came[i][block : block + 1]] for block in range(blocks)]
        ends, size = (source, to), work.size / blocks
        came.append([program.send("scan", link, ends, size, after[k]) for k in range(blocks)])
    return [
        program.compute(rank, "inter", work.behind + work.rest, came[i][-1:])
        for i, rank in enumerate(crew.ranks)
    ]


def gather(program: Program, crew: Crew, work: Work, overlapped: bool = True) -> list[int]:
    """Every rank gets what all have, beside the rest of its work or before it (LASP-2)."""
    ready = [program.compute(rank, "compute", work.before) for rank in crew.ranks]
    came = [crew.all_gather(program, "gather", work.size, ready)]
    first = [] if overlapped else came
    for rank in crew.ranks:
        program.compute(rank, "compute", work.beside, first)
    seconds = work.behind + work.rest
    return [program.compute(rank, "inter", seconds, came) for rank in crew.ranks]


def gather_in_parts(program: Program, crew: Crew, work: Work, parts: int) -> list[int]:
    """The same a part at a time: each is used while the next one comes, and what needs none of
    them is done beside the first."""
    last = [program.compute(rank, "compute", work.before) for rank in crew.ranks]
    came, ready = list[int](), last
    for part in range(parts):
        came = [crew.all_gather(program, "gather", work.size / parts, [*ready, *came])]
        ready = last
        if not part:
            for rank in crew.ranks:
                program.compute(rank, "compute", work.beside)
        last = [program.compute(rank, "part", work.behind / parts, came) for rank in crew.ranks]
    return [program.compute(rank, "compute", work.rest) for rank in crew.ranks]


def ring(program: Program, crew: Crew, work: Work) -> list[int]:
    """Keys and values go round; a rank works on one block, all alike, while the next one comes."""
    ranks, each = crew.ranks, work.beside / len(crew.ranks)
    held = [program.compute(rank, "compute", work.before) for rank in ranks]
    worked: list[list[int]] = []
    for hop in range(len(ranks)):
        sent = []
        for i, (source, to) in enumerate(zip(ranks, ranks[1:] + ranks[:1])):
            if hop == len(ranks) - 1:
                break
            # it takes the place of the block before the one that is being worked on
            room = [worked[hop - 1][(i + 1) % len(ranks)]] if hop else []
            ends, after = (source, to), [held[i], *room]
            sent.append(program.send("ring", crew.link(*ends), ends, work.size, after))
        blocks = [program.compute(rank, "block", each, (came,)) for rank, came in zip(ranks, held)]
        worked.append(blocks)
        held = sent[-1:] + sent[:-1]
    return [program.compute(rank, "compute", work.behind + work.rest) for rank in ranks]


@dataclass(frozen=True)
class Sharded:
    """A layer's weights, spread over all ranks (FSDP, ZeRO-3)."""

    weights: float
    """Bytes of the whole layer in the precision in which they are gathered."""
    gradients: float
    """Bytes of its gradients as they are reduced."""


def step(
    program: Program,
    crew: Crew,
    layers: Sequence[tuple[Work, Work]],
    scheme: Scheme,
    sharded: Sharded | None = None,
) -> None:
    """Forward and backward passes of all layers, given as (forward, backward).

    Sharded weights of the next layer are gathered while one computes; gradients are
    reduced while the next one does.
    """
    passes = [(crew, forward) for forward, _ in layers]
    passes += [(crew.backwards, backward) for _, backward in reversed(layers)]
    gathered, reduced = (sharded.weights, sharded.gradients) if sharded else (0.0, 0.0)
    came = [crew.all_gather(program, "weights", gathered / len(crew.ranks), [])] if sharded else []
    with _uncollected():
        for number, (order, work) in enumerate(passes):
            starts = [program.compute(r, "compute", 0.0, came) for r in order.ranks if came]
            if sharded and number < len(passes) - 1:
                came = [crew.all_gather(program, "weights", gathered / len(crew.ranks), starts)]
            last = scheme(program, order, work)
            if sharded and number >= len(layers):
                crew.all_gather(program, "gradients", reduced / len(crew.ranks), last)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Else Python walks millions of operations again and again, though all of them stay."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
