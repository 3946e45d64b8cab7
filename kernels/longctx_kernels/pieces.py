"""Pieces: the independent token ranges of a batch, as host-side plans of tiles."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


def piece_cuts(batch: int, length: int, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    """Cuts of the flattened `batch * length` tokens into pieces; checks `cu_seqlens`."""
    if length < 1:
        raise ValueError(f"q must hold at least one token, got T = {length}")
    if cu_seqlens is None:
        return tuple(range(0, batch * length + 1, length))
    cuts = tuple(cu_seqlens.tolist())
    if batch != 1:
        raise ValueError(f"cu_seqlens needs B = 1 (flatten the batch), got B = {batch}")
    if cuts[0] != 0 or cuts[-1] != length or any(a >= b for a, b in zip(cuts, cuts[1:])):
        raise ValueError(f"cu_seqlens must rise strictly from 0 to T = {length}, got {cuts}")
    return cuts


@dataclass(frozen=True)
class Chunk:
    """At most C consecutive tokens of one piece."""

    start: int
    length: int
    piece: int
    first: bool
    last: bool


@dataclass(frozen=True)
class Slab:
    """Consecutive chunks that are worked on together, small enough to stay in cache."""

    chunks: tuple[Chunk, ...]
    chunk_size: int

    @property
    def start(self) -> int:
        return self.chunks[0].start

    @property
    def stop(self) -> int:
        return self.chunks[-1].start + self.chunks[-1].length

    @property
    def is_full(self) -> bool:
        return self.stop - self.start == len(self.chunks) * self.chunk_size

    def rows(self) -> Tensor:
        """For each padded row its token within the slab, or -1 for padding."""
        starts = torch.tensor([c.start - self.start for c in self.chunks])
        lengths = torch.tensor([c.length for c in self.chunks])
        offsets = torch.arange(self.chunk_size)
        rows = starts[:, None] + offsets
        return rows.masked_fill(offsets >= lengths[:, None], -1).flatten()

    def load(self, x_THD: Tensor, dtype: torch.dtype) -> Tensor:
        """The slab's tokens as `[chunks, H, C, D]`, zeros where a chunk is short."""
        x = x_THD[self.start : self.stop].to(dtype)
        if not self.is_full:
            rows = self.rows().to(x.device)
            x = x[rows.clamp(min=0)] * (rows >= 0)[:, None, None]
        return x.view(len(self.chunks), self.chunk_size, *x.shape[1:]).transpose(1, 2).contiguous()

    def store(self, out_THD: Tensor, x_NHCD: Tensor) -> None:
        """Writes `[chunks, H, C, D]` back to the slab's tokens."""
        x = x_NHCD.transpose(1, 2)
        x = x.reshape(-1, *x.shape[2:])
        if not self.is_full:
            x = x[(self.rows() >= 0).to(x.device)]
        out_THD[self.start : self.stop] = x


@lru_cache(maxsize=64)
def plan_slabs(cuts: tuple[int, ...], chunk_size: int, slab_tokens: int) -> tuple[Slab, ...]:
    """Cuts pieces into chunks of at most `chunk_size` tokens and groups these into slabs."""
    chunks = [
        Chunk(
            start, min(chunk_size, stop - start), piece, start == begin, start + chunk_size >= stop
        )
        for piece, (begin, stop) in enumerate(zip(cuts, cuts[1:]))
        for start in range(begin, stop, chunk_size)
    ]
    per_slab = max(1, slab_tokens // chunk_size)
    return tuple(
        Slab(tuple(chunks[i : i + per_slab]), chunk_size) for i in range(0, len(chunks), per_slab)
    )
