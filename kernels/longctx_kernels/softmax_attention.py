"""Causal softmax attention by tiles that return their log-sum-exp; optional window, shared heads.

`window = w > 0` shows each query its own key and the `w - 1` before it; 0 shows the whole past.
H query heads share HKV key heads in groups of H / HKV. Tile operands are `[H, T, D]`.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from longctx_kernels.pieces import piece_cuts

QUERY_TILE = 256
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def softmax_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int = 0,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The definition, query by query; differentiable by autograd."""
    B, T, H, K = q.shape
    group = H // k.shape[2]
    scale = K**-0.5 if scale is None else scale
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_MHK = q.to(dtype).flatten(0, 1)
    k_MHK, v_MHV = (x.to(dtype).flatten(0, 1).repeat_interleave(group, 1) for x in (k, v))
    cuts = piece_cuts(B, T, cu_seqlens)
    outputs = []
    for start, stop in zip(cuts, cuts[1:]):
        for t in range(start, stop):
            seen = slice(max(start, t + 1 - window) if window else start, t + 1)
            scores_H1J = q_MHK[t, :, None, :] @ k_MHK[seen].permute(1, 2, 0) * scale
            outputs.append((scores_H1J.softmax(-1) @ v_MHV[seen].transpose(0, 1))[:, 0])
    return torch.stack(outputs).view(B, T, H, -1).to(v.dtype)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int = 0,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The same values by tiles; the backward pass reuses the saved output and log-sum-exp."""
    B, T, H, K = q.shape
    if k.shape[:2] != (B, T) or v.shape[:3] != k.shape[:3] or H % k.shape[2]:
        raise ValueError(
            f"k and v must match q {tuple(q.shape)} with heads that divide {H}, "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    scale = K**-0.5 if scale is None else scale
    tiles = plan_tiles(piece_cuts(B, T, cu_seqlens), window)
    flat = (x.flatten(0, 1).transpose(0, 1) for x in (q, k, v))
    return _SoftmaxAttention.apply(*flat, tiles, scale).transpose(0, 1).unflatten(0, (B, T))


@torch.no_grad()
def softmax_attention_after(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """Generation: the T queries are those of the last T keys. No gradient."""
    tile = Tile(k.shape[1] - q.shape[1], 0, k.shape[1], window)
    rows = [
        tile_forward(*(x.transpose(0, 1) for x in row), tile, scale)[0]
        for row in zip(q, k, v, strict=True)
    ]
    return torch.stack(rows).transpose(1, 2)


@dataclass(frozen=True)
class Tile:
    """A range of queries and the range of keys it meets; both end at the same token."""

    query_start: int
    key_start: int
    stop: int
    window: int

    @property
    def queries(self) -> slice:
        return slice(self.query_start, self.stop)

    @property
    def keys(self) -> slice:
        return slice(self.key_start, self.stop)

    @property
    def is_causal_square(self) -> bool:
        return self.query_start == self.key_start and not self.window

    def mask(self, like: Tensor) -> Tensor | None:
        """Additive mask; none where the tile is a plain causal square."""
        if self.is_causal_square:
            return None
        sizes = (self.stop - self.query_start, self.stop - self.key_start)
        return _band_mask(*sizes, self.window, like.dtype, like.device)


@lru_cache(maxsize=8)
def _band_mask(queries: int, keys: int, window: int, dtype, device) -> Tensor:
    i = torch.arange(keys - queries, keys, device=device)[:, None]
    j = torch.arange(keys, device=device)
    hidden = (j > i) | ((i - j >= window) if window else False)
    return torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)


@lru_cache(maxsize=64)
def plan_tiles(cuts: tuple[int, ...], window: int) -> tuple[Tile, ...]:
    """One causal square a piece, or bands of queries with just the keys a window lets them see."""
    tiles = []
    for begin, end in zip(cuts, cuts[1:]):
        if not window or end - begin <= window:
            tiles.append(Tile(begin, begin, end, 0))
            continue
        for start in range(begin, end, QUERY_TILE):
            tiles.append(
                Tile(start, max(begin, start + 1 - window), min(end, start + QUERY_TILE), window)
            )
    return tuple(tiles)


class _SoftmaxAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_HTK, k_JTK, v_JTV, tiles, scale):
        out_HTV = v_JTV.new_empty(*q_HTK.shape[:2], v_JTV.shape[-1])
        dtype = torch.promote_types(q_HTK.dtype, torch.float32)
        lse_HT = torch.empty(q_HTK.shape[:2], dtype=dtype, device=q_HTK.device)
        for tile in tiles:
            out_HTV[:, tile.queries], lse_HT[:, tile.queries] = tile_forward(
                q_HTK[:, tile.queries], k_JTK[:, tile.keys], v_JTV[:, tile.keys], tile, scale
            )
        ctx.save_for_backward(q_HTK, k_JTK, v_JTV, out_HTV, lse_HT)
        ctx.tiles, ctx.scale = tiles, scale
        return out_HTV

    @staticmethod
    def backward(ctx, dout_HTV):
        q_HTK, k_JTK, v_JTV, out_HTV, lse_HT = ctx.saved_tensors
        dq_HTK = torch.empty_like(q_HTK, memory_format=torch.contiguous_format)
        dk_JTK, dv_JTV = (torch.zeros_like(x, dtype=lse_HT.dtype) for x in (k_JTK, v_JTV))
        for tile in ctx.tiles:
            dq, dk, dv = tile_backward(
                dout_HTV[:, tile.queries],
                (q_HTK[:, tile.queries], k_JTK[:, tile.keys], v_JTV[:, tile.keys]),
                (out_HTV[:, tile.queries], lse_HT[:, tile.queries]),
                tile,
                ctx.scale,
            )
            dq_HTK[:, tile.queries] = dq
            dk_JTK[:, tile.keys] += dk
            dv_JTV[:, tile.keys] += dv
        return dq_HTK, dk_JTK.to(k_JTK.dtype), dv_JTV.to(v_JTV.dtype), None, None


def _has_flash(q_HTK: Tensor, v_JTV: Tensor) -> bool:
    return q_HTK.device.type == "cpu" and q_HTK.shape[-1] == v_JTV.shape[-1]


def tile_forward(q_HTK, k_JTK, v_JTV, tile, scale) -> tuple[Tensor, Tensor]:
    """Output and natural log-sum-exp of one tile."""
    mask = tile.mask(q_HTK)
    if _has_flash(q_HTK, v_JTV):
        out, lse = _FLASH(
            q_HTK[None], k_JTK[None], v_JTV[None], 0.0, mask is None, attn_mask=mask, scale=scale
        )
        return out[0], lse[0]
    scores_HTJ, v_HJV = _scores(q_HTK, k_JTK, tile, scale), _per_query_head(q_HTK, v_JTV)
    lse_HT = scores_HTJ.logsumexp(-1)
    out_HTV = (scores_HTJ - lse_HT[..., None]).exp() @ v_HJV
    return out_HTV.to(v_JTV.dtype), lse_HT


def tile_backward(dout_HTV, operands, results, tile, scale) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one tile's q, k, v, given the final output and log-sum-exp of its queries."""
    (q_HTK, k_JTK, v_JTV), (out_HTV, lse_HT) = operands, results
    mask = tile.mask(q_HTK)
    if _has_flash(q_HTK, v_JTV):
        saved = (x[None] for x in (dout_HTV, q_HTK, k_JTK, v_JTV, out_HTV, lse_HT))
        grads = _FLASH_BACKWARD(*saved, 0.0, mask is None, attn_mask=mask, scale=scale)
        return tuple(x[0] for x in grads)
    dtype = lse_HT.dtype
    dout_HTV = dout_HTV.to(dtype)
    probs_HTJ = (_scores(q_HTK, k_JTK, tile, scale) - lse_HT[..., None]).exp()
    delta_HT1 = (dout_HTV * out_HTV.to(dtype)).sum(-1, keepdim=True)
    dscores_HTJ = probs_HTJ * (dout_HTV @ _per_query_head(q_HTK, v_JTV).mT - delta_HT1) * scale
    dq_HTK = dscores_HTJ @ _per_query_head(q_HTK, k_JTK)
    dk_HJK, dv_HJV = dscores_HTJ.mT @ q_HTK.to(dtype), probs_HTJ.mT @ dout_HTV
    groups = (k_JTK.shape[0], -1)
    return dq_HTK, dk_HJK.unflatten(0, groups).sum(1), dv_HJV.unflatten(0, groups).sum(1)


def _per_query_head(q_HTK: Tensor, x_JTD: Tensor) -> Tensor:
    dtype = torch.promote_types(q_HTK.dtype, torch.float32)
    return x_JTD.to(dtype).repeat_interleave(q_HTK.shape[0] // x_JTD.shape[0], 0)


def _scores(q_HTK: Tensor, k_JTK: Tensor, tile: Tile, scale: float) -> Tensor:
    k_HJK = _per_query_head(q_HTK, k_JTK)
    scores_HTJ = q_HTK.to(k_HJK.dtype) @ k_HJK.mT * scale
    if tile.is_causal_square:
        size = tile.stop - tile.query_start
        return scores_HTJ + _band_mask(size, size, 0, scores_HTJ.dtype, scores_HTJ.device)
    return scores_HTJ + tile.mask(scores_HTJ)
