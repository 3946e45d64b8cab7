"""Matrices that are needed whole for a moment: how processes hold them, who takes which, and what
travels for that. Nothing here talks to others."""

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from longctx.parallel.shares import Cut, share
from longctx.sequence.ledger import Traffic

Round = list[list[int]]
"""Numbers of the matrices that each process takes at a time."""


class Seat(NamedTuple):
    """A process among those that hold one copy of the weights together: `shards` with different
    tokens, each of which are `tp` neighbours that share heads."""

    shards: int
    tp: int
    index: int

    @property
    def size(self) -> int:
        """Processes of the group."""
        return self.shards * self.tp

    @property
    def shard(self) -> int:
        """Its number among those with different tokens."""
        return self.index // self.tp

    @property
    def part(self) -> int:
        """Its number among those that share heads."""
        return self.index % self.tp

    def at(self, index: int) -> "Seat":
        """Another seat of the group."""
        return self._replace(index=index)


@dataclass(frozen=True)
class Matrix:
    """A weight that is one matrix or several, and how the seats of a group hold it."""

    shape: tuple[int, ...]
    """Of the whole; of three dimensions each slice is a matrix."""
    sizes: tuple[int, ...]
    """Of the matrices side by side in its first dimension."""
    cut: int | None
    """The dimension along which seats with the same tokens share it."""
    is_sharded: bool
    """Whether seats with different tokens share its rows."""

    @property
    def numel(self) -> int:
        """Elements of the whole."""
        return math.prod(self.shape)

    @property
    def cost(self) -> int:
        """Grows like the time of Newton-Schulz iterations."""
        *slices, rows, columns = self.shape
        sides = [(rows, columns)] * self.shape[0] if slices else [(n, columns) for n in self.sizes]
        return sum(min(pair) ** 2 * (2 * max(pair) + min(pair)) for pair in sides)

    def _cut(self, seat: Seat) -> Cut:
        if self.cut is None or seat.tp == 1:
            return Cut(self.shape)
        stretches, before = [], 0
        for size in self.sizes if self.cut == 0 else (self.shape[self.cut],):
            start, length = share(size, seat.part, seat.tp)
            stretches.append((before + start, length))
            before += size
        return Cut(self.shape, self.cut, tuple(stretches))

    def _rows(self, seat: Seat) -> tuple[int, tuple[int, ...]]:
        """Where in the part of its heads the rows of a seat start, and the shape that it holds."""
        cut, shape = self._cut(seat), list(self.shape)
        if cut.dim is not None:
            shape[cut.dim] = sum(length for _, length in cut.stretches)
        if not self.is_sharded:
            return 0, tuple(shape)
        rows = -(-shape[0] // seat.shards)
        start = min(shape[0], rows * seat.shard)
        return start, (min(rows, shape[0] - start), *shape[1:])

    def held(self, seat: Seat) -> tuple[int, ...]:
        """The shape of what a seat holds of it."""
        return self._rows(seat)[1]

    def sends(self, seat: Seat, owner: Seat) -> bool:
        """Whether it is this seat that brings what it holds to the owner; of copies, only the one
        nearest to it."""
        same_rows = self.is_sharded or seat.shard == owner.shard
        return same_rows and (self.cut is not None or seat.part == owner.part)

    def pieces(self, whole: Tensor, seat: Seat, held: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of the whole, and of what a seat holds, that stand for the same elements."""
        start, shape = self._rows(seat)
        offsets = (start,) + (0,) * (len(shape) - 1)
        for where, block in self._cut(seat).blocks(offsets, held.view(shape)):
            yield whole[tuple(slice(a, a + n) for a, n in zip(where, block.shape))], block


def spread(
    whole: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    cuts: Mapping[str, Cut] | None,
    is_sharded: bool,
) -> list[Matrix]:
    """Matrices of these (shape, sizes) under an engine that shards rows, or not, and the cuts of
    tensor parallelism, if there are any."""
    return [
        Matrix(shape, sizes, cuts[name].dim if cuts else None, is_sharded)
        for name, (shape, sizes) in whole.items()
    ]


def deal(matrices: Sequence[Matrix], size: int) -> list[Round]:
    """Deals matrices to `size` processes, the costliest first and each to whoever has least to do.

    Nobody takes more elements at a time than the largest matrix has.
    """
    owned: list[list[int]] = [[] for _ in range(size)]
    load = [(0, process) for process in range(size)]
    for number in sorted(range(len(matrices)), key=lambda i: (-matrices[i].cost, i)):
        cost, least = load[0]
        owned[least].append(number)
        heapq.heapreplace(load, (cost + matrices[number].cost, least))
    largest = max((matrix.numel for matrix in matrices), default=0)
    taken = [_fill([(i, matrices[i].numel) for i in own], largest) for own in owned]
    rounds = max((len(bundles) for bundles in taken), default=0)
    return [[b[r] if r < len(b) else [] for b in taken] for r in range(rounds)]


def _fill(numbered: list[tuple[int, int]], most: int) -> list[list[int]]:
    """Bundles of at most so many elements, in order."""
    bundles: list[list[int]] = []
    room = -1
    for number, numel in numbered:
        if not bundles or numel > room:
            bundles.append([])
            room = most
        bundles[-1].append(number)
        room -= numel
    return bundles


def matrices_traffic(matrices: Sequence[Matrix], seat: Seat, dtype: torch.dtype) -> Traffic:
    """Calls of one seat to bring every matrix to its owner and back, and the bytes that arrive."""
    if seat.size == 1:
        return Traffic(0, 0)
    rounds, arriving = deal(matrices, seat.size), 0
    for owners in rounds:
        for owner, numbers in enumerate(owners):
            for matrix in (matrices[i] for i in numbers):
                held = math.prod(matrix.held(seat))
                arriving += matrix.numel - held if owner == seat.index else held
    return Traffic(2 * len(rounds), arriving * dtype.itemsize)
