"""Recurrences that write what a state lacks, in torch, by chunks in slabs that stay in cache.

Tokens are flat. A rule (delta_rules) says with which coefficients a chunk's tokens
see each other and the state S `[H, Z, V]` that enters the chunk. With R(q) and R(k) what queries
and keys see of S, K' what reaches its end, and T = (I + beta StrictTril(P(k, k)))^-1 beta:

    W = T R(k), U = T V, D = U - W S              what is written
    O = R(q) S + P(q, k) D
    S_out = M S + E with M = A - K'^T W, E = K'^T U

so that the only work in order is a chain of small products, forward by M and backward by M^T.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longctx_kernels.decay_torch import row_of, saved_rows, slabs_of
from longctx_kernels.delta_rules import Coefficients, Rule, rule_of, state_rows
from longctx_kernels.pieces import Slab


class Writes(NamedTuple):
    """What chunks write and how they carry a state, all `[N, H, ..]`."""

    products: Tensor
    lower: Tensor
    """beta times products: what T inverts, without its diagonal."""
    w: Tensor
    u: Tensor
    move: Tensor
    add: Tensor


class Carrier(NamedTuple):
    """How much more the chunks of a slab would give if another state entered their pieces."""

    slab: Slab
    index: int
    move: Tensor
    read: Tensor


def delta_forward(operands, scale, cuts, initial_state=None, carriers: list | None = None):
    """Output, states between slabs for `delta_backward`, and the state after each piece.

    `operands` are q, k, v, beta `[T, H]` and the gates. Fills `carriers` for `carry`, if given.
    """
    q_THK, _, v_THV, *_ = operands
    slabs = slabs_of(cuts, q_THK, v_THV)
    out_THV = torch.empty_like(v_THV, memory_format=torch.contiguous_format)
    rows = saved_rows(q_THK.shape[0], len(cuts) - 1, row_of(q_THK, v_THV))
    state_HZV = _no_state(operands)
    boundary_SHZV = state_HZV.new_zeros(rows, *state_HZV.shape)
    final_NHZV = state_HZV.new_empty(len(cuts) - 1, *state_HZV.shape)
    with torch.autocast(q_THK.device.type, enabled=False):
        for i, slab in enumerate(slabs):
            boundary_SHZV[i] = state_HZV
            q, k, v, beta, rule = _load(slab, operands, scale)
            writes = _writes(rule, k, v, beta)
            starts, state_HZV = _states(slab, writes, state_HZV, initial_state, final_NHZV)
            scores, read = rule.scores(q, k), rule.read(q)
            out = scores @ (writes.u - writes.w @ starts)
            slab.store(out_THV, out.add_(read @ starts).to(out_THV.dtype))
            if carriers is not None:
                carriers.append(Carrier(slab, i, writes.move, read - scores @ writes.w))
    return out_THV, boundary_SHZV, final_NHZV


def carry(carriers, entering, out_THV, boundary_SHZV) -> None:
    """Adds to outputs and states what the states `{piece: [H, Z, V]}` entering pieces change."""
    state_HZV = torch.zeros_like(boundary_SHZV[0])
    for slab, index, move, read in carriers:
        boundary_SHZV[index] += state_HZV
        starts = move.new_empty(len(slab.chunks), *state_HZV.shape)
        for i, chunk in enumerate(slab.chunks):
            if chunk.first:
                state_HZV = entering.get(chunk.piece, torch.zeros_like(state_HZV))
            starts[i] = state_HZV
            state_HZV = move[i] @ state_HZV
        change = read @ starts
        slab.store(out_THV, (slab.load(out_THV, change.dtype) + change).to(out_THV.dtype))


def delta_backward(
    dout_THV, operands, scale, cuts, boundary_SHZV, initial_state=None, dfinal_NHZV=None
):
    """Gradients of the operands, None for a constant gate, and of the initial states."""
    q_THK, _, v_THV, _, *gates = operands
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in operands]
    dinitial = None if initial_state is None else torch.zeros_like(initial_state)
    dstate_HZV = torch.zeros_like(boundary_SHZV[0])
    with torch.autocast(q_THK.device.type, enabled=False):
        for i, slab in reversed(list(enumerate(slabs_of(cuts, q_THK, v_THV)))):
            q, k, v, beta, rule = _load(slab, operands, scale)
            dout = slab.load(dout_THV, gates[0].dtype)
            writes, scores = _writes(rule, k, v, beta), rule.scores(q, k)
            starts, _ = _states(slab, writes, boundary_SHZV[i], initial_state, None)
            dadds = (rule.read(q) - scores @ writes.w).mT @ dout
            ends, dstate_HZV = _state_gradients(
                slab, writes.move, dadds, dstate_HZV, dfinal_NHZV, dinitial
            )
            written = writes.u - writes.w @ starts
            dwritten = (scores.mT @ dout).add_(rule.kept(k) @ ends)
            solved = torch.linalg.solve_triangular(
                writes.lower.mT, dwritten, upper=True, unitriangular=True
            )
            dlower, missing = -(solved @ written.mT).tril_(-1), v - rule.key_read(k) @ starts
            dbeta = (solved * missing).sum(-1) + (dlower * writes.products).sum(-1)
            dv = solved * beta
            coefficients = Coefficients(
                read=dout @ starts.mT,
                scores=dout @ written.mT,
                key_read=-dv @ starts.mT,
                products=dlower * beta,
                kept=written @ ends.mT,
                starts=starts,
                ends=ends,
            )
            dq, dk, *dgates = rule.backward(q, k, coefficients)
            found = (dq * scale, dk, dv, dbeta[..., None], *dgates)
            for x_T, x in zip(grads, found):
                slab.store(x_T if x_T.ndim == 3 else x_T[..., None], x.to(x_T.dtype))
    return *(g if x.ndim > 1 else None for g, x in zip(grads, operands)), dinitial


def segment_map(operands: Sequence[Tensor], wants_move: bool) -> tuple[Tensor, Tensor | None]:
    """(E, M) of one range of tokens: it makes a state S into M S + E; None for M not wanted."""
    _, k_THK, v_THV, *_ = operands
    added_HZV = _no_state(operands)
    (_, Z, V), state = added_HZV.shape, added_HZV
    if wants_move:
        eye = torch.eye(Z, dtype=state.dtype, device=state.device).expand(len(state), Z, Z)
        state = torch.cat((state, eye), -1)
    for slab in slabs_of((0, k_THK.shape[0]), k_THK, v_THV):
        _, k, v, beta, rule = _load(slab, operands, 1.0)
        writes = _writes(rule, k, v, beta)
        for move, add in zip(writes.move, writes.add):
            state = move @ state
            state[..., :V] += add
    added_HZV, move = state[..., :V], state[..., V:]
    return added_HZV, move if wants_move else None


def entering_gradient(dout_THV: Tensor, operands: Sequence[Tensor], scale: float) -> Tensor:
    """Gradient `[H, Z, V]` of the state entering one range of tokens, by way of its outputs."""
    _, k_THK, v_THV, *_ = operands
    dstate_HZV = _no_state(operands)
    for slab in reversed(slabs_of((0, k_THK.shape[0]), k_THK, v_THV)):
        q, k, v, beta, rule = _load(slab, operands, scale)
        # What is written in answer to values has no part in this.
        writes = _writes(rule, k, v[..., :0], beta)
        dout = slab.load(dout_THV, dstate_HZV.dtype)
        dadds = (rule.read(q) - rule.scores(q, k) @ writes.w).mT @ dout
        for move, dadd in zip(reversed(writes.move), reversed(dadds)):
            dstate_HZV = torch.baddbmm(dadd, move.mT, dstate_HZV)
    return dstate_HZV


def _no_state(operands: Sequence[Tensor]) -> Tensor:
    q_THK, _, v_THV, _, *gates = operands
    (_, H, K), V = q_THK.shape, v_THV.shape[-1]
    return gates[0].new_zeros(H, state_rows(K, gates), V)


def _load(slab: Slab, operands: Sequence[Tensor], scale: float):
    """A slab's q (scaled), k, v and beta `[N, H, C, ..]`, and its rule."""
    *tokens, beta_TH = operands[:4]
    gates = operands[4:]
    q, k, v, beta = (slab.load(x, gates[0].dtype) for x in (*tokens, beta_TH[..., None]))
    return q * scale, k, v, beta, rule_of(slab, gates)


def _writes(rule: Rule, k: Tensor, v: Tensor, beta: Tensor) -> Writes:
    products, key_read = rule.products(k), rule.key_read(k)
    lower, right = products * beta, torch.cat((key_read, v), -1).mul_(beta)
    solved = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
    w, u = solved.split((key_read.shape[-1], v.shape[-1]), -1)
    kept = rule.kept(k)
    move = -(kept.mT @ w)
    rule.add_carried(move)
    return Writes(products, lower, w, u, move, kept.mT @ u)


def _states(slab, writes: Writes, state_HZV, initial_state, final_NHZV):
    """State entering each chunk, and the one leaving the slab; fills `final_NHZV` if given."""
    starts = torch.empty_like(writes.add)
    for i, chunk in enumerate(slab.chunks):
        if chunk.first:
            state_HZV = (
                torch.zeros_like(state_HZV)
                if initial_state is None
                else initial_state[chunk.piece].to(state_HZV.dtype)
            )
        starts[i] = state_HZV
        state_HZV = torch.baddbmm(writes.add[i], writes.move[i], state_HZV)
        if chunk.last and final_NHZV is not None:
            final_NHZV[chunk.piece] = state_HZV
    return starts, state_HZV


def _state_gradients(slab, move, dadds, dstate_HZV, dfinal_NHZV, dinitial):
    """Gradient of the state leaving each chunk, and of the one entering the slab."""
    ends = torch.empty_like(dadds)
    for i, chunk in reversed(list(enumerate(slab.chunks))):
        if chunk.last:
            dstate_HZV = (
                torch.zeros_like(dstate_HZV) if dfinal_NHZV is None else dfinal_NHZV[chunk.piece]
            )
        ends[i] = dstate_HZV
        dstate_HZV = torch.baddbmm(dadds[i], move[i].mT, dstate_HZV)
        if chunk.first and dinitial is not None:
            dinitial[chunk.piece] = dstate_HZV
    return ends, dstate_HZV
