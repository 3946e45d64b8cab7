"""Ulysses: trades a part of the sequence with all heads for the whole of it with some heads."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from longctx.sequence.communicator import Communicator
from longctx.sequence.ledger import Label
from longctx.sequence.plan import Plan


@dataclass(frozen=True)
class HeadTrade:
    """A group of `communicator.size` ranks, of which `members` are the numbers in the plan."""

    plan: Plan
    members: tuple[int, ...]
    communicator: Communicator
    label: Label

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of a row on each member."""
        return [self.plan.placement.lengths[rank] for rank in self.members]

    @cached_property
    def order(self) -> Tensor:
        """Sorts the members' tokens, laid end to end, by position."""
        segments = (s for rank in self.members for s in self.plan.placement.segments[rank])
        return torch.cat([torch.arange(s.start, s.stop) for s in segments]).argsort()

    def gather_tokens(self, x_BTHD: Tensor) -> Tensor:
        """All members' tokens in rising order, with this rank's share of the heads."""
        return _Trade.apply(x_BTHD, self, True)

    def gather_heads(self, x_BTHD: Tensor) -> Tensor:
        """The way back: this rank's tokens with all heads."""
        return _Trade.apply(x_BTHD, self, False)

    def gather_gates(self, *gates: Tensor | None) -> list[Tensor | None]:
        """`gather_tokens` of gates `[B, T, H]` and `[B, T, H, K]` by one exchange."""
        wide = [x[..., None] if x.ndim == 3 else x for x in gates if x is not None]
        dtype = max((x.dtype for x in wide), key=lambda dtype: dtype.itemsize)
        traded = self.gather_tokens(torch.cat([x.to(dtype) for x in wide], -1))
        parts = iter(traded.split([x.shape[-1] for x in wide], -1))
        return [
            None if x is None else next(parts)[..., 0] if x.ndim == 3 else next(parts)
            for x in gates
        ]

    def share(self, x: Tensor, dim: int) -> Tensor:
        """This rank's heads of a tensor that every rank has."""
        return x.chunk(self.communicator.size, dim)[self.communicator.rank]

    def repeated(self, x_BTJD: Tensor) -> Tensor:
        """Key heads repeated until each member can have one."""
        size, heads = self.communicator.size, x_BTJD.shape[2]
        return x_BTJD if heads % size == 0 else x_BTJD.repeat_interleave(size // heads, 2)


def _to_tokens(x_BTHD: Tensor, trade: HeadTrade, label: Label) -> Tensor:
    B, _, H, D = x_BTHD.shape
    parts = [part.contiguous() for part in x_BTHD.chunk(trade.communicator.size, 2)]
    shapes = [(B, n, H // trade.communicator.size, D) for n in trade.lengths]
    arrived = trade.communicator.all_to_all(parts, shapes, label).wait()
    return torch.cat(arrived, 1)[:, trade.order.to(x_BTHD.device)]


def _to_heads(x_BGHD: Tensor, trade: HeadTrade, label: Label) -> Tensor:
    B, _, H, D = x_BGHD.shape
    by_member = x_BGHD[:, trade.order.argsort().to(x_BGHD.device)]
    parts = [part.contiguous() for part in by_member.split(trade.lengths, 1)]
    own = trade.lengths[trade.communicator.rank]
    shapes = [(B, own, H, D)] * trade.communicator.size
    return torch.cat(trade.communicator.all_to_all(parts, shapes, label).wait(), 2)


class _Trade(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, trade: HeadTrade, to_tokens: bool) -> Tensor:
        ctx.trade, ctx.to_tokens = trade, to_tokens
        return (_to_tokens if to_tokens else _to_heads)(x, trade, trade.label)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        back = _to_heads if ctx.to_tokens else _to_tokens
        return back(dout, ctx.trade, ctx.trade.label.reversed()), None, None
