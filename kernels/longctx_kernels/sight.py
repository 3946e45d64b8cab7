"""Who sees whom: lifetimes of keys, ranges of blocks that kernels go over, and lists of blocks."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

NEVER = 2**31 - 1
"""Expiry of a key that stays for ever."""


class Lists(NamedTuple):
    """Listed key blocks per plan and query block, first in the row, and the same by key block.

    `queries[offsets[plan * key_blocks + n] : offsets[... + 1]]` are the query blocks of block n.
    """

    keys_PML: Tensor
    counts_PM: Tensor
    offsets: Tensor
    queries: Tensor


@dataclass(frozen=True)
class Sight:
    """Who sees whom: int32 positions [T] and [U], rising; expiry None, [U] or [J, U].

    With `blocks` [1 or J, query blocks, L] (-1: no block) a query sees, of those keys, only ones
    in the key blocks listed for its own block of `block_size` queries.
    """

    query_positions: Tensor
    key_positions: Tensor
    expiry: Tensor | None = None
    blocks: Tensor | None = None
    block_size: int = 0
    _kept: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def is_by_head(self) -> bool:
        """Whether plans differ by key head."""
        return _has_heads(self.blocks) if self.blocks is not None else self.expires_by_head

    @property
    def expires_by_head(self) -> bool:
        """Whether key heads have expiries of their own."""
        return self.expiry is not None and self.expiry.dim() == 2

    def ranges(self, query_block: int, key_block: int) -> Tensor:
        """Per plan and query block, int32: sink start, stop; start, whole start, whole stop, stop.

        In units of key blocks. Whole ones are seen by all queries of the block.
        """
        key = ("ranges", query_block, key_block)
        if key not in self._kept:
            self._kept[key] = self._key_ranges(query_block, key_block)
        return self._kept[key]

    def block_expiry(self, key_block: int) -> Tensor:
        """Latest expiry in each key block, int32 [plans, key blocks]."""
        return self._expiries(key_block)[0]

    def transposed(self, query_block: int, key_block: int) -> Tensor:
        """Per plan and key block, int32: start, whole start, whole stop, stop in query blocks."""
        key = ("transposed", query_block, key_block)
        if key not in self._kept:
            self._kept[key] = self._query_ranges(query_block, key_block)
        return self._kept[key]

    def lists(self) -> Lists:
        """The listed blocks, without doubles, as kernels read them."""
        if "lists" not in self._kept:
            key_blocks = -(-len(self.key_positions) // self.block_size)
            self._kept["lists"] = _arrange_lists(self.blocks, key_blocks)
        return self._kept["lists"]

    def _expiries(self, key_block: int) -> tuple[Tensor, Tensor]:
        """Latest and earliest expiry per plan and key block."""
        key = ("expiries", key_block)
        if key not in self._kept:
            expiry = self.expiry
            if expiry is None:
                expiry = torch.full_like(self.key_positions, NEVER)
            expiry_PU = expiry.view(-1, len(self.key_positions))
            spare = -expiry_PU.shape[1] % key_block
            latest = F.pad(expiry_PU, (0, spare), value=-NEVER).unflatten(1, (-1, key_block))
            earliest = F.pad(expiry_PU, (0, spare), value=NEVER).unflatten(1, (-1, key_block))
            self._kept[key] = latest.amax(-1).contiguous(), earliest.amin(-1).contiguous()
        return self._kept[key]

    def _key_ranges(self, query_block: int, key_block: int) -> Tensor:
        p_first, p_last = _ends(self.query_positions, query_block)
        seen_by_last = torch.searchsorted(self.key_positions, p_last, right=True)
        seen_by_all = torch.searchsorted(self.key_positions, p_first, right=True)
        latest, earliest = self._expiries(key_block)
        p_first, p_last = (p.expand(latest.shape[0], -1) for p in (p_first, p_last))
        some = _Search(latest)
        every = _Search(earliest)
        stop = ((seen_by_last + key_block - 1) // key_block).expand_as(p_first)
        # The first run of blocks with a live key is apart from the rest if a dead block follows.
        sink_start = some.first(torch.zeros_like(stop), p_first, above=True).minimum(stop)
        sink_stop = some.first(sink_start, p_first, above=False).minimum(stop)
        start = some.first(sink_stop, p_first, above=True).minimum(stop)
        is_one_run = start >= stop
        start = torch.where(is_one_run, sink_start, start)
        stop = torch.where(is_one_run, sink_stop, stop)
        sink_stop = torch.where(is_one_run, sink_start, sink_stop)
        whole_start = every.first(start, p_last, above=True).minimum(stop)
        whole_stop = every.first(whole_start, p_last, above=False)
        whole_stop = whole_stop.minimum((seen_by_all // key_block).expand_as(stop)).minimum(stop)
        has_whole = whole_stop > whole_start
        whole_start, whole_stop = (
            torch.where(has_whole, x, start) for x in (whole_start, whole_stop)
        )
        fields = (sink_start, sink_stop, start, whole_start, whole_stop, stop)
        return torch.stack(fields, -1).to(torch.int32).contiguous()

    def _query_ranges(self, query_block: int, key_block: int) -> Tensor:
        c_first, c_last = _ends(self.key_positions, key_block)
        latest, earliest = self._expiries(key_block)
        start, after = (
            torch.searchsorted(self.query_positions, x).expand_as(latest) for x in (c_first, c_last)
        )
        stop, whole_stop = (torch.searchsorted(self.query_positions, x) for x in (latest, earliest))
        start, whole_stop = start // query_block, whole_stop // query_block
        # The last query block may be short; if all its queries see the keys it is masked anyway.
        stop = (stop + query_block - 1) // query_block
        stop = torch.maximum(start, stop)
        whole_start = (after + query_block - 1) // query_block
        has_whole = whole_stop > whole_start
        whole_start, whole_stop = (
            torch.where(has_whole, x, start) for x in (whole_start, whole_stop)
        )
        fields = (start, whole_start, whole_stop, stop)
        return torch.stack(fields, -1).to(torch.int32).contiguous()


def _has_heads(x: Tensor) -> bool:
    return x.shape[0] > 1


def _ends(positions: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """First and last position of each block."""
    count = len(positions)
    first = torch.arange(0, count, block, device=positions.device)
    return positions[first], positions[(first + block - 1).clamp(max=count - 1)]


class _Search:
    """Finds, in rows of values [P, N], the first from an index on that is (not) above a bound.

    `levels[s]` holds the largest and the smallest of each run of 2^s values.
    """

    def __init__(self, values_PN: Tensor):
        self.count = values_PN.shape[1]
        self.levels = [(values_PN, values_PN)]
        for step in range((self.count - 1).bit_length()):
            largest, smallest = self.levels[-1]
            nxt = (torch.arange(self.count, device=values_PN.device) + 2**step).clamp(
                max=self.count - 1
            )
            self.levels.append(
                (largest.maximum(largest[:, nxt]), smallest.minimum(smallest[:, nxt]))
            )

    def first(self, start_PM: Tensor, bound_PM: Tensor, above: bool) -> Tensor:
        """Index >= start of the first value above (or not above) the bound; N if none is."""
        index = start_PM.clone()
        for step in range(len(self.levels) - 1, -1, -1):
            largest, smallest = self.levels[step]
            at = index.clamp(max=self.count - 1)
            # A run in which none qualifies is jumped over.
            if above:
                is_jumped = largest.gather(1, at) <= bound_PM
            else:
                is_jumped = smallest.gather(1, at) > bound_PM
            index = torch.where(is_jumped & (index < self.count), index + 2**step, index)
        return index.clamp(max=self.count)


def _arrange_lists(blocks_PML: Tensor, key_blocks: int) -> Lists:
    P, M, L = blocks_PML.shape
    is_real = (blocks_PML >= 0) & (blocks_PML < key_blocks)
    keys = blocks_PML.masked_fill(~is_real, key_blocks).sort(-1)[0]
    # A block listed twice counts once.
    is_double = F.pad(keys[..., 1:] == keys[..., :-1], (1, 0), value=False)
    keys = keys.masked_fill(is_double, key_blocks).sort(-1)[0].to(torch.int32).contiguous()
    is_real = keys < key_blocks
    plan = torch.arange(P, device=keys.device)[:, None, None]
    owners = (plan * key_blocks + keys).masked_fill(~is_real, P * key_blocks).flatten()
    owners, order = owners.sort(stable=True)
    bounds = torch.arange(P * key_blocks + 1, device=keys.device)
    offsets = torch.searchsorted(owners, bounds).to(torch.int32)
    queries = (order // L % M).to(torch.int32)
    return Lists(keys, is_real.sum(-1, dtype=torch.int32), offsets, queries)
