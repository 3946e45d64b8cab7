"""Lists of key blocks that each query has for itself, and the same by key block."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Selection(NamedTuple):
    """Who sees whom: distinct blocks in rising order, then the number of blocks where none is."""

    blocks_NJL: Tensor
    query_positions_N: Tensor
    key_positions_U: Tensor
    block_size: int

    @property
    def key_blocks(self) -> int:
        """How many blocks the keys make."""
        return len(self.key_positions_U) // self.block_size

    def counts(self) -> Tensor:
        """How many blocks each query lists, int32 [N, J]."""
        return (self.blocks_NJL < self.key_blocks).sum(-1, dtype=torch.int32)

    def by_block(self) -> tuple[Tensor, Tensor]:
        """(offsets, queries), int32: `queries[offsets[j * key_blocks + n] : offsets[... + 1]]`
        list block n in key head j, in rising order.
        """
        _, J, L = self.blocks_NJL.shape
        last, blocks_NJL = self.key_blocks, self.blocks_NJL
        heads_J1 = torch.arange(J, dtype=torch.int32, device=blocks_NJL.device)[:, None]
        owners = torch.where(blocks_NJL < last, heads_J1 * last + blocks_NJL, J * last)
        owners, order = owners.flatten().sort(stable=True)
        bounds = torch.arange(J * last + 1, dtype=torch.int32, device=owners.device)
        offsets = torch.searchsorted(owners, bounds, out_int32=True)
        return offsets, (order // (J * L)).to(torch.int32)


def shared_out(offsets: Tensor, chunk: int, parts: int) -> tuple[Tensor, Tensor]:
    """Which block each part is of, and each block's first part, int32; as `by_block` numbers them.

    Parts are the chunks of queries behind the first chunk of each block; a part may be of none.
    """
    more = (offsets.diff() - 1).clamp(min=0) // chunk
    firsts = F.pad(more.cumsum(0, dtype=torch.int32), (1, 0))
    numbers = torch.arange(parts, dtype=torch.int32, device=offsets.device)
    return torch.searchsorted(firsts[1:], numbers, right=True, out_int32=True), firsts


def listed_once(blocks_NJL: Tensor, key_blocks: int) -> Tensor:
    """Lists as a `Selection` has them, int32, of lists in any order with -1 for no block."""
    is_real = (blocks_NJL >= 0) & (blocks_NJL < key_blocks)
    blocks_NJL = blocks_NJL.masked_fill(~is_real, key_blocks).sort(-1)[0]
    is_double = F.pad(blocks_NJL[..., 1:] == blocks_NJL[..., :-1], (1, 0), value=False)
    blocks_NJL = blocks_NJL.masked_fill(is_double, key_blocks).sort(-1)[0]
    return blocks_NJL.to(torch.int32).contiguous()
