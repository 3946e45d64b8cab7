"""Which share of a layer's heads, columns or rows a process of tensor parallelism has; nothing here
talks to others."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.mixers import MixerConfig
from longctx.sequence.sharded import Transports


def refuse_tp(mixer: MixerConfig, width: int, tp: int, transports: Transports) -> str:
    """Why `tp` processes cannot share a layer's heads, and what would work; empty if they can."""
    if tp == 1:
        return ""
    if reason := mixer.tp_refusal(tp):
        return reason
    reason = mixer.over_tp(width, tp).refusal(transports)
    return reason and f"of the heads that parallel.tp = {tp} leaves to a process, {reason}"


def share(size: int, part: int, parts: int) -> tuple[int, int]:
    """Where one of `parts` nearly equal parts of `size` starts, and its length."""
    start = size * part // parts
    return start, size * (part + 1) // parts - start


@dataclass(frozen=True)
class Cut:
    """How the part of a tensor that a process has lies in the whole tensor."""

    shape: tuple[int, ...]
    """Of the whole."""
    dim: int | None = None
    """Along which it is cut; None has all of it."""
    stretches: tuple[tuple[int, int], ...] = ()
    """Starts in the whole and lengths of what the part is made of, in order."""

    def take(self, whole: Tensor) -> Tensor:
        """The part, in memory of its own."""
        if self.dim is None:
            return whole.clone()
        return torch.cat([whole.narrow(self.dim, *stretch) for stretch in self.stretches], self.dim)

    def blocks(
        self, offsets: tuple[int, ...], local: Tensor
    ) -> list[tuple[tuple[int, ...], Tensor]]:
        """Offsets in the whole, and views of `local`, which lies at `offsets` of the part: a block
        for each stretch that it has something of."""
        if self.dim is None:
            return [(offsets, local)]
        found, before = [], 0
        first, last = offsets[self.dim], offsets[self.dim] + local.shape[self.dim]
        for start, length in self.stretches:
            low, high = max(first, before), min(last, before + length)
            if low < high:
                where = list(offsets)
                where[self.dim] = start + low - before
                view = local.narrow(self.dim, low - first, high - low)
                found.append((tuple(where), view))
            before += length
        return found


def cut_to(
    whole: tuple[int, ...], part: tuple[int, ...], where: tuple[int, int], sizes: tuple[int, ...]
) -> Cut:
    """The cut that makes the shape `part` of `whole`, for share `where[0]` of `where[1]`.

    It is along the dimension in which they differ, if any; the first consists of tensors of these
    `sizes` side by side, each of which is shared.
    """
    differing = [d for d, (a, b) in enumerate(zip(whole, part, strict=True)) if a != b]
    if not differing:
        return Cut(whole)
    (dim,) = differing
    if dim != 0 or not sizes:
        sizes = (whole[dim],)
    stretches, before = [], 0
    for size in sizes:
        start, length = share(size, *where)
        stretches.append((before + start, length))
        before += size
    assert before == whole[dim], f"stretches {sizes} of {whole}"
    assert sum(length for _, length in stretches) == part[dim], f"{part} is no share of {whole}"
    return Cut(whole, dim, tuple(stretches))
