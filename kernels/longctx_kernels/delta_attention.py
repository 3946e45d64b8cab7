"""The delta rule with decay: none, or per token, scalar or diagonal.

Per head `S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T` and
`o_t = scale S_t^T q_t`. With keys of length 1 and beta up to 2 no state grows. Two custom ops,
one forward and one backward, so that compilers and checkpointing see them whole.
"""

import torch
from torch import Tensor

from longctx_kernels import decay_torch, delta_torch
from longctx_kernels.decay_attention import check_operands, gate_of_tokens
from longctx_kernels.launch import backend_of
from longctx_kernels.pieces import piece_cuts


def delta_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The definition, token by token; differentiable by autograd."""
    B, T, H, K = q.shape
    scale = K**-0.5 if scale is None else scale
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_MHK, k_MHK, v_MHV, beta_MH = (x.to(dtype).flatten(0, 1) for x in (q, k, v, beta))
    decay = gate_of_tokens(q, g, None, gk).exp()
    decay_MHK1 = (decay.expand(B * T, H) if decay.ndim == 1 else decay).reshape(B * T, H, -1, 1)
    cuts = piece_cuts(B, T, cu_seqlens)
    outputs, finals = [], []
    for piece, (start, stop) in enumerate(zip(cuts, cuts[1:])):
        state_HKV = q_MHK.new_zeros(H, K, v.shape[-1])
        if initial_state is not None:
            state_HKV = initial_state[piece].to(dtype)
        for t in range(start, stop):
            state_HKV = decay_MHK1[t] * state_HKV
            expected_H1V = k_MHK[t, :, None, :] @ state_HKV
            written_H1V = beta_MH[t, :, None, None] * (v_MHV[t, :, None, :] - expected_H1V)
            state_HKV = state_HKV + k_MHK[t, :, :, None] @ written_H1V
            outputs.append(scale * (q_MHK[t, :, None, :] @ state_HKV)[:, 0])
        finals.append(state_HKV)
    out = torch.stack(outputs).view(B, T, H, -1).to(v.dtype)
    return out, torch.stack(finals) if output_final_state else None


def delta_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The same values by chunks.

    `beta` `[B, T, H]`; `g` `[B, T, H]` or `gk` `[B, T, H, K]`: at most one log decay, never
    positive. `backend` is "torch" (also what "auto" means) or "fla", which needs a GPU.
    """
    check_operands(q, k, v, initial_state, cu_seqlens)
    if tuple(beta.shape) != tuple(q.shape[:3]):
        raise ValueError(f"beta must be {tuple(q.shape[:3])}, got {tuple(beta.shape)}")
    B, _, H, K = q.shape
    scale = K**-0.5 if scale is None else float(scale)
    gate = gate_of_tokens(q, g, None, gk)
    if backend == "fla":
        backend_of(q, backend)
        return _fla((q, k, v, beta, g, gk), scale, initial_state, output_final_state, cu_seqlens)
    check_backend(backend)
    cuts = torch.arange(B + 1) * q.shape[1] if cu_seqlens is None else cu_seqlens
    if cu_seqlens is not None and B != 1:
        raise ValueError(f"cu_seqlens needs B = 1 (flatten the batch), got B = {B}")
    flat = (x.flatten(0, 1) for x in (q, k, v, beta.to(gate.dtype)))
    out, _, final = torch.ops.longctx.delta_attention(
        *flat, gate, scale, cuts, initial_state, output_final_state
    )
    return out.view(B, -1, H, v.shape[-1]), final if output_final_state else None


def check_backend(backend: str) -> None:
    """Raises ValueError for a backend that computes no delta rule."""
    if backend not in ("auto", "torch"):
        raise ValueError(f"backend {backend!r}: delta rules know auto, torch or fla")


def _host_cuts(q_THK: Tensor, cuts_N: Tensor) -> tuple[int, ...]:
    return piece_cuts(1, q_THK.shape[0], cuts_N)


@torch.library.custom_op("longctx::delta_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    scale: float,
    cuts_N: Tensor,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, states that the backward pass wants, and final states, if asked, else nothing."""
    cuts = _host_cuts(q, cuts_N)
    out, saved, final = delta_torch.delta_forward((q, k, v, beta, g), scale, cuts, initial_state)
    return out, saved, final if output_final_state else g.new_zeros(0)


@_forward.register_fake
def _(q, k, v, beta, g, scale, cuts_N, initial_state, output_final_state):  # noqa: ARG001
    (T, H, K), V, N = q.shape, v.shape[2], cuts_N.shape[0] - 1
    final = g.new_empty(N, H, K, V) if output_final_state else g.new_empty(0)
    rows = decay_torch.saved_rows(T, N, H * max(K, V))
    return v.new_empty(v.shape), g.new_empty(rows, H, K, V), final


@torch.library.custom_op("longctx::delta_attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    saved: Tensor,
    final: Tensor,
    scale: float,
    cuts_N: Tensor,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, the gate (nothing if constant), initial state (or nothing)."""
    cuts = _host_cuts(q, cuts_N)
    operands = (q, k, v, beta, g)
    *grads, dG, dinitial = delta_torch.delta_backward(
        dout, operands, scale, cuts, saved, initial_state, dfinal
    )
    dg = g.new_zeros(0)
    if dG is not None:
        if dfinal is not None:
            decay_torch.add_at_ends(dG, cuts, (final * dfinal).sum(-1))
        dg = decay_torch.log_decay_gradient(dG, cuts)
    if initial_state is None:
        return *grads, dg, g.new_zeros(0)
    return *grads, dg, dinitial.to(initial_state.dtype)


@_backward.register_fake
def _(dout, dfinal, q, k, v, beta, g, saved, final, scale, cuts_N, initial_state):  # noqa: ARG001
    dg = g.new_empty(0) if g.ndim == 1 else g.new_empty(g.shape)
    dinitial = g.new_empty(0)
    if initial_state is not None:
        dinitial = initial_state.new_empty(initial_state.shape)
    return *(x.new_empty(x.shape) for x in (q, k, v, beta)), dg, dinitial


def _keep(ctx, inputs, output) -> None:
    q, k, v, beta, g, ctx.scale, cuts_N, initial_state, ctx.has_final = inputs
    _, saved, final = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, beta, g, saved, final, cuts_N, initial_state)


def _differentiate(ctx, dout, _, dfinal):
    q, k, v, beta, g, saved, final, cuts_N, initial_state = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(v)
    dfinal = dfinal if ctx.has_final else None
    *grads, dg, dinitial = torch.ops.longctx.delta_attention_backward(
        dout, dfinal, q, k, v, beta, g, saved, final, ctx.scale, cuts_N, initial_state
    )
    dg = dg if g.ndim > 1 else None
    dinitial = dinitial if initial_state is not None else None
    return *grads, dg, None, None, dinitial, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def _fla(operands, scale, initial_state, output_final_state, cu_seqlens):
    """By flash-linear-attention's kernels."""
    try:
        from fla.ops.delta_rule import chunk_delta_rule
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        from fla.ops.kda import chunk_kda
    except ImportError as error:
        raise ValueError("backend 'fla' needs the extra `fla`: pip install longctx[fla]") from error
    q, k, v, beta, g, gk = operands
    common = {
        "beta": beta,
        "scale": scale,
        "initial_state": initial_state,
        "output_final_state": output_final_state,
        "cu_seqlens": None if cu_seqlens is None else cu_seqlens.to(q.device),
    }
    if gk is not None:
        return chunk_kda(q, k, v, g=gk, **common)
    if g is not None:
        return chunk_gated_delta_rule(q, k, v, g=g, **common)
    return chunk_delta_rule(q, k, v, **common)
