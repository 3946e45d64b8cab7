"""Who sees whom, by position within a document: lifetimes of keys, and patterns of blocks.

A policy has one pattern for all heads, or one for each key head. Every one is causal.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

FOREVER = 2**62
"""Expiry of a key that stays."""


@dataclass(frozen=True)
class Policy(ABC):
    """Base of all; equal ones are interchangeable."""

    @property
    def patterns(self) -> int:
        """How many heads differ, 1 if none do."""
        return 1

    @abstractmethod
    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether queries at these positions see keys at those, `[patterns, ...]`."""

    @abstractmethod
    def wanted(self, start: int, stop: int) -> Tensor:
        """Which keys before `start` any query in start..stop sees, `[patterns, start]`."""

    @abstractmethod
    def counts(self, length: int) -> Tensor:
        """How many keys each query of a document sees, `[patterns, length]`."""


class Lifetime(Policy):
    """Every key is seen from its own position on until it expires, once and for all."""

    @abstractmethod
    def expiry(self, key: Tensor) -> Tensor:
        """The first position from which a key is not seen, `[patterns, ...]`."""

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        query, key = torch.broadcast_tensors(query, key)
        return (key <= query) & (query < self.expiry(key))

    def wanted(self, start: int, stop: int) -> Tensor:
        return self.expiry(torch.arange(start)) > start

    def lasting(self, start: int, stop: int) -> int:
        """How many keys of start..stop a query at `stop` sees, over all patterns."""
        return int((self.expiry(torch.arange(start, stop)) > stop).sum())

    def outliving(self, start: int, stop: int, positions: Tensor) -> int:
        """How many keys of start..stop a query at each of these rising positions behind them sees,
        over all patterns and positions."""
        return int(torch.searchsorted(positions, self.expiry(torch.arange(start, stop))).sum())

    def counts(self, length: int) -> Tensor:
        deaths = self.expiry(torch.arange(length)).clamp(max=length)
        changes = torch.ones(self.patterns, length + 1, dtype=torch.int64)
        changes.scatter_add_(1, deaths, -torch.ones_like(deaths))
        return changes[:, :length].cumsum(1)


@dataclass(frozen=True)
class Full(Lifetime):
    """Everything before a query."""

    def expiry(self, key: Tensor) -> Tensor:
        return torch.full((1, *key.shape), FOREVER)

    def lasting(self, start: int, stop: int) -> int:
        return stop - start

    def outliving(self, start: int, stop: int, positions: Tensor) -> int:
        return (stop - start) * len(positions)


@dataclass(frozen=True)
class Window(Lifetime):
    """The last `size` keys, the query's own included, and the first `sinks` of the document."""

    size: int
    sinks: int = 0

    def expiry(self, key: Tensor) -> Tensor:
        return torch.where(key < self.sinks, FOREVER, key + self.size)[None]

    def lasting(self, start: int, stop: int) -> int:
        near = max(start, self.sinks, stop - self.size + 1)
        return max(0, min(stop, self.sinks) - start) + max(0, stop - near)

    def outliving(self, start: int, stop: int, positions: Tensor) -> int:
        near = (positions - self.size + 1).clamp(min=max(start, self.sinks))
        staying = max(0, min(stop, self.sinks) - start)
        return staying * len(positions) + int((stop - near).clamp(min=0).sum())


@dataclass(frozen=True)
class Neighbourhood(Lifetime):
    """Windows that move on by `stride` tokens at a time: `size` keys up to the end of the step that
    a query is in, of which it sees those before it."""

    size: int
    stride: int

    def expiry(self, key: Tensor) -> Tensor:
        return ((key + self.size) // self.stride * self.stride)[None]


@dataclass(frozen=True)
class Fixed(Lifetime):
    """The query's own block, and `columns` summary tokens of every block before it.

    Of `verticals` choices of columns, counted from the end of a block, heads take one in turn.
    """

    block: int
    columns: int
    verticals: int = 1
    heads: int = 1
    first: int = 0
    """The number of the first of the heads, where others have those before."""

    @property
    def patterns(self) -> int:
        return self.heads if self.verticals > 1 else 1

    def expiry(self, key: Tensor) -> Tensor:
        heads = self.first + torch.arange(self.patterns).view(-1, *(1,) * key.dim())
        heads = heads % self.verticals
        from_end = self.block - 1 - key % self.block
        stays = from_end // self.columns == heads
        return torch.where(stays, FOREVER, (key // self.block + 1) * self.block)


@dataclass(frozen=True)
class Sharded(Lifetime):
    """S2-Attention: `local` blocks, and every `stride`-th block of all before, another a head.

    The first `dense_heads` see everything. Heads together see all blocks if `covers`.
    """

    block: int
    local: int
    stride: int
    heads: int
    dense_heads: int = 0
    part: int = 0
    """Which of `parts` equal shares of the heads these are."""
    parts: int = 1

    @property
    def patterns(self) -> int:
        return self.heads // self.parts

    @property
    def step(self) -> int:
        """By how many blocks the shards of two neighbouring heads differ."""
        return max(1, self.stride // max(1, self.heads - self.dense_heads))

    @property
    def covers(self) -> bool:
        """Whether every block is in the shard of some head."""
        return self.dense_heads > 0 or self.heads * self.step >= self.stride

    def expiry(self, key: Tensor) -> Tensor:
        first, stop = self.patterns * self.part, self.patterns * (self.part + 1)
        head = torch.arange(first, stop).view(-1, *(1,) * key.dim())
        block = key // self.block
        stays = (block + (head - self.dense_heads) * self.step) % self.stride == 0
        stays = stays | (head < self.dense_heads)
        return torch.where(stays, FOREVER, (block + self.local) * self.block)


@dataclass(frozen=True)
class BlockPattern(Policy):
    """Blocks of queries see blocks of keys, and the tokens before them in their own block."""

    block: int

    @abstractmethod
    def blocks_of(self, query_block: int) -> list[int]:
        """The key blocks that a block sees, rising; its own is the last."""

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        blocks = int(torch.as_tensor(query).max()) // self.block + 1
        table = torch.zeros(blocks, blocks, dtype=torch.bool)
        for number in range(blocks):
            table[number, self.blocks_of(number)] = True
        query_block, key_block = torch.broadcast_tensors(query // self.block, key // self.block)
        listed = table[query_block, key_block.clamp(max=blocks - 1)]
        return (listed & (key <= query))[None]

    def wanted(self, start: int, stop: int) -> Tensor:
        wanted = torch.zeros(-(-stop // self.block), dtype=torch.bool)
        for number in range(start // self.block, len(wanted)):
            wanted[self.blocks_of(number)] = True
        return wanted.repeat_interleave(self.block)[None, :start]

    def counts(self, length: int) -> Tensor:
        earlier = [len(self.blocks_of(n)) - 1 for n in range(-(-length // self.block))]
        before = torch.tensor(earlier).repeat_interleave(self.block)[:length] * self.block
        return (before + torch.arange(length) % self.block + 1)[None]


@dataclass(frozen=True)
class Power(BlockPattern):
    """PowerAttention: `window` blocks, blocks at distances of a power of two, and `sinks` blocks.

    With shards of a power of two blocks each in order, what lies before a shard and is seen from it
    are the whole shards at distances of a power of two, if the window is not longer than a shard.
    """

    window: int
    sinks: int = 0

    def blocks_of(self, query_block: int) -> list[int]:
        powers = (2**i for i in range(query_block.bit_length()))
        distances = {*range(min(self.window, query_block + 1)), *powers}
        sinks = range(min(self.sinks, query_block + 1))
        return sorted({query_block - d for d in distances if d <= query_block} | set(sinks))


@dataclass(frozen=True)
class Strided(BlockPattern):
    """The last `local` blocks, and of those before every one whose distance is a multiple of
    `stride`; blocks of one token are the Sparse Transformer's."""

    local: int
    stride: int

    def blocks_of(self, query_block: int) -> list[int]:
        near = range(max(0, query_block - self.local + 1), query_block + 1)
        far = range(query_block % self.stride, query_block, self.stride)
        return sorted({*near, *far})
