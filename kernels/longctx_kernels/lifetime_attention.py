"""Attention in which every key has a lifetime: causal, packed, windowed, evicting, or in blocks.

Query i stands at position p_i and key j at c_j, both in rising order; key j is seen by query i iff
`c_j <= p_i < e_j`, where the expiry e_j may differ by key head (NEVER: the key stays for ever).
A partial result is (out, lse), lse the natural log-sum-exp, -inf where a query saw nothing.
"""

from types import ModuleType

import torch
from torch import Tensor

from longctx_kernels import lifetime_torch
from longctx_kernels.keeping import recalled
from longctx_kernels.launch import backend_of
from longctx_kernels.reweighted import REWEIGHTED, reweighted_attention
from longctx_kernels.score import NORMALISERS, Gradients, Score, bias_of, wide_dtype
from longctx_kernels.sight import NEVER, Sight

LARGEST_HEAD = 256


def lifetime_forward(
    q_THK: Tensor,
    k_UJK: Tensor,
    v_UJV: Tensor,
    sight: Sight,
    score: Score,
    wide: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Partial result (out [T, H, V], lse [T, H] fp32), out in fp32 if `wide`. No autograd."""
    path = _path(q_THK, backend)
    return path.forward((q_THK, k_UJK, v_UJV), sight, score, wide)


def lifetime_backward(
    dout_THV: Tensor,
    dlse_TH: Tensor | None,
    operands: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor],
    sight: Sight,
    score: Score,
    wide: bool = False,
    backend: str = "auto",
) -> Gradients:
    """Gradients given the final (out, lse) of the queries, in fp32 if `wide`; those of keys are
    of these keys alone, those of queries must be summed over key ranges."""
    path = _path(operands[0], backend)
    return path.backward((dout_THV, dlse_TH), operands, results, sight, score, wide)


def _path(q_THK: Tensor, backend: str) -> ModuleType:
    """The module that computes."""
    if backend_of(q_THK, backend) != "triton":
        return lifetime_torch
    from longctx_kernels import lifetime_triton

    return lifetime_triton


def merge(
    left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], normaliser: str = "softmax"
) -> tuple[Tensor, Tensor]:
    """Joins two partial results of the same queries over disjoint keys; two empty stay empty.

    Associative, and nothing seen (out 0, lse -inf, or 0 of sums) changes nothing on either side.
    """
    (left_out, left_lse), (right_out, right_lse) = left, right
    if normaliser in ("sigmoid", "relu"):
        return left_out + right_out, left_lse
    top_TH = torch.maximum(left_lse, right_lse).detach()
    # Gradients must not pass an infinity that both sides share: it would make them NaN.
    is_empty_TH = top_TH == -torch.inf
    top_TH = top_TH.masked_fill(is_empty_TH, 0.0)
    left_TH, right_TH = ((lse_TH - top_TH).exp() for lse_TH in (left_lse, right_lse))
    total_TH = (left_TH + right_TH).masked_fill(is_empty_TH, 1.0)
    left_share, right_share = ((x_TH / total_TH)[..., None] for x_TH in (left_TH, right_TH))
    lse_TH = (top_TH + total_TH.log()).masked_fill(is_empty_TH, -torch.inf)
    return left_out * left_share + right_out * right_share, lse_TH


def lifetime_reference(
    q_THK: Tensor,
    k_UJK: Tensor,
    v_UJV: Tensor,
    sight: Sight,
    score: Score,
) -> tuple[Tensor, Tensor]:
    """The definition, query by query in the operands' wide dtype; differentiable by autograd."""
    dtype = wide_dtype(q_THK)
    group = q_THK.shape[1] // k_UJK.shape[1]
    k_UHK, v_UHV = (x.to(dtype).repeat_interleave(group, 1) for x in (k_UJK, v_UJV))
    outs, sums = [], []
    for t in range(len(q_THK)):
        scores_HU = torch.einsum("hk,uhk->hu", q_THK[t].to(dtype), k_UHK) * score.scale
        bias_1UH = bias_of(score, slice(t, t + 1), slice(None), slice(None))
        if bias_1UH is not None:
            scores_HU = scores_HU + bias_1UH[0].T
        if score.slope_H is not None:
            distance_U = sight.key_positions - sight.query_positions[t]
            scores_HU = scores_HU + score.slope_H[:, None].to(dtype) * distance_U
        seen_HU = _seen_by(t, sight, k_UJK.shape[1]).repeat_interleave(group, 0)
        out, lse = _reference_row(scores_HU, seen_HU, v_UHV, score.normaliser)
        outs.append(out)
        sums.append(lse)
    return torch.stack(outs), torch.stack(sums)


def _seen_by(t: int, sight: Sight, key_heads: int) -> Tensor:
    """Keys that query t sees, [J, U]."""
    position = sight.query_positions[t]
    seen = (sight.key_positions <= position).expand(key_heads, -1)
    if sight.expiry is not None:
        seen = seen & (position < sight.expiry)
    if sight.blocks is not None:
        own = torch.arange(len(sight.key_positions), device=position.device) // sight.block_size
        listed_PL = sight.blocks[:, t // sight.block_size]
        seen = seen & (own[None, :, None] == listed_PL[:, None]).any(-1)
    return seen


def _reference_row(scores_HU, seen_HU, v_UHV, normaliser: str) -> tuple[Tensor, Tensor]:
    zero = torch.zeros_like(scores_HU)
    if normaliser in ("sigmoid", "relu"):
        weights_HU = scores_HU.sigmoid() if normaliser == "sigmoid" else scores_HU.relu()
        weights_HU = torch.where(seen_HU, weights_HU, zero)
        return torch.einsum("hu,uhv->hv", weights_HU, v_UHV), zero.sum(-1)
    sizes_HU, signs_HU = scores_HU, torch.ones_like(scores_HU)
    if normaliser == "signed":
        sizes_HU, signs_HU = scores_HU.abs(), scores_HU.sign()
    if normaliser == "softplus":
        sizes_HU = torch.logaddexp(scores_HU, zero).log()
    # Rows that see nothing are kept out of the log-sum-exp, whose gradient would be NaN there.
    sees_H1 = seen_HU.any(-1, keepdim=True)
    kept_HU = torch.where(seen_HU, sizes_HU, -torch.inf)
    kept_HU = torch.where(sees_H1, kept_HU, zero)
    lse_H1 = kept_HU.logsumexp(-1, keepdim=True)
    weights_HU = torch.where(sees_H1, (kept_HU - lse_H1).exp() * signs_HU, zero)
    lse_H = torch.where(sees_H1, lse_H1, -torch.inf)[:, 0]
    return torch.einsum("hu,uhv->hv", weights_HU, v_UHV), lse_H


def flash_lifetime(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    expiry: Tensor | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    key_bias: Tensor | None = None,
    query_bias: Tensor | None = None,
    slope: Tensor | None = None,
    normaliser: str = "softmax",
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention (out [B, T, H, V], lse [B, T, H]) of q [B, T, H, K] to k, v [B, U, J, K or V].

    Without positions, each row is causal by itself and `expiry` ([B, U] or [B, U, J]) counts
    tokens of its row. With positions ([1, T] and [1, U] int32, rising), B must be 1: number the
    tokens of a batch, or of packed documents, through. Biases are fp32 [B, U, H] and [B, T, H];
    slopes, fp32 [H] and without gradient, are times key position less query position. The
    normaliser "reweighted" has no kernels: any backend computes it in torch operations.
    """
    sight = sight_of((q, k, v), (expiry, query_positions, key_positions))
    return attend((q, k, v), sight, (key_bias, query_bias, slope), normaliser, scale, backend)


def attend(
    operands: tuple[Tensor, Tensor, Tensor],
    sight: Sight,
    biases: tuple[Tensor | None, Tensor | None, Tensor | None],
    normaliser: str,
    scale: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Checks what `sight_of` did not, and calls the custom op on flattened tokens."""
    (q, k, _), (key_bias, query_bias, slope) = operands, biases
    B, T, H, K = q.shape
    known = (*NORMALISERS, REWEIGHTED)
    if normaliser not in known:
        raise ValueError(f"normaliser {normaliser!r}: expected one of {', '.join(known)}")
    _check_bias("key_bias", key_bias, (*k.shape[:2], H))
    _check_bias("query_bias", query_bias, (B, T, H))
    _check_bias("slope", slope, (H,))
    scale = K**-0.5 if scale is None else scale
    flat = [None if x is None else x.flatten(0, 1) for x in (*operands, key_bias, query_bias)]
    if backend == "fla":
        raise ValueError("backend 'fla' has no lifetime attention: choose auto, torch or triton")
    if normaliser == REWEIGHTED:
        score = Score(scale, "softplus", *flat[3:], slope)
        out, lse = reweighted_attention((flat[0], flat[1], flat[2]), sight, score)
    else:
        out, lse = _forward_op(
            *flat[:3], sight.query_positions, sight.key_positions, sight.expiry, *flat[3:], slope,
            sight.blocks, sight.block_size, normaliser, scale, backend,
        )  # fmt: skip
    return out.unflatten(0, (B, T)), lse.unflatten(0, (B, T))


def _check_bias(name: str, bias: Tensor | None, shape: tuple[int, ...]) -> None:
    if bias is not None and (tuple(bias.shape) != shape or bias.dtype.itemsize < 4):
        raise ValueError(
            f"{name} must be fp32 of shape {shape}, got {bias.dtype} {tuple(bias.shape)}"
        )


def _check_operands(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not (q.dim() == k.dim() == v.dim() == 4):
        raise ValueError("q, k and v must be [batch, tokens, heads, size]")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"k {tuple(k.shape)} must have the rows and the head size of q {tuple(q.shape)}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v {tuple(v.shape)} must have the tokens and heads of k {tuple(k.shape)}")
    if q.shape[1] == 0 or k.shape[1] == 0:
        raise ValueError("q and k must have at least one token: leave out empty sequences")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q has {q.shape[2]} heads, which k's {k.shape[2]} must divide: repeat or drop heads"
        )
    if not (q.dtype == k.dtype == v.dtype):
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if max(q.shape[3], v.shape[3]) > LARGEST_HEAD:
        raise ValueError(
            f"head dim of q or v is {max(q.shape[3], v.shape[3])}: at most {LARGEST_HEAD}, "
            "use more heads"
        )


def sight_of(
    operands: tuple[Tensor, Tensor, Tensor],
    lifetimes: tuple[Tensor | None, Tensor | None, Tensor | None],
    blocks: Tensor | None = None,
    block_size: int = 0,
) -> Sight:
    """Checks operands and (expiry, query and key positions), and numbers all tokens through."""
    (q, k, v), (expiry, query_positions, key_positions) = operands, lifetimes
    _check_operands(q, k, v)
    B, T, J, U = *q.shape[:2], k.shape[2], k.shape[1]
    if expiry is not None and tuple(expiry.shape) not in ((B, U), (B, U, J)):
        raise ValueError(
            f"expiry must be {(B, U)} or, by key head, {(B, U, J)}, got {tuple(expiry.shape)}"
        )
    if (query_positions is None) != (key_positions is None):
        raise ValueError("give both query_positions and key_positions, or neither")
    if query_positions is None:
        query_positions, key_positions, expiry = _row_positions(q, k, expiry)
    else:
        _check_positions("query_positions", query_positions, B, T)
        _check_positions("key_positions", key_positions, B, U)
        query_positions, key_positions = query_positions.view(-1), key_positions.view(-1)
    if expiry is not None:
        expiry = expiry.flatten(0, 1).to(torch.int32)
        expiry = expiry.T.contiguous() if expiry.dim() == 2 else expiry
    positions = (x.to(torch.int32).contiguous() for x in (query_positions, key_positions))
    return Sight(*positions, expiry, blocks, block_size)


def _check_positions(name: str, positions: Tensor, B: int, count: int) -> None:
    if B != 1 or tuple(positions.shape) not in ((count,), (1, count)):
        raise ValueError(
            f"{name} must be [1, {count}] with a batch of 1, got {tuple(positions.shape)} with "
            f"{B} rows: put rows behind one another, at row * length + position"
        )


def _row_positions(q: Tensor, k: Tensor, expiry: Tensor | None):
    """Causal positions of rows put behind one another; keys expire with their row."""
    B, T = q.shape[:2]
    if k.shape[1] != T:
        raise ValueError(
            f"q has {T} tokens and k {k.shape[1]}: give query_positions and key_positions"
        )
    if B * T > NEVER:
        raise ValueError(f"q has {B * T} tokens in all: at most {NEVER}, use fewer rows")
    positions = torch.arange(B * T, dtype=torch.int32, device=q.device)
    if B == 1:
        return positions, positions.clone(), expiry
    row_start = torch.arange(0, B * T, T, dtype=torch.int32, device=q.device)[:, None]
    if expiry is None:
        expiry = torch.full((B, T), T, dtype=torch.int32, device=q.device)
    row_start = row_start[..., None] if expiry.dim() == 3 else row_start
    return positions, positions.clone(), expiry.clamp(max=T) + row_start


@torch.library.custom_op("longctx::lifetime_forward", mutates_args=())
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor, key_positions: Tensor,
    expiry: Tensor | None, key_bias: Tensor | None, query_bias: Tensor | None,
    slope: Tensor | None, blocks: Tensor | None, block_size: int,
    normaliser: str, scale: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sight = Sight(query_positions, key_positions, expiry, blocks, block_size)
    score = Score(scale, normaliser, key_bias, query_bias, slope)
    return recalled(lambda: lifetime_forward(q, k, v, sight, score, backend=backend))


@_forward_op.register_fake
def _(q, _k, v, *_others):
    shape = q.shape[:2]
    return v.new_empty(*shape, v.shape[-1]), q.new_empty(shape, dtype=wide_dtype(q))


@torch.library.custom_op("longctx::lifetime_backward", mutates_args=())
def _backward_op(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor, key_positions: Tensor,
    expiry: Tensor | None, key_bias: Tensor | None, query_bias: Tensor | None,
    slope: Tensor | None, blocks: Tensor | None, block_size: int,
    normaliser: str, scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    sight = Sight(query_positions, key_positions, expiry, blocks, block_size)
    score = Score(scale, normaliser, key_bias, query_bias, slope)
    grads = lifetime_backward(dout, dlse, (q, k, v), (out, lse), sight, score, backend=backend)
    # An op returns tensors only: an absent bias has a gradient of no elements.
    return *grads[:3], *(lse.new_zeros(0) if g is None else g for g in grads[3:])


@_backward_op.register_fake
def _(_dout, _dlse, _out, lse, q, k, v, _queries, _keys, _expiry, key_bias, query_bias, *_others):
    biases = (lse.new_empty(0) if b is None else _like(b) for b in (key_bias, query_bias))
    return *(_like(x) for x in (q, k, v)), *biases


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:10], *output)
    ctx.constants = inputs[10:]


def _differentiate(ctx, dout, dlse):
    *inputs, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, dkey, dquery = _backward_op(dout, dlse, out, lse, *inputs, *ctx.constants)
    biases = (None if b is None else g for b, g in zip(inputs[6:8], (dkey, dquery)))
    return dq, dk, dv, None, None, None, *biases, *(None,) * 6


_forward_op.register_autograd(_differentiate, setup_context=_save)
