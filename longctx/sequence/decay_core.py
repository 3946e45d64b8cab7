"""Linear attention with constant decay over a sharded sequence, scheduled by hand.

Forward: state pass, launch, local work from zero states, wait, what the incoming state adds. The
backward pass mirrors it. Only the state that crosses a cut is communicated.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from longctx_kernels import decay_attention as op
from torch import Tensor

from longctx.sequence.affine import Prefix, Transitions, constant_transitions
from longctx.sequence.ledger import Label
from longctx.sequence.plan import Piece, Plan


def sharded_decay_attention(
    operands: tuple[Tensor, Tensor, Tensor],
    log_decay_H: Tensor | None,
    plan: Plan,
    make_prefix: Callable[[Transitions], Prefix],
    label: Label,
) -> Tensor:
    """q, k, v `[M, H, D]`, the plan's local tokens; scale 1."""
    q_MHK = operands[0]
    dtype = torch.promote_types(q_MHK.dtype, torch.float32)
    if log_decay_H is None:
        log_decay_H = torch.zeros(q_MHK.shape[1], device=q_MHK.device)
    g_H = log_decay_H.detach().to(dtype)
    prefix = make_prefix(constant_transitions(plan, g_H))
    return _DecayCore.apply(*operands, g_H, _Exchange(plan, prefix, label))


class _Exchange(NamedTuple):
    plan: Plan
    prefix: Prefix
    label: Label


class _DecayCore(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g_H: Tensor, exchange: _Exchange
    ) -> Tensor:
        plan, prefix, label = exchange
        entering, leaving = _edges(plan)
        added = g_H.new_zeros(len(plan.segments), plan.rows, q.shape[1], q.shape[2], v.shape[2])
        with torch.autocast(q.device.type, enabled=False):
            for p in leaving:
                added[p.segment, p.row] = op.final_state(
                    k[p.start : p.stop], v[p.start : p.stop], g_H
                )
            finish = prefix.rightwards(added, label)
            out, boundary, _ = op.decay_forward((q, k, v, g_H), 1.0, plan.cuts)
            states = finish()
            for p in entering:
                rows = slice(p.start, p.stop)
                out[rows] += op.read_state(q[rows], states[p.segment, p.row], g_H, 1.0).to(
                    out.dtype
                )
        ctx.save_for_backward(q, k, v, g_H, boundary, states)
        ctx.exchange = exchange
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        q, k, v, g_H, boundary, states = ctx.saved_tensors
        plan, prefix, label = ctx.exchange
        entering, leaving = _edges(plan)
        dstates = torch.zeros_like(states)
        with torch.autocast(q.device.type, enabled=False):
            for p in entering:
                rows = slice(p.start, p.stop)
                dstates[p.segment, p.row] = op.read_state_backward(dout[rows], q[rows], g_H, 1.0)
            finish = prefix.leftwards(dstates, label.reversed())
            dq, dk, dv, _ = op.decay_backward(dout, (q, k, v, g_H), 1.0, plan.cuts, boundary)
            for p in entering:
                rows = slice(p.start, p.stop)
                dq[rows] += op.read_state(dout[rows], states[p.segment, p.row].mT, g_H, 1.0).to(
                    dq.dtype
                )
            dadded = finish()
            for p in leaving:
                rows = slice(p.start, p.stop)
                piece_dk, piece_dv = op.final_state_backward(
                    dadded[p.segment, p.row], k[rows], v[rows], g_H
                )
                dk[rows] += piece_dk.to(dk.dtype)
                dv[rows] += piece_dv.to(dv.dtype)
        return dq, dk, dv, None, None


def _edges(plan: Plan) -> tuple[list[Piece], list[Piece]]:
    """Pieces that go on with a document from the left, and the last piece of every segment."""
    entering = [p for p in plan.pieces if p.document < p.position and _is_first(plan, p)]
    leaving = [
        p for p in plan.pieces if p.position + p.stop - p.start == plan.segments[p.segment].stop
    ]
    return entering, leaving


def _is_first(plan: Plan, piece: Piece) -> bool:
    return piece.position == plan.segments[piece.segment].start
