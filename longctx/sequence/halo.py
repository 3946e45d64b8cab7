"""Neighbouring tokens: each segment with what lies just left and right of it, wherever it is."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from longctx_kernels.keeping import recalled_later
from torch import Tensor

from longctx.sequence.communicator import Communicator
from longctx.sequence.ledger import Label
from longctx.sequence.placement import Segment
from longctx.sequence.plan import Plan


@dataclass(frozen=True)
class HaloPlan:
    """Routes for `left` and `right` neighbours; the result of a rank has, for each row and segment,
    `left` tokens, its own and `right` tokens, zeros where the sequence has none."""

    plan: Plan
    left: int
    right: int

    @property
    def length(self) -> int:
        """Tokens of the result, all rows end to end."""
        plan = self.plan
        return plan.rows * (plan.length + len(plan.segments) * (self.left + self.right))

    def offset(self, row: int, segment: int) -> int:
        """Place of a segment's first own token in the result."""
        plan, extra = self.plan, self.left + self.right
        before = sum(s.length for s in plan.segments[:segment])
        row_length = plan.length + len(plan.segments) * extra
        return row * row_length + before + segment * extra + self.left

    @cached_property
    def own(self) -> Tensor:
        """Place in the result of every local token."""
        plan = self.plan
        return torch.cat(
            [
                torch.arange(segment.length) + self.offset(row, index)
                for row in range(plan.rows)
                for index, segment in enumerate(plan.segments)
            ]
        )

    @cached_property
    def arriving(self) -> dict[int, Tensor]:
        """By rank that holds them: places in the result of this rank's neighbours."""
        plan = self.plan
        places: dict[int, list[Tensor]] = {}
        for row in range(plan.rows):
            for index, segment in enumerate(plan.segments):
                shift = self.offset(row, index) - segment.start
                for wanted in self._wanted(plan.rank, index):
                    for rank, own in enumerate(plan.placement.segments):
                        for held in own:
                            found = torch.arange(*_overlap(wanted, held)) + shift
                            places.setdefault(rank, []).append(found)
        return _joined(places)

    @cached_property
    def leaving(self) -> dict[int, Tensor]:
        """By rank that wants them: local tokens, in the order in which it lists them."""
        plan = self.plan
        tokens: dict[int, list[Tensor]] = {}
        for row in range(plan.rows):
            for rank, own in enumerate(plan.placement.segments):
                for index in range(len(own)):
                    for wanted in self._wanted(rank, index):
                        before = row * plan.length
                        for held in plan.segments:
                            found = torch.arange(*_overlap(wanted, held)) + before - held.start
                            tokens.setdefault(rank, []).append(found)
                            before += held.length
        return _joined(tokens)

    def _wanted(self, rank: int, index: int) -> tuple[Segment, Segment]:
        """The neighbours of a rank's segment, where the sequence has them."""
        placement = self.plan.placement
        segment = placement.segments[rank][index]
        return (
            Segment(max(0, segment.start - self.left), segment.start),
            Segment(segment.stop, min(placement.length, segment.stop + self.right)),
        )


def _overlap(left: Segment, right: Segment) -> Segment:
    start = max(left.start, right.start)
    return Segment(start, max(start, min(left.stop, right.stop)))


def _joined(parts: dict[int, list[Tensor]]) -> dict[int, Tensor]:
    joined = {rank: torch.cat(found) for rank, found in sorted(parts.items())}
    return {rank: found for rank, found in joined.items() if len(found)}


class Halo(torch.autograd.Function):
    """`[M, ...]` local tokens to `[HaloPlan.length, ...]`; gradients go home and are added."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, halo: HaloPlan, communicator: Communicator, label: Label
    ) -> Tensor:
        ctx.halo, ctx.communicator, ctx.label = halo, communicator, label
        out = x.new_zeros(halo.length, *x.shape[1:])
        out[halo.own.to(x.device)] = x
        me = halo.plan.rank
        sends = [(r, x[i.to(x.device)]) for r, i in halo.leaving.items() if r != me]
        wires = [(r, (len(i), *x.shape[1:])) for r, i in halo.arriving.items() if r != me]
        arrived = recalled_later(lambda: communicator.exchange(sends, wires, x, label).wait)
        if me in halo.arriving:
            out[halo.arriving[me].to(x.device)] = x[halo.leaving[me].to(x.device)]
        for (rank, _), part in zip(wires, arrived()):
            out[halo.arriving[rank].to(x.device)] = part
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None, None]:
        halo, me = ctx.halo, ctx.halo.plan.rank
        wide = dout.to(torch.promote_types(dout.dtype, torch.float32))
        dx = wide[halo.own.to(dout.device)]
        sends = [(r, wide[i.to(dout.device)]) for r, i in halo.arriving.items() if r != me]
        wires = [(r, (len(i), *dout.shape[1:])) for r, i in halo.leaving.items() if r != me]
        pending = ctx.communicator.exchange(sends, wires, wide, ctx.label.reversed())
        if me in halo.leaving:
            dx.index_add_(0, halo.leaving[me].to(dx.device), wide[halo.arriving[me].to(dx.device)])
        for (rank, _), part in zip(wires, pending.wait()):
            dx.index_add_(0, halo.leaving[rank].to(dx.device), part)
        return dx.to(dout.dtype), None, None, None
