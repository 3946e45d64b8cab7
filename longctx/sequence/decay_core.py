"""Linear attention with decay over a sharded sequence, scheduled by hand.

Forward: state pass, launch, local work from zero states, wait, what the incoming state adds. The
backward pass mirrors it. Only the state that crosses a cut is communicated, and with gates per
token how much of a state each segment keeps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from longctx_kernels import decay_torch
from longctx_kernels.decay_attention import passes_of
from longctx_kernels.keeping import recalled_later
from longctx_kernels.launch import backend_of
from torch import Tensor

from longctx.sequence.affine import Prefix, Transitions, constant_transitions, links
from longctx.sequence.ledger import Label
from longctx.sequence.plan import Piece, Plan


class Exchange(NamedTuple):
    """What lies where, how states travel, how that is counted, and who computes."""

    plan: Plan
    make_prefix: Callable[[Transitions], Prefix]
    label: Label
    backend: str = "auto"


def sharded_decay_attention(
    operands: tuple[Tensor, Tensor, Tensor],
    log_decay: Tensor | None,
    exchange: Exchange,
    backend: str = "auto",
) -> Tensor:
    """q, k, v `[M, H, D]`, the plan's local tokens; log decay `[H]`, `[M, H(, K)]`; scale 1."""
    q_MHK = operands[0]
    backend = backend_of(q_MHK, backend)
    if backend == "fla":
        raise ValueError("backend 'fla' cannot split a sequence: choose 'triton' or 'torch'")
    if log_decay is None:
        log_decay = q_MHK.new_zeros(q_MHK.shape[1])
    g = log_decay.to(torch.promote_types(q_MHK.dtype, torch.float32))
    g = g.detach() if g.ndim == 1 else g
    return _DecayCore.apply(*operands, g, exchange._replace(backend=backend))


class _DecayCore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, exchange: Exchange) -> Tensor:
        plan, passes = exchange.plan, passes_of(exchange.backend)
        transitions = _transitions(plan, g)
        prefix = exchange.make_prefix(transitions)
        with torch.autocast(q.device.type, enabled=False):
            added, starts = _added(plan, (k, v, g), exchange.backend)
            finish = recalled_later(lambda: prefix.rightwards(added, exchange.label))
            out, saved = passes.output_pass(q, k, v, g, 1.0, plan.cuts, starts)
            states = finish()
            for p, rows in _entering(plan):
                gate, state = decay_torch.gate_of(g, p.start, p.stop), states[p.segment, p.row]
                out[rows] += decay_torch.read_state(q[rows], state, gate, 1.0).to(out.dtype)
        leaving = added if g.ndim == 1 else added + transitions.own * states
        ctx.save_for_backward(q, k, v, g, saved, states, leaving)
        ctx.exchange, ctx.prefix = exchange, prefix
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        q, k, v, g, saved, states, leaving = ctx.saved_tensors
        plan, backend = ctx.exchange.plan, ctx.exchange.backend
        passes = passes_of(backend)
        with torch.autocast(q.device.type, enabled=False):
            dstates, ends = _read_gradients(plan, (q, dout, g), states, backend)
            finish = ctx.prefix.leftwards(dstates, ctx.exchange.label.reversed())
            grads = passes.gradient_pass(q, k, v, g, 1.0, plan.cuts, dout, saved, ends)
            for p, rows in _entering(plan):
                gate, state = decay_torch.gate_of(g, p.start, p.stop), states[p.segment, p.row]
                dq = decay_torch.read_query_gradient(dout[rows], state, gate, 1.0)
                grads[0][rows] += dq.to(q.dtype)
                _add_to_gate(grads[3], rows, q[rows] * dq)
            dleaving = finish()
            for p, rows in _leaving(plan):
                gate, dstate = decay_torch.gate_of(g, p.start, p.stop), dleaving[p.segment, p.row]
                dk, dv = decay_torch.final_state_backward(dstate, k[rows], v[rows], gate)
                grads[1][rows] += dk.to(k.dtype)
                grads[2][rows] += dv.to(v.dtype)
                _add_to_gate(grads[3], rows, -k[rows] * dk)
                at_end_HK = (leaving[p.segment, p.row] * dstate).sum(-1)
                _add_to_gate(grads[3], slice(p.stop - 1, p.stop), at_end_HK[None])
        dq, dk, dv, dG = grads
        dg = None if dG is None else decay_torch.log_decay_gradient(dG, plan.cuts)
        return dq, dk, dv, dg, None


def _transitions(plan: Plan, g: Tensor) -> Transitions:
    """How much of a state each segment keeps; that of gates per token only its owner knows."""
    if g.ndim == 1:
        return constant_transitions(plan, g)
    sizes = (g.shape[1], g.shape[2] if g.ndim == 3 else 1, 1)
    own = g.new_zeros(len(plan.segments), plan.rows, *sizes)
    for p, rows in _leaving(plan):
        segment = plan.segments[p.segment]
        if not plan.resets(p.row, segment):
            own[p.segment, p.row] = decay_torch.total_decay(g[rows], segment.length)
    return Transitions(own, links(plan, own))


def _added(plan: Plan, operands: tuple[Tensor, ...], backend: str) -> tuple[Tensor, Tensor]:
    """What every segment adds to a state, and what the output pass wants to know of it."""
    k, v, g = operands
    added = g.new_zeros(len(plan.segments), plan.rows, *k.shape[1:], v.shape[2])
    if backend != "torch":
        starts, finals = passes_of(backend).state_pass(k, v, g, plan.cuts)
        for p, _ in _leaving(plan):
            added[p.segment, p.row] = finals[plan.pieces.index(p)]
        return added, starts
    # Only the last piece of a segment: the output pass works out the states of all by itself.
    for p, rows in _leaving(plan):
        gate = decay_torch.gate_of(g, p.start, p.stop)
        added[p.segment, p.row] = decay_torch.final_state(k[rows], v[rows], gate)
    return added, added.new_empty(0)


def _read_gradients(
    plan: Plan, operands: tuple[Tensor, ...], states: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """Gradient of the state entering every segment, and what the gradient pass wants of it."""
    q, dout, g = operands
    dstates = torch.zeros_like(states)
    if backend != "torch":
        ends, dinitial = passes_of(backend).dstate_pass(q, dout, g, 1.0, plan.cuts)
        for p, _ in _entering(plan):
            dstates[p.segment, p.row] = dinitial[plan.pieces.index(p)]
        return dstates, ends
    for p, rows in _entering(plan):
        gate = decay_torch.gate_of(g, p.start, p.stop)
        dstates[p.segment, p.row] = decay_torch.read_state_backward(dout[rows], q[rows], gate, 1.0)
    return dstates, states.new_empty(0)


def _add_to_gate(dG: Tensor | None, rows: slice, x_THK: Tensor) -> None:
    """Adds to the gradient of the running sum of a gate per token."""
    if dG is not None:
        dG[rows] += x_THK.sum(-1) if dG.ndim == 2 else x_THK


def _entering(plan: Plan) -> list[tuple[Piece, slice]]:
    return [(p, slice(p.start, p.stop)) for _, p in entering_pieces(plan)]


def _leaving(plan: Plan) -> list[tuple[Piece, slice]]:
    return [(p, slice(p.start, p.stop)) for _, p in leaving_pieces(plan)]


def entering_pieces(plan: Plan) -> list[tuple[int, Piece]]:
    """Pieces that go on with a document from the left, and their numbers."""
    return [
        (number, p)
        for number, p in enumerate(plan.pieces)
        if p.document < p.position == plan.segments[p.segment].start
    ]


def leaving_pieces(plan: Plan) -> list[tuple[int, Piece]]:
    """The last piece of every segment, and its number."""
    return [
        (number, p)
        for number, p in enumerate(plan.pieces)
        if p.position + p.stop - p.start == plan.segments[p.segment].stop
    ]
