"""Delta-rule attention in torch, by chunks in slabs that stay in cache; any device, fp64 too.

Tokens are flat, gates as in decay_torch. Within a chunk that a state S enters, with Q and K decayed
since its start, K' until its end, and T = (I + beta StrictTril(K K^T))^-1 beta:

    W = T K, U = T V, D = U - W S                 what is written
    O = Q S + Tril(Q K^T) D
    S_out = M S + E with M = Diag(decay) - K'^T W, E = K'^T U

so that the only work in order is a chain of small products, forward by M and backward by M^T.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from longctx_kernels.decay_torch import decay_factors, row_of, saved_rows, slabs_of, store_gate
from longctx_kernels.pieces import Slab


class Writes(NamedTuple):
    """What chunks write and how they carry a state, all `[N, H, ..]`."""

    products: Tensor
    """Keys times earlier keys, decayed."""
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

    `operands` are q, k, v, beta `[T, H]` and the gate. Fills `carriers` for `carry`, if given.
    """
    q_THK, k_THK, v_THV, beta_TH, g = operands
    slabs = slabs_of(cuts, q_THK, v_THV)
    out_THV = torch.empty_like(v_THV, memory_format=torch.contiguous_format)
    state_HKV = g.new_zeros(*q_THK.shape[1:], v_THV.shape[-1])
    rows = saved_rows(q_THK.shape[0], len(cuts) - 1, row_of(q_THK, v_THV))
    boundary_SHKV = state_HKV.new_zeros(rows, *state_HKV.shape)
    final_NHKV = state_HKV.new_empty(len(cuts) - 1, *state_HKV.shape)
    with torch.autocast(q_THK.device.type, enabled=False):
        for i, slab in enumerate(slabs):
            boundary_SHKV[i] = state_HKV
            decay = decay_factors(slab, g)
            q, k = slab.load(q_THK, g.dtype) * scale, slab.load(k_THK, g.dtype)
            writes = _writes(slab, decay, k, _values(slab, v_THV, beta_TH, g))
            starts, state_HKV = _states(slab, writes, state_HKV, initial_state, final_NHKV)
            scores, seen = decay.scores(q, k), q * decay.since_start
            out = scores @ (writes.u - writes.w @ starts)
            slab.store(out_THV, out.add_(seen @ starts).to(out_THV.dtype))
            if carriers is not None:
                read = seen - scores @ writes.w
                carriers.append(Carrier(slab, i, writes.move, read))
    return out_THV, boundary_SHKV, final_NHKV


def carry(carriers, entering, out_THV, boundary_SHKV) -> None:
    """Adds to outputs and states what the states `{piece: [H, K, V]}` entering pieces change."""
    state_HKV = torch.zeros_like(boundary_SHKV[0])
    for slab, index, move, read in carriers:
        boundary_SHKV[index] += state_HKV
        starts = move.new_empty(len(slab.chunks), *state_HKV.shape)
        for i, chunk in enumerate(slab.chunks):
            if chunk.first:
                state_HKV = entering.get(chunk.piece, torch.zeros_like(state_HKV))
            starts[i] = state_HKV
            state_HKV = move[i] @ state_HKV
        change = read @ starts
        slab.store(out_THV, (slab.load(out_THV, change.dtype) + change).to(out_THV.dtype))


def delta_backward(
    dout_THV, operands, scale, cuts, boundary_SHKV, initial_state=None, dfinal_NHKV=None
):
    """Gradients of q, k, v, beta, of the gate's running sums, and of the initial states.

    What `dfinal_NHKV` adds to the running sums at the end of a piece is left out.
    """
    q_THK, k_THK, v_THV, beta_TH, g = operands
    dq_THK, dk_THK, dv_THV, dbeta_TH = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in operands[:4]
    )
    dG = None if g.ndim == 1 else torch.empty_like(g, memory_format=torch.contiguous_format)
    dinitial = None if initial_state is None else torch.zeros_like(initial_state)
    dstate_HKV = torch.zeros_like(boundary_SHKV[0])
    with torch.autocast(q_THK.device.type, enabled=False):
        for i, slab in reversed(list(enumerate(slabs_of(cuts, q_THK, v_THV)))):
            decay = decay_factors(slab, g)
            q, k, dout = (slab.load(x, g.dtype) for x in (q_THK, k_THK, dout_THV))
            q = q * scale
            v, beta = _values(slab, v_THV, beta_TH, g)
            writes = _writes(slab, decay, k, (v, beta))
            starts, _ = _states(slab, writes, boundary_SHKV[i], initial_state, None)
            scores = decay.scores(q, k)
            read = q * decay.since_start - scores @ writes.w
            ends, dstate_HKV = _state_gradients(
                slab, writes.move, read.mT @ dout, dstate_HKV, dfinal_NHKV, dinitial
            )
            written = writes.u - writes.w @ starts
            dwritten = (scores.mT @ dout).add_((k * decay.until_end) @ ends)
            solved = torch.linalg.solve_triangular(
                writes.lower.mT, dwritten, upper=True, unitriangular=True
            )
            missing = v - (k * decay.since_start) @ starts
            dlower = -(solved @ written.mT).tril_(-1)
            dbeta = (solved * missing).sum(-1) + (dlower * writes.products).sum(-1)
            dv = solved * beta
            dq, dk = decay.score_gradients(dout @ written.mT, q, k)
            dq.add_((dout @ starts.mT).mul_(decay.since_start))
            dk.add_((written @ ends.mT).mul_(decay.until_end))
            dk_reading, dk_read = decay.score_gradients(dlower * beta, k, k)
            dk_reading.sub_((dv @ starts.mT).mul_(decay.since_start))
            dk.add_(dk_read)
            if dG is not None:
                store_gate(slab, dG, q * dq + k * (dk_reading - dk))
            slab.store(dq_THK, dq.mul_(scale).to(q_THK.dtype))
            slab.store(dk_THK, dk.add_(dk_reading).to(k_THK.dtype))
            slab.store(dv_THV, dv.to(v_THV.dtype))
            slab.store(dbeta_TH[..., None], dbeta[..., None])
    return dq_THK, dk_THK, dv_THV, dbeta_TH, dG, dinitial


def segment_map(operands: tuple[Tensor, ...], wants_move: bool) -> tuple[Tensor, Tensor | None]:
    """(E, M) of one range of tokens: it makes a state S into M S + E; None for M not wanted."""
    _, k_THK, v_THV, beta_TH, g = operands
    K, V = k_THK.shape[-1], v_THV.shape[-1]
    state_HKV = g.new_zeros(*k_THK.shape[1:], V + K * wants_move)
    if wants_move:
        state_HKV[..., V:] = torch.eye(K, dtype=g.dtype, device=g.device)
    for slab in slabs_of((0, k_THK.shape[0]), k_THK, v_THV):
        decay, k = decay_factors(slab, g), slab.load(k_THK, g.dtype)
        writes = _writes(slab, decay, k, _values(slab, v_THV, beta_TH, g))
        for move, add in zip(writes.move, writes.add):
            state_HKV = move @ state_HKV
            state_HKV[..., :V] += add
    added, move = state_HKV.split((V, K * wants_move), -1)
    return added.contiguous(), move.contiguous() if wants_move else None


def entering_gradient(dout_THV: Tensor, operands: tuple[Tensor, ...], scale: float) -> Tensor:
    """Gradient `[H, K, V]` of the state entering one range of tokens, by way of its outputs."""
    q_THK, k_THK, v_THV, beta_TH, g = operands
    dstate_HKV = g.new_zeros(*k_THK.shape[1:], v_THV.shape[-1])
    for slab in reversed(slabs_of((0, k_THK.shape[0]), k_THK, v_THV)):
        decay, k = decay_factors(slab, g), slab.load(k_THK, g.dtype)
        writes = _writes(slab, decay, k, _values(slab, v_THV, beta_TH, g))
        q, dout = slab.load(q_THK, g.dtype) * scale, slab.load(dout_THV, g.dtype)
        read = q * decay.since_start - decay.scores(q, k) @ writes.w
        for move, dadd in zip(reversed(writes.move), reversed(read.mT @ dout)):
            dstate_HKV = move.mT @ dstate_HKV + dadd
    return dstate_HKV


def _values(slab: Slab, v_THV: Tensor, beta_TH: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return slab.load(v_THV, g.dtype), slab.load(beta_TH[..., None], g.dtype)


def _writes(slab: Slab, decay, k: Tensor, values: tuple[Tensor, Tensor]) -> Writes:
    v, beta = values
    products = decay.scores(k, k).tril_(-1)
    lower = products * beta
    right = torch.cat((k * decay.since_start, v), -1).mul_(beta)
    solved = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
    w, u = solved.split((k.shape[-1], v.shape[-1]), -1)
    kept = k * decay.until_end
    move = -(kept.mT @ w)
    whole = torch.stack([decay.whole(i) for i in range(len(slab.chunks))])
    move.diagonal(dim1=-2, dim2=-1).add_(whole[..., 0])
    return Writes(products, lower, w, u, move, kept.mT @ u)


def _states(slab, writes: Writes, state_HKV, initial_state, final_NHKV):
    """State entering each chunk, and the one leaving the slab; fills `final_NHKV` if given."""
    starts = torch.empty_like(writes.add)
    for i, chunk in enumerate(slab.chunks):
        if chunk.first:
            state_HKV = (
                torch.zeros_like(state_HKV)
                if initial_state is None
                else initial_state[chunk.piece].to(state_HKV.dtype)
            )
        starts[i] = state_HKV
        state_HKV = torch.baddbmm(writes.add[i], writes.move[i], state_HKV)
        if chunk.last and final_NHKV is not None:
            final_NHKV[chunk.piece] = state_HKV
    return starts, state_HKV


def _state_gradients(slab, move, dadds, dstate_HKV, dfinal_NHKV, dinitial):
    """Gradient of the state leaving each chunk, and of the one entering the slab."""
    ends = torch.empty_like(dadds)
    for i, chunk in reversed(list(enumerate(slab.chunks))):
        if chunk.last:
            dstate_HKV = (
                torch.zeros_like(dstate_HKV) if dfinal_NHKV is None else dfinal_NHKV[chunk.piece]
            )
        ends[i] = dstate_HKV
        dstate_HKV = torch.baddbmm(dadds[i], move[i].mT, dstate_HKV)
        if chunk.first and dinitial is not None:
            dinitial[chunk.piece] = dstate_HKV
    return ends, dstate_HKV
