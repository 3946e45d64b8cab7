"""Linear attention with no decay or one constant decay per head.

Per head `S_t = exp(g) S_{t-1} + k_t v_t^T` and `o_t = scale q_t^T S_t`.
"""

import torch
from torch import Tensor

from longctx_kernels.pieces import Slab, piece_cuts, plan_slabs

CHUNK = 64
SLAB_ELEMENTS = 1 << 18


def decay_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The definition, token by token; differentiable by autograd."""
    B, T, H, K = q.shape
    V = v.shape[-1]
    scale = K**-0.5 if scale is None else scale
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_MHK, k_MHK, v_MHV = (x.to(dtype).flatten(0, 1) for x in (q, k, v))
    decay_H11 = torch.ones(H, 1, 1, dtype=dtype, device=q.device)
    if g_gamma is not None:
        decay_H11 = g_gamma.to(dtype).exp()[:, None, None]
    cuts = piece_cuts(B, T, cu_seqlens)
    outputs, finals = [], []
    for piece, (start, stop) in enumerate(zip(cuts, cuts[1:])):
        state_HKV = q_MHK.new_zeros(H, K, V)
        if initial_state is not None:
            state_HKV = initial_state[piece].to(dtype)
        for t in range(start, stop):
            state_HKV = decay_H11 * state_HKV + k_MHK[t, :, :, None] @ v_MHV[t, :, None, :]
            outputs.append(scale * (q_MHK[t, :, None, :] @ state_HKV)[:, 0])
        finals.append(state_HKV)
    out = torch.stack(outputs).view(B, T, H, V).to(v.dtype)
    return out, torch.stack(finals) if output_final_state else None


def decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The same values by chunks; gradients reach q, k, v and `initial_state`, not `g_gamma`."""
    B, T, H, K = q.shape
    if k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"k and v must match q {tuple(q.shape)}, got {k.shape} and {v.shape}")
    cuts = piece_cuts(B, T, cu_seqlens)
    dtype = torch.promote_types(q.dtype, torch.float32)
    if g_gamma is None:
        g_gamma = torch.zeros(H, dtype=dtype, device=q.device)
    scale = K**-0.5 if scale is None else scale
    out, final_state = _DecayAttention.apply(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        g_gamma.detach().to(dtype),
        scale,
        initial_state,
        cuts,
        output_final_state,
    )
    return out.view(B, T, H, -1), final_state


class _DecayAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_THK, k_THK, v_THV, g_H, scale, initial_state, cuts, output_final_state):
        operands = q_THK, k_THK, v_THV, g_H
        out_THV, boundary_SHKV, final_NHKV = decay_forward(
            operands, scale, cuts, initial_state, output_final_state
        )
        ctx.save_for_backward(*operands, boundary_SHKV, initial_state)
        ctx.scale, ctx.cuts = scale, cuts
        return out_THV, final_NHKV

    @staticmethod
    def backward(ctx, dout_THV, dfinal_NHKV):
        *operands, boundary_SHKV, initial_state = ctx.saved_tensors
        dq, dk, dv, dinitial = decay_backward(
            dout_THV, operands, ctx.scale, ctx.cuts, boundary_SHKV, initial_state, dfinal_NHKV
        )
        return dq, dk, dv, None, None, dinitial, None, None


def decay_forward(operands, scale, cuts, initial_state=None, output_final_state=False):
    """Output, the states between slabs that `decay_backward` wants, and final states if asked.

    Operands are q, k, v `[T, H, D]` and the log decay `[H]` in at least fp32.
    """
    q_THK, k_THK, v_THV, g_H = operands
    dtype = g_H.dtype
    slabs = _slabs(cuts, q_THK, v_THV)
    out_THV = torch.empty_like(v_THV, memory_format=torch.contiguous_format)
    state_HKV = g_H.new_zeros(*q_THK.shape[1:], v_THV.shape[-1])
    boundary_SHKV = state_HKV.new_empty(len(slabs), *state_HKV.shape)
    final_NHKV = None
    if output_final_state:
        final_NHKV = state_HKV.new_empty(len(cuts) - 1, *state_HKV.shape)
    with torch.autocast(q_THK.device.type, enabled=False):
        for i, slab in enumerate(slabs):
            boundary_SHKV[i] = state_HKV
            decay = _Decay(slab, g_H)
            q = slab.load(q_THK, dtype).mul_(scale)
            k, v = slab.load(k_THK, dtype), slab.load(v_THV, dtype)
            starts, state_HKV = _states(slab, decay, k, v, state_HKV, initial_state, final_NHKV)
            scores = (q @ k.mT).mul_(decay.between)
            out = (scores @ v).add_((q * decay.since_start) @ starts)
            slab.store(out_THV, out.to(out_THV.dtype))
    return out_THV, boundary_SHKV, final_NHKV


def decay_backward(
    dout_THV, operands, scale, cuts, boundary_SHKV, initial_state=None, dfinal_NHKV=None
):
    """Gradients of q, k, v and the initial states, slab after slab from the right."""
    q_THK, k_THK, v_THV, g_H = operands
    dtype = g_H.dtype
    dq_THK, dk_THK, dv_THV = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THK, k_THK, v_THV)
    )
    dinitial = None if initial_state is None else torch.empty_like(initial_state)
    dstate_HKV = torch.zeros_like(boundary_SHKV[0])
    with torch.autocast(q_THK.device.type, enabled=False):
        slabs = _slabs(cuts, q_THK, v_THV)
        for slab, state_HKV in zip(reversed(slabs), reversed(boundary_SHKV.unbind())):
            decay = _Decay(slab, g_H)
            q = slab.load(q_THK, dtype).mul_(scale)
            k, v, dout = (slab.load(x, dtype) for x in (k_THK, v_THV, dout_THV))
            starts, _ = _states(slab, decay, k, v, state_HKV, initial_state, None)
            ends, dstate_HKV = _state_gradients(
                slab, decay, (q * decay.since_start).mT @ dout, dstate_HKV, dfinal_NHKV, dinitial
            )
            scores = (q @ k.mT).mul_(decay.between)
            dscores = (dout @ v.mT).mul_(decay.between)
            dq = (dscores @ k).add_((dout @ starts.mT).mul_(decay.since_start))
            dk = (dscores.mT @ q).add_((v @ ends.mT).mul_(decay.until_end))
            dv = (scores.mT @ dout).add_((k * decay.until_end) @ ends)
            for x_THD, x in ((dq_THK, dq.mul_(scale)), (dk_THK, dk), (dv_THV, dv)):
                slab.store(x_THD, x.to(x_THD.dtype))
    return dq_THK, dk_THK, dv_THV, dinitial


def final_state(k_THK: Tensor, v_THV: Tensor, g_H: Tensor) -> Tensor:
    """State `[H, K, V]` after one range of tokens that starts from zero."""
    k_HTK, v_HTV = _by_head(k_THK, g_H), _by_head(v_THV, g_H)
    return (k_HTK * _until_end(k_THK, g_H)).mT @ v_HTV


def final_state_backward(
    dstate_HKV: Tensor, k_THK: Tensor, v_THV: Tensor, g_H: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `final_state` with respect to k and v."""
    k_HTK, v_HTV, decay_HT1 = _by_head(k_THK, g_H), _by_head(v_THV, g_H), _until_end(k_THK, g_H)
    dk_HTK = (v_HTV @ dstate_HKV.mT).mul_(decay_HT1)
    return dk_HTK.transpose(0, 1), ((k_HTK * decay_HT1) @ dstate_HKV).transpose(0, 1)


def read_state(q_THK: Tensor, state_HKV: Tensor, g_H: Tensor, scale: float) -> Tensor:
    """What one range of tokens reads from the state that precedes it: `[T, H, V]`."""
    q_HTK = _by_head(q_THK, g_H) * (scale * _since_start(q_THK, g_H))
    return (q_HTK @ state_HKV).transpose(0, 1)


def read_state_backward(dout_THV: Tensor, q_THK: Tensor, g_H: Tensor, scale: float) -> Tensor:
    """Gradient of `read_state` with respect to the state; that of q is `read_state` of dout."""
    q_HTK = _by_head(q_THK, g_H) * (scale * _since_start(q_THK, g_H))
    return q_HTK.mT @ _by_head(dout_THV, g_H)


def _by_head(x_THD: Tensor, g_H: Tensor) -> Tensor:
    return x_THD.to(g_H.dtype).transpose(0, 1)


def _since_start(x_THD: Tensor, g_H: Tensor) -> Tensor:
    steps_T = torch.arange(1, x_THD.shape[0] + 1, dtype=g_H.dtype, device=g_H.device)
    return (g_H[:, None] * steps_T).exp()[..., None]


def _until_end(x_THD: Tensor, g_H: Tensor) -> Tensor:
    steps_T = torch.arange(x_THD.shape[0] - 1, -1, -1, dtype=g_H.dtype, device=g_H.device)
    return (g_H[:, None] * steps_T).exp()[..., None]


def _slabs(cuts: tuple[int, ...], q_THK: Tensor, v_THV: Tensor) -> tuple[Slab, ...]:
    row = q_THK.shape[1] * max(q_THK.shape[2], v_THV.shape[2])
    return plan_slabs(cuts, CHUNK, max(CHUNK, SLAB_ELEMENTS // row))


class _Decay:
    """Decay factors of a slab's chunks, from differences of logs that are never positive."""

    def __init__(self, slab: Slab, g_H: Tensor):
        offset_C = torch.arange(slab.chunk_size, dtype=g_H.dtype, device=g_H.device)
        lengths = [float(chunk.length) for chunk in slab.chunks]
        length_N = torch.tensor([lengths[0]] if slab.is_full else lengths).to(g_H)
        distance_CC = offset_C[:, None] - offset_C
        self.between = (g_H[:, None, None] * distance_CC).exp().tril_()
        self.since_start = (g_H[:, None] * (offset_C + 1)).exp()[:, :, None]
        remaining_NC = (length_N[:, None] - 1 - offset_C).clamp(min=0)
        self.until_end = (g_H[:, None] * remaining_NC[:, None, :]).exp()[..., None]
        self.whole = [(g_H * n).exp()[:, None, None] for n in sorted(set(lengths))]
        self._index = {n: i for i, n in enumerate(sorted(set(lengths)))}

    def of(self, length: int) -> Tensor:
        """Decay over a whole chunk of `length` tokens."""
        return self.whole[self._index[float(length)]]


def _states(slab, decay, k, v, state_HKV, initial_state, final_NHKV):
    """State entering each chunk, and the one leaving the slab; fills `final_NHKV` if given."""
    starts = (k * decay.until_end).mT @ v
    for i, chunk in enumerate(slab.chunks):
        if chunk.first:
            state_HKV = (
                torch.zeros_like(state_HKV)
                if initial_state is None
                else initial_state[chunk.piece].to(state_HKV.dtype)
            )
        leaving = torch.addcmul(starts[i], decay.of(chunk.length), state_HKV)
        starts[i] = state_HKV
        state_HKV = leaving
        if chunk.last and final_NHKV is not None:
            final_NHKV[chunk.piece] = state_HKV
    return starts, state_HKV


def _state_gradients(slab, decay, dstarts, dstate_HKV, dfinal_NHKV, dinitial):
    """Gradient of the state leaving each chunk, and of the one entering the slab."""
    ends = dstarts
    for i, chunk in reversed(list(enumerate(slab.chunks))):
        if chunk.last:
            dstate_HKV = (
                torch.zeros_like(dstate_HKV) if dfinal_NHKV is None else dfinal_NHKV[chunk.piece]
            )
        entering = torch.addcmul(dstarts[i], decay.of(chunk.length), dstate_HKV)
        ends[i] = dstate_HKV
        dstate_HKV = entering
        if chunk.first and dinitial is not None:
            dinitial[chunk.piece] = dstate_HKV
    return ends, dstate_HKV
