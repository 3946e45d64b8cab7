"""Linear attention with decay: none, constant per head, or per token, scalar or diagonal.

Per head `S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T` and `o_t = scale S_t^T q_t`. Two custom ops,
one forward and one backward, so that compilers and checkpointing see them whole.
"""

import torch
from torch import Tensor

from longctx_kernels import decay_torch
from longctx_kernels.launch import backend_of
from longctx_kernels.pieces import piece_cuts


def decay_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    gk: Tensor | None = None,
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
    decay_MHK1 = gate_of_tokens(q, g, g_gamma, gk).exp()
    if decay_MHK1.ndim == 1:
        decay_MHK1 = decay_MHK1.expand(B * T, H)
    decay_MHK1 = decay_MHK1.reshape(B * T, H, -1, 1)
    cuts = piece_cuts(B, T, cu_seqlens)
    outputs, finals = [], []
    for piece, (start, stop) in enumerate(zip(cuts, cuts[1:])):
        state_HKV = q_MHK.new_zeros(H, K, V)
        if initial_state is not None:
            state_HKV = initial_state[piece].to(dtype)
        for t in range(start, stop):
            state_HKV = decay_MHK1[t] * state_HKV + k_MHK[t, :, :, None] @ v_MHV[t, :, None, :]
            outputs.append(scale * (q_MHK[t, :, None, :] @ state_HKV)[:, 0])
        finals.append(state_HKV)
    out = torch.stack(outputs).view(B, T, H, V).to(v.dtype)
    return out, torch.stack(finals) if output_final_state else None


def decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    gk: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The same values by chunks; gradients reach all but `g_gamma`.

    `g` `[B, T, H]`, `gk` `[B, T, H, K]` or `g_gamma` `[H]`: at most one log decay, never positive.
    """
    check_operands(q, k, v, initial_state, cu_seqlens)
    B, T, H, K = q.shape
    scale = K**-0.5 if scale is None else float(scale)
    gate = gate_of_tokens(q, g, g_gamma, gk)
    # Other choices are resolved within the op, out of a compiler's sight.
    if backend == "fla":
        backend_of(q, backend)
        return _fla((q, k, v, g, g_gamma, gk), scale, initial_state, output_final_state, cu_seqlens)
    cuts = torch.arange(B + 1) * T if cu_seqlens is None else cu_seqlens
    if cu_seqlens is not None and B != 1:
        raise ValueError(f"cu_seqlens needs B = 1 (flatten the batch), got B = {B}")
    flat = (q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
    out, _, final = torch.ops.longctx.decay_attention(
        *flat, gate, scale, cuts, initial_state, output_final_state, backend
    )
    return out.view(B, T, H, -1), final if output_final_state else None


def by_kind(log_decay: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """A log decay as the arguments g `[B, T, H]`, g_gamma `[H]` and gk `[B, T, H, K]`."""
    rank = 0 if log_decay is None else log_decay.ndim
    return tuple(log_decay if rank == kind else None for kind in (3, 1, 4))


def passes_of(backend: str):
    """The module with the passes of a backend, "torch" or "triton"."""
    if backend == "torch":
        return decay_torch
    from longctx_kernels import decay_triton

    return decay_triton


def check_operands(q, k, v, initial_state, cu_seqlens, state_dim: int = 0) -> None:
    """Raises ValueError, naming the argument, if these do not fit; states have K rows or others."""
    if q.ndim != 4 or k.shape != q.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        shapes = f"{tuple(k.shape)} and {tuple(v.shape)}"
        raise ValueError(f"k and v must match q {tuple(q.shape)} [B, T, H, K], got {shapes}")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"k and v must have q's dtype {q.dtype}, got {k.dtype} and {v.dtype}")
    if q.shape[1] < 1:
        raise ValueError(f"q must hold at least one token, got T = {q.shape[1]}")
    if cu_seqlens is not None and (cu_seqlens.ndim != 1 or cu_seqlens.dtype.is_floating_point):
        got = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        raise ValueError(f"cu_seqlens must be a vector of ints, got {got}")
    if cu_seqlens is not None and cu_seqlens.device.type != "cpu":
        raise ValueError(
            "cu_seqlens must be on the CPU: reading it from the device would wait for it; "
            "pass the CPU tensor it was made from"
        )
    if initial_state is not None:
        pieces = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        shape = (pieces, q.shape[2], state_dim or q.shape[3], v.shape[3])
        if tuple(initial_state.shape) != shape:
            got = tuple(initial_state.shape)
            raise ValueError(f"initial_state must be [N, H, K, V] = {shape}, got {got}")


def gate_of_tokens(q, g, g_gamma, gk) -> Tensor:
    """The one gate of flat tokens in the dtype of states, `[H]`, `[T, H]` or `[T, H, K]`."""
    B, T, H, K = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    shapes = {"g": (B, T, H), "g_gamma": (H,), "gk": (B, T, H, K)}
    given = {n: x for n, x in zip(shapes, (g, g_gamma, gk)) if x is not None}
    if len(given) > 1:
        raise ValueError(f"at most one of g, g_gamma and gk can be given, got {', '.join(given)}")
    for name, x in given.items():
        if tuple(x.shape) != shapes[name]:
            raise ValueError(f"{name} must be {shapes[name]}, got {tuple(x.shape)}")
        return x.detach().to(dtype) if name == "g_gamma" else x.to(dtype).flatten(0, 1)
    return torch.zeros(H, dtype=dtype, device=q.device)


def _host_cuts(q_THK: Tensor, cuts_N: Tensor) -> tuple[int, ...]:
    return piece_cuts(1, q_THK.shape[0], cuts_N)


@torch.library.custom_op("longctx::decay_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    cuts_N: Tensor,
    initial_state: Tensor | None,
    output_final_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, states that the backward pass wants, and final states, if asked, else nothing."""
    cuts, backend = _host_cuts(q, cuts_N), backend_of(q, backend)
    if backend == "torch":
        out, saved, final = decay_torch.decay_forward(
            q, k, v, g, scale, cuts, initial_state, output_final_state
        )
        return out, saved, g.new_zeros(0) if final is None else final
    passes = passes_of(backend)
    with torch.autocast(q.device.type, enabled=False):
        starts, final = passes.state_pass(k, v, g, cuts, initial_state)
        out, saved = passes.output_pass(q, k, v, g, scale, cuts, starts, initial_state)
    return out, saved, final if output_final_state else g.new_zeros(0)


@_forward.register_fake
def _(q, k, v, g, scale, cuts_N, initial_state, output_final_state, backend):  # noqa: ARG001
    backend = backend_of(q, backend)
    (T, H, K), V, N = q.shape, v.shape[2], cuts_N.shape[0] - 1
    final = g.new_empty(N, H, K, V) if output_final_state else g.new_empty(0)
    if backend == "torch":
        saved = g.new_empty(decay_torch.saved_rows(T, N, H * max(K, V)), H, K, V)
    else:
        rows = T // passes_of(backend).chunk_size(K, V, q.device) + N
        saved = q.new_empty(rows, H, K, V)
    return v.new_empty(v.shape), saved, final


@torch.library.custom_op("longctx::decay_attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    saved: Tensor,
    final: Tensor,
    scale: float,
    cuts_N: Tensor,
    initial_state: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the gate (nothing if constant) and the initial state (or nothing)."""
    cuts, backend = _host_cuts(q, cuts_N), backend_of(q, backend)
    edges = (initial_state, dfinal)
    if backend == "torch":
        operands = (q, k, v, g)
        *grads, dG, dinitial = decay_torch.decay_backward(
            dout, operands, scale, cuts, saved, *edges
        )
    else:
        passes = passes_of(backend)
        with torch.autocast(q.device.type, enabled=False):
            ends, dinitial = passes.dstate_pass(q, dout, g, scale, cuts, dfinal)
            *grads, dG = passes.gradient_pass(q, k, v, g, scale, cuts, dout, saved, ends, *edges)
    dg = g.new_zeros(0)
    if dG is not None:
        if dfinal is not None:
            decay_torch.add_at_ends(dG, cuts, (final * dfinal).sum(-1))
        dg = decay_torch.log_decay_gradient(dG, cuts)
    if initial_state is None:
        return *grads, dg, g.new_zeros(0)
    return *grads, dg, dinitial.to(initial_state.dtype)


@_backward.register_fake
def _(dout, dfinal, q, k, v, g, saved, final, scale, cuts_N, initial_state, backend):  # noqa: ARG001
    dg = g.new_empty(0) if g.ndim == 1 else g.new_empty(g.shape)
    dinitial = g.new_empty(0)
    if initial_state is not None:
        dinitial = initial_state.new_empty(initial_state.shape)
    return *(x.new_empty(x.shape) for x in (q, k, v)), dg, dinitial


def _keep(ctx, inputs, output) -> None:
    q, k, v, g, ctx.scale, cuts_N, initial_state, ctx.has_final, ctx.backend = inputs
    _, saved, final = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, g, saved, final, cuts_N, initial_state)


def _differentiate(ctx, dout, _, dfinal):
    q, k, v, g, saved, final, cuts_N, initial_state = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(v)
    dfinal = dfinal if ctx.has_final else None
    dq, dk, dv, dg, dinitial = torch.ops.longctx.decay_attention_backward(
        dout, dfinal, q, k, v, g, saved, final, ctx.scale, cuts_N, initial_state, ctx.backend
    )
    dg = dg if g.ndim > 1 else None
    dinitial = dinitial if initial_state is not None else None
    return dq, dk, dv, dg, None, None, dinitial, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def _fla(operands, scale, initial_state, output_final_state, cu_seqlens):
    """By flash-linear-attention's kernels."""
    try:
        from fla.ops.gla import chunk_gla
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError as error:
        raise ValueError("backend 'fla' needs the extra `fla`: pip install longctx[fla]") from error
    q, k, v, g, g_gamma, gk = operands
    cuts = None if cu_seqlens is None else cu_seqlens.to(q.device)
    common = {
        "scale": scale,
        "initial_state": initial_state,
        "output_final_state": output_final_state,
        "cu_seqlens": cuts,
    }
    if gk is not None:
        return chunk_gla(q, k, v, g=gk, **common)
    if g is None and g_gamma is None:
        g_gamma = torch.zeros(q.shape[2], dtype=torch.float32, device=q.device)
    return chunk_simple_gla(q, k, v, g=g, g_gamma=g_gamma, **common)
