"""The delta rule with decay, none, or per token, scalar or diagonal; and with momentum.

Per head `S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T` and
`o_t = scale S_t^T q_t`. With keys of length 1 and beta up to 2 no state grows. With a log momentum
m the state is a memory M on top of its momentum P, `[2 K, V]`: `P_t = exp(m_t) P_{t-1} + beta_t k_t
(v_t - M_{t-1}^T k_t)^T`, `M_t = exp(g_t) M_{t-1} + P_t`, `o_t = scale M_t^T q_t`. Two custom ops,
one forward and one backward, so that compilers and checkpointing see them whole.
"""

import torch
from torch import Tensor

from longctx_kernels import decay_torch, delta_torch
from longctx_kernels.decay_attention import check_operands, gate_of_tokens
from longctx_kernels.delta_rules import state_rows
from longctx_kernels.launch import backend_of
from longctx_kernels.pieces import piece_cuts


def delta_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    momentum: Tensor | None = None,
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
    decay, *passing = (x.exp() for x in _gates(q, g, gk, momentum))
    decay_MHK1 = (decay.expand(B * T, H) if decay.ndim == 1 else decay).reshape(B * T, H, -1, 1)
    cuts = piece_cuts(B, T, cu_seqlens)
    outputs, finals = [], []
    for piece, (start, stop) in enumerate(zip(cuts, cuts[1:])):
        state_HZV = q_MHK.new_zeros(H, state_rows(K, (decay, *passing)), v.shape[-1])
        if initial_state is not None:
            state_HZV = initial_state[piece].to(dtype)
        for t in range(start, stop):
            memory_HKV, momentum_HKV = state_HZV[:, :K], state_HZV[:, K:]
            decayed_HKV = decay_MHK1[t] * memory_HKV
            known_H1V = k_MHK[t, :, None, :] @ (memory_HKV if passing else decayed_HKV)
            written_H1V = beta_MH[t, :, None, None] * (v_MHV[t, :, None, :] - known_H1V)
            added_HKV = k_MHK[t, :, :, None] @ written_H1V
            if passing:
                added_HKV = added_HKV + passing[0][t, :, None, None] * momentum_HKV
            memory_HKV = decayed_HKV + added_HKV
            outputs.append(scale * (q_MHK[t, :, None, :] @ memory_HKV)[:, 0])
            state_HZV = torch.cat((memory_HKV, added_HKV), 1) if passing else memory_HKV
        finals.append(state_HZV)
    out = torch.stack(outputs).view(B, T, H, -1).to(v.dtype)
    return out, torch.stack(finals) if output_final_state else None


def delta_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    momentum: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The same values by chunks.

    `beta` `[B, T, H]`; `g` `[B, T, H]` or `gk` `[B, T, H, K]`: at most one log decay, never
    positive; `momentum` `[B, T, H]` needs `g`. `backend` is "torch" (also what "auto" means) or
    "fla", which needs a GPU and knows no momentum.
    """
    state_dim = q.shape[-1] * (1 if momentum is None else 2)
    check_operands(q, k, v, initial_state, cu_seqlens, state_dim)
    if tuple(beta.shape) != tuple(q.shape[:3]):
        raise ValueError(f"beta must be {tuple(q.shape[:3])}, got {tuple(beta.shape)}")
    B, _, H, K = q.shape
    scale = K**-0.5 if scale is None else float(scale)
    gate, *passing = _gates(q, g, gk, momentum)
    if backend == "fla":
        backend_of(q, backend)
        if passing:
            raise ValueError("backend 'fla' knows no momentum: choose auto or torch")
        return _fla((q, k, v, beta, g, gk), scale, initial_state, output_final_state, cu_seqlens)
    check_backend(backend)
    cuts = torch.arange(B + 1) * q.shape[1] if cu_seqlens is None else cu_seqlens
    if cu_seqlens is not None and B != 1:
        raise ValueError(f"cu_seqlens needs B = 1 (flatten the batch), got B = {B}")
    flat = (x.flatten(0, 1) for x in (q, k, v, beta.to(gate.dtype)))
    out, _, final = torch.ops.longctx.delta_attention(
        *flat, gate, *(passing or [None]), scale, cuts, initial_state, output_final_state
    )
    return out.view(B, -1, H, v.shape[-1]), final if output_final_state else None


def _gates(q, g, gk, momentum) -> list[Tensor]:
    """The log decay of flat tokens, and the log momentum if there is one."""
    decay = gate_of_tokens(q, g, None, gk)
    if momentum is None:
        return [decay]
    if g is None:
        raise ValueError("momentum needs g, a log decay [B, T, H], beside it")
    if tuple(momentum.shape) != tuple(g.shape):
        raise ValueError(f"momentum must be {tuple(g.shape)}, got {tuple(momentum.shape)}")
    return [decay, momentum.to(decay.dtype).flatten(0, 1)]


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
    momentum: Tensor | None,
    scale: float,
    cuts_N: Tensor,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, states that the backward pass wants, and final states, if asked, else nothing."""
    operands, cuts = _operands(q, k, v, beta, g, momentum), _host_cuts(q, cuts_N)
    out, saved, final = delta_torch.delta_forward(operands, scale, cuts, initial_state)
    return out, saved, final if output_final_state else g.new_zeros(0)


@_forward.register_fake
def _(q, k, v, beta, g, momentum, scale, cuts_N, initial_state, output_final_state):  # noqa: ARG001
    (T, H, K), V, N = q.shape, v.shape[2], cuts_N.shape[0] - 1
    Z = K if momentum is None else 2 * K
    final = g.new_empty(N, H, Z, V) if output_final_state else g.new_empty(0)
    rows = decay_torch.saved_rows(T, N, H * max(K, V))
    return v.new_empty(v.shape), g.new_empty(rows, H, Z, V), final


@torch.library.custom_op("longctx::delta_attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    momentum: Tensor | None,
    saved: Tensor,
    scale: float,
    cuts_N: Tensor,
    initial_state: Tensor | None,
) -> list[Tensor]:
    """Gradients of q, k, v, beta, gate, momentum, initial state; nothing for what has none."""
    operands, cuts = _operands(q, k, v, beta, g, momentum), _host_cuts(q, cuts_N)
    *grads, dinitial = delta_torch.delta_backward(
        dout, operands, scale, cuts, saved, initial_state, dfinal
    )
    if momentum is None:
        grads.append(None)
    if initial_state is not None:
        dinitial = dinitial.to(initial_state.dtype)
    return [g.new_zeros(0) if x is None else x for x in (*grads, dinitial)]


@_backward.register_fake
def _(dout, dfinal, q, k, v, beta, g, momentum, saved, scale, cuts_N, initial_state):  # noqa: ARG001
    inputs = (q, k, v, beta, g if g.ndim > 1 else None, momentum, initial_state)
    return [g.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs]


def _operands(q, k, v, beta, g, momentum) -> tuple[Tensor, ...]:
    return (q, k, v, beta, g) if momentum is None else (q, k, v, beta, g, momentum)


def _keep(ctx, inputs, output) -> None:
    *operands, ctx.scale, cuts_N, initial_state, ctx.has_final = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands, output[1], cuts_N, initial_state)


def _differentiate(ctx, dout, _, dfinal):
    *operands, saved, cuts_N, initial_state = ctx.saved_tensors
    g, momentum = operands[4:]
    if dout is None:
        dout = torch.zeros_like(operands[2])
    dfinal = dfinal if ctx.has_final else None
    *grads, dg, dmomentum, dinitial = torch.ops.longctx.delta_attention_backward(
        dout, dfinal, *operands, saved, ctx.scale, cuts_N, initial_state
    )
    dg = dg if g.ndim > 1 else None
    dmomentum = None if momentum is None else dmomentum
    return *grads, dg, dmomentum, None, None, None if initial_state is None else dinitial, None


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
