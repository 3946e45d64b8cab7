"""Which rank holds which part of a sequence: pure functions of (ranks, length).

Every placement cuts the sequence into chunks as equal as integers allow and deals them out:
`contiguous` one a rank in order, `zigzag` chunks r and 2P-1-r, `mirror` one a rank in an order
that turns into zigzag within each Ulysses group of an even number of ranks.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

PLACEMENTS = ("contiguous", "zigzag", "mirror")


class Segment(NamedTuple):
    """A half-open range of positions of the whole sequence."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """Tokens in it."""
        return self.stop - self.start


@dataclass(frozen=True)
class Placement:
    """The segments of every rank, each rank's in rising order."""

    segments: tuple[tuple[Segment, ...], ...]

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.segments)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each rank."""
        return tuple(sum(s.length for s in own) for own in self.segments)

    @cached_property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return sum(self.lengths)

    @cached_property
    def order(self) -> tuple[tuple[int, int], ...]:
        """(rank, index among its segments) of all segments from left to right."""
        named = [
            (segment, rank, index)
            for rank, own in enumerate(self.segments)
            for index, segment in enumerate(own)
        ]
        return tuple((rank, index) for _, rank, index in sorted(named))

    def owner(self, position: int) -> int:
        """The rank that holds a position."""
        for rank, own in enumerate(self.segments):
            if any(s.start <= position < s.stop for s in own):
                return rank
        raise ValueError(f"position {position} is outside of {self.length} tokens")

    def beside(self, rank: int, left: int, right: int) -> tuple[int, int]:
        """Tokens of others within so many left and right of each own segment, and own ones within
        as many of segments of others."""
        own, arriving, leaving = self.segments[rank], 0, 0
        for segment in own:
            before = Segment(max(0, segment.start - left), segment.start)
            after = Segment(segment.stop, min(self.length, segment.stop + right))
            for wanted in (before, after):
                arriving += wanted.length - sum(_overlap(wanted, held) for held in own)
            leaving += sum(
                _overlap(Segment(other.start - left, other.start), segment)
                + _overlap(Segment(other.stop, other.stop + right), segment)
                for other in self._near(rank, segment, left, right)
            )
        return arriving, leaving

    def _near(self, rank: int, held: Segment, left: int, right: int) -> Iterator[Segment]:
        """Segments of others that may have any of these tokens beside them."""
        least = held.start - right + 1
        first = bisect_left(self.order, least, key=lambda at: self.segments[at[0]][at[1]].stop)
        for place in range(first, len(self.order)):
            owner, index = self.order[place]
            segment = self.segments[owner][index]
            if segment.start >= held.stop + left:
                return
            if owner != rank:
                yield segment

    def merged(self, groups: tuple[tuple[int, ...], ...]) -> "Placement":
        """The placement in which each group of ranks acts as one; touching segments join."""
        return Placement(
            tuple(
                _join(sorted(s for rank in group for s in self.segments[rank])) for group in groups
            )
        )


def _overlap(left: Segment, right: Segment) -> int:
    return max(0, min(left.stop, right.stop) - max(left.start, right.start))


def _join(segments: list[Segment]) -> tuple[Segment, ...]:
    joined: list[Segment] = []
    for segment in segments:
        if joined and joined[-1].stop == segment.start:
            segment = Segment(joined.pop().start, segment.stop)
        joined.append(segment)
    return tuple(joined)


@lru_cache(maxsize=32)
def place(name: str, ranks: int, length: int, heads: int = 1) -> Placement:
    """The placement called `name`; `mirror` needs the size `heads` of a Ulysses group."""
    chunks_per_rank = 2 if name == "zigzag" else 1
    count = chunks_per_rank * ranks
    if length < count:
        raise ValueError(
            f"{length} tokens cannot be cut into {count} parts for {ranks} ranks ({name})"
        )
    edges = [i * length // count for i in range(count + 1)]
    chunks = [Segment(a, b) for a, b in zip(edges, edges[1:])]
    if name == "zigzag":
        return Placement(tuple((chunks[r], chunks[count - 1 - r]) for r in range(ranks)))
    if name == "mirror":
        return Placement(tuple((chunks[c],) for c in mirror_chunks(ranks, heads)))
    if name == "contiguous":
        return Placement(tuple((chunk,) for chunk in chunks))
    raise ValueError(f"no placement {name!r}; there are {', '.join(PLACEMENTS)}")


def mirror_chunks(ranks: int, heads: int) -> tuple[int, ...]:
    """The chunk of each rank j * heads + u, such that a Ulysses group j holds a zigzag pair."""
    if heads % 2 or ranks % heads:
        raise ValueError(f"mirror needs an even Ulysses group that divides {ranks}, not {heads}")
    half, rings = heads // 2, ranks // heads
    return tuple(
        j * half + u if u < half else (2 * rings - 1 - j) * half + (u - half)
        for j in range(rings)
        for u in range(heads)
    )
