"""The delta rule over a sharded sequence, scheduled by hand.

A segment is an affine map of the state, (M, E). Forward: the maps of what crosses a cut, launch,
local work from zero states, wait, what the incoming state changes: as outputs are affine in it,
only small products wait. Backward: gradients of incoming states, launch, wait, local work; their
way through a segment is M^T, so that nothing but states travels back.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from longctx_kernels import delta_torch
from longctx_kernels.delta_attention import check_backend
from longctx_kernels.delta_rules import state_rows
from longctx_kernels.keeping import recalled_later
from torch import Tensor

from longctx.sequence.affine import Prefix, Transitions, links
from longctx.sequence.decay_core import Exchange, entering_pieces, leaving_pieces
from longctx.sequence.plan import Piece, Plan


def sharded_delta_attention(
    operands: tuple[Tensor, Tensor, Tensor, Tensor],
    gates: list[Tensor | None],
    exchange: Exchange,
) -> Tensor:
    """Of q, k `[M, H, K]`, v `[M, H, V]`, beta `[M, H]`, the plan's local tokens; scale 1.

    `gates` are the log decay and the log momentum.
    """
    check_backend(exchange.backend)
    q, k, v, beta = operands
    dtype = torch.promote_types(q.dtype, torch.float32)
    log_decay, momentum = gates
    if log_decay is None:
        log_decay = torch.zeros(q.shape[1], device=q.device)
    present = [x.to(dtype) for x in (beta, log_decay, momentum) if x is not None]
    return _DeltaCore.apply(exchange, q, k, v, *present)


class _DeltaCore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *operands: Tensor) -> Tensor:
        plan, q = exchange.plan, operands[0]
        with torch.autocast(q.device.type, enabled=False):
            finish = recalled_later(lambda: _sent(exchange, operands))
            carriers: list[delta_torch.Carrier] = []
            out, saved, _ = delta_torch.delta_forward(operands, 1.0, plan.cuts, carriers=carriers)
            states, prefix = finish()
            entering = {number: states[p.segment, p.row] for number, p in entering_pieces(plan)}
            delta_torch.carry(carriers, entering, out, saved)
        ctx.save_for_backward(*operands, saved, states)
        ctx.exchange, ctx.prefix = exchange, prefix
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        *operands, saved, states = ctx.saved_tensors
        plan, label = ctx.exchange.plan, ctx.exchange.label.reversed()
        with torch.autocast(dout.device.type, enabled=False):
            dstates = torch.zeros_like(states)
            for _, p in entering_pieces(plan):
                rows = slice(p.start, p.stop)
                dstates[p.segment, p.row] = delta_torch.entering_gradient(
                    dout[rows], _rows(operands, p), 1.0
                )
            dleaving = ctx.prefix.leftwards(dstates, label)()
            initial = states.new_zeros(len(plan.pieces), *states.shape[2:])
            dfinal = torch.zeros_like(initial)
            for number, p in entering_pieces(plan):
                initial[number] = states[p.segment, p.row]
            for number, p in leaving_pieces(plan):
                dfinal[number] = dleaving[p.segment, p.row]
            *grads, _ = delta_torch.delta_backward(
                dout, operands, 1.0, plan.cuts, saved, initial, dfinal
            )
        return None, *grads


def _sent(exchange: Exchange, operands: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor, Prefix]]:
    """Sends the maps of segments; the call gives the states that enter them, and the prefix."""
    added, moves = _maps(exchange.plan, operands)
    prefix = exchange.make_prefix(Transitions(moves, links(exchange.plan, added)))
    finish = prefix.rightwards(added, exchange.label)
    return lambda: (finish(), prefix)


def _maps(plan: Plan, operands: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """(E, M) of every segment, zeros for what no other segment will ask for.

    The first segment of a document receives nothing and its last one hands on nothing.
    """
    (_, H, K), V, gates = operands[1].shape, operands[2].shape[2], operands[4:]
    Z = state_rows(K, gates)
    added = gates[0].new_zeros(len(plan.segments), plan.rows, H, Z, V)
    moves = gates[0].new_zeros(len(plan.segments), plan.rows, H, Z, Z)
    for _, p in leaving_pieces(plan):
        if not plan.goes_on(p.row, plan.segments[p.segment]):
            continue
        gets_through = p.document < p.position == plan.segments[p.segment].start
        part = _rows(operands, p)
        added[p.segment, p.row], move = delta_torch.segment_map(part, wants_move=gets_through)
        if move is not None:
            moves[p.segment, p.row] = move
    return added, moves


def _rows(operands: Sequence[Tensor], piece: Piece) -> tuple[Tensor, ...]:
    """The operands of a piece's tokens."""
    rows = slice(piece.start, piece.stop)
    return tuple(x[rows] if x.ndim > 1 else x for x in operands)
