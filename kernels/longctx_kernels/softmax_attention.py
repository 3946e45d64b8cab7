"""Causal softmax attention by tiles that return their log-sum-exp; optional window, shared heads.

`window = w > 0` shows each query its own key and the `w - 1` before it; 0 shows the whole past.
The first `persistent` keys, which are those of no token, are shown to every query.
H query heads share HKV key heads in groups of H / HKV. Tile operands are `[H, T, D]`.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from longctx_kernels.keeping import recalled
from longctx_kernels.lifetime_attention import merge
from longctx_kernels.pieces import piece_cuts

QUERY_TILE = 256
PERSISTENT_TILE = 4096
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def softmax_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int = 0,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    persistent: int = 0,
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
            first = max(start, t + 1 - window) if window else start
            seen = [*range(persistent), *range(persistent + first, persistent + t + 1)]
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
    persistent: int = 0,
) -> Tensor:
    """The same values by tiles; the backward pass reuses the saved output and log-sum-exp."""
    B, T, H, K = q.shape
    if persistent and B != 1:
        raise ValueError(f"persistent keys need B = 1 (flatten the batch), got B = {B}")
    if k.shape[:2] != (B, T + persistent) or v.shape[:3] != k.shape[:3] or H % k.shape[2]:
        raise ValueError(
            f"k and v must match q {tuple(q.shape)} with heads that divide {H}, "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    scale = K**-0.5 if scale is None else scale
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, B * T + 1, T, dtype=torch.int32)
    elif B != 1:
        raise ValueError(f"cu_seqlens needs B = 1 (flatten the batch), got B = {B}")
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return _forward_op(q, k, v, cu_seqlens, window, scale, persistent)[0].unflatten(0, (B, T))


def attend_tiles(
    q_MHK: Tensor,
    k_NJK: Tensor,
    v_NJV: Tensor,
    tiles: "tuple[Tile, ...]",
    scale: float | None = None,
) -> Tensor:
    """Attention of M queries to N keys as these tiles say."""
    scale = q_MHK.shape[-1] ** -0.5 if scale is None else scale
    by_head = (x.transpose(0, 1) for x in (q_MHK, k_NJK, v_NJV))
    return _SoftmaxAttention.apply(*by_head, tiles, scale).transpose(0, 1)


@torch.no_grad()
def softmax_attention_after(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, persistent: int = 0
) -> Tensor:
    """Generation: the T queries are those of the last T keys. No gradient."""
    T, U = q.shape[1], k.shape[1]
    tiles = (Tile(0, T, persistent, U, U - persistent - T, window), *_shown(T, persistent))
    rows = [_attended([x.transpose(0, 1) for x in row], tiles, scale)[0] for row in zip(q, k, v)]
    return torch.stack(rows).transpose(1, 2)


FULL = -1
"""The `lead` of a tile in which every query sees every key."""


@dataclass(frozen=True)
class Tile:
    """A range of queries, a range of keys, and who sees whom.

    Query i of the tile sees key j if `0 <= lead + i - j`, and `< window` if there is a window.
    The first tile of a query must leave none of its queries without a key; others are merged.
    """

    query_start: int
    query_stop: int
    key_start: int
    key_stop: int
    lead: int
    window: int = 0
    first: bool = True

    @property
    def queries(self) -> slice:
        return slice(self.query_start, self.query_stop)

    @property
    def keys(self) -> slice:
        return slice(self.key_start, self.key_stop)

    @property
    def is_causal_square(self) -> bool:
        sizes_agree = self.query_stop - self.query_start == self.key_stop - self.key_start
        return self.lead == 0 and not self.window and sizes_agree

    def mask(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Additive mask; none where every query sees every key."""
        if self.lead == FULL:
            return None
        sizes = (self.query_stop - self.query_start, self.key_stop - self.key_start)
        return _band_mask(*sizes, self.lead, self.window, dtype, device)


@lru_cache(maxsize=8)
def _band_mask(queries: int, keys: int, lead: int, window: int, dtype, device) -> Tensor:
    distance = lead + torch.arange(queries, device=device)[:, None]
    distance = distance - torch.arange(keys, device=device)
    hidden = (distance < 0) | ((distance >= window) if window else False)
    return torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)


@lru_cache(maxsize=64)
def plan_tiles(cuts: tuple[int, ...], window: int) -> tuple[Tile, ...]:
    """Tiles of whole pieces."""
    return tuple(
        tile
        for begin, end in zip(cuts, cuts[1:])
        for tile in piece_tiles(begin, end, begin, 0, window)
    )


def piece_tiles(begin: int, end: int, own_key: int, before: int, window: int) -> list[Tile]:
    """Tiles of queries `begin..end` whose own keys lie from `own_key` on, after `before` more.

    One causal square and what lies before it, or bands with just the keys that a window shows.
    """
    length = end - begin
    if not window or before + length <= window:
        tiles = [Tile(begin, end, own_key, own_key + length, 0)]
        if before:
            tiles.append(Tile(begin, end, own_key - before, own_key, FULL, first=False))
        return tiles
    tiles = []
    for start in range(0, length, QUERY_TILE):
        stop = min(length, start + QUERY_TILE)
        seen = max(-before, start + 1 - window)
        keys = (own_key + seen, own_key + stop)
        tiles.append(Tile(begin + start, begin + stop, *keys, start - seen, window))
    return tiles


def with_persistent(tiles: tuple[Tile, ...], queries: int, persistent: int) -> tuple[Tile, ...]:
    """The tiles when `persistent` keys that every query sees come before the others."""
    moved = (
        replace(t, key_start=t.key_start + persistent, key_stop=t.key_stop + persistent)
        for t in tiles
    )
    return (*moved, *_shown(queries, persistent)) if persistent else tiles


def _shown(queries: int, persistent: int) -> tuple[Tile, ...]:
    if not persistent:
        return ()
    bounds = [*range(0, queries, PERSISTENT_TILE), queries]
    return tuple(
        Tile(start, stop, 0, persistent, FULL, first=False)
        for start, stop in zip(bounds, bounds[1:])
    )


class _SoftmaxAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_HTK, k_JTK, v_JTV, tiles, scale):
        results = recalled(lambda: _attended((q_HTK, k_JTK, v_JTV), tiles, scale))
        ctx.save_for_backward(q_HTK, k_JTK, v_JTV, *results)
        ctx.tiles, ctx.scale = tiles, scale
        return results[0]

    @staticmethod
    def backward(ctx, dout_HTV):
        *operands, out_HTV, lse_HT = ctx.saved_tensors
        results = out_HTV, lse_HT
        return *_gradients(dout_HTV, operands, results, ctx.tiles, ctx.scale), None, None


def _attended(operands, tiles, scale) -> tuple[Tensor, Tensor]:
    """(out, lse) of tiles that cover all queries."""
    q_HTK, _, v_JTV = operands
    out_HTV = v_JTV.new_empty(*q_HTK.shape[:2], v_JTV.shape[-1])
    lse_HT = torch.empty(q_HTK.shape[:2], dtype=_wide(q_HTK), device=q_HTK.device)
    attend(operands, (out_HTV, lse_HT), tiles, scale)
    return out_HTV, lse_HT


def _gradients(dout_HTV, operands, results, tiles, scale) -> tuple[Tensor, ...]:
    """Those of q, k, v, in their dtypes."""
    everything = slice(0, operands[0].shape[1]), slice(0, operands[1].shape[1])
    if len(tiles) == 1 and (tiles[0].queries, tiles[0].keys) == everything:
        # Nothing to add to: sums would take as much memory once more.
        grads = tile_backward(dout_HTV, operands, results, tiles[0], scale)
    else:
        grads = tuple(torch.zeros_like(x, dtype=results[1].dtype) for x in operands)
        attend_backward(dout_HTV, operands, results, grads, tiles, scale)
    return tuple(dx.to(x.dtype) for dx, x in zip(grads, operands))


def _tiles_of(cuts_N: Tensor, q_MHK: Tensor, window: int, persistent: int) -> tuple[Tile, ...]:
    tiles = plan_tiles(piece_cuts(1, q_MHK.shape[0], cuts_N), window)
    return with_persistent(tiles, q_MHK.shape[0], persistent)


@torch.library.custom_op("longctx::softmax_attention", mutates_args=())
def _forward_op(
    q_MHK: Tensor, k_MJK: Tensor, v_MJV: Tensor, cuts_N: Tensor, window: int, scale: float,
    persistent: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out `[M, H, V]`, lse `[H, M]`); the cuts lie on the CPU and are no part of a graph."""

    def attended() -> tuple[Tensor, Tensor]:
        operands = tuple(x.transpose(0, 1) for x in (q_MHK, k_MJK, v_MJV))
        out_HMV, lse_HM = _attended(operands, _tiles_of(cuts_N, q_MHK, window, persistent), scale)
        return out_HMV.transpose(0, 1).contiguous(), lse_HM

    return recalled(attended)


@_forward_op.register_fake
def _(q_MHK, _k, v_MJV, *_others):
    M, H, _ = q_MHK.shape
    lse_HM = q_MHK.new_empty(H, M, dtype=_wide(q_MHK))
    return v_MJV.new_empty(M, H, v_MJV.shape[-1]), lse_HM


@torch.library.custom_op("longctx::softmax_attention_backward", mutates_args=())
def _backward_op(
    dout_MHV: Tensor, operands: list[Tensor], results: list[Tensor], cuts_N: Tensor,
    window: int, scale: float, persistent: int,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v."""
    dout_HMV, *by_head = (x.transpose(0, 1) for x in (dout_MHV, *operands, results[0]))
    *by_head, out_HMV = by_head
    tiles = _tiles_of(cuts_N, operands[0], window, persistent)
    grads = _gradients(dout_HMV, tuple(by_head), (out_HMV, results[1]), tiles, scale)
    return [dx.transpose(0, 1).contiguous() for dx in grads]


@_backward_op.register_fake
def _(_dout, operands, *_others):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in operands]


def _keep(ctx, inputs, output) -> None:
    *operands, cuts_N, ctx.window, ctx.scale, ctx.persistent = inputs
    ctx.save_for_backward(*operands, *output, cuts_N)


def _differentiate(ctx, dout, _dlse):
    q, k, v, out, lse, cuts_N = ctx.saved_tensors
    options = (ctx.window, ctx.scale, ctx.persistent)
    grads = _backward_op(dout, [q, k, v], [out, lse], cuts_N, *options)
    return *grads, None, None, None, None


_forward_op.register_autograd(_differentiate, setup_context=_keep)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def attend(operands, results, tiles, scale) -> None:
    """Computes tiles of q, k, v into (out, lse); queries met before are merged."""
    (q_HTK, k_JTK, v_JTV), (out_HTV, lse_HT) = operands, results
    for tile in tiles:
        rows = tile.queries
        out, lse = tile_forward(
            q_HTK[:, rows], k_JTK[:, tile.keys], v_JTV[:, tile.keys], tile, scale
        )
        if not tile.first:
            out, lse = merge((out_HTV[:, rows], lse_HT[:, rows]), (out, lse))
        out_HTV[:, rows], lse_HT[:, rows] = out, lse


def attend_backward(dout_HTV, operands, results, gradients, tiles, scale) -> None:
    """Adds the gradients of tiles to those of q, k, v, given the final (out, lse)."""
    (q_HTK, k_JTK, v_JTV), (out_HTV, lse_HT) = operands, results
    dq_HTK, dk_JTK, dv_JTV = gradients
    for tile in tiles:
        rows, keys = tile.queries, tile.keys
        dq, dk, dv = tile_backward(
            dout_HTV[:, rows],
            (q_HTK[:, rows], k_JTK[:, keys], v_JTV[:, keys]),
            (out_HTV[:, rows], lse_HT[:, rows]),
            tile,
            scale,
        )
        dq_HTK[:, rows] += dq
        dk_JTK[:, keys] += dk
        dv_JTV[:, keys] += dv


def _has_flash(q_HTK: Tensor, v_JTV: Tensor) -> bool:
    return q_HTK.device.type == "cpu" and q_HTK.shape[-1] == v_JTV.shape[-1]


def tile_forward(q_HTK, k_JTK, v_JTV, tile, scale) -> tuple[Tensor, Tensor]:
    """Output and natural log-sum-exp of one tile."""
    if _has_flash(q_HTK, v_JTV):
        out, lse = _FLASH(
            q_HTK[None], k_JTK[None], v_JTV[None], **_flash_options(q_HTK, tile, scale)
        )
        return out[0], lse[0]
    scores_HTJ, v_HJV = _scores(q_HTK, k_JTK, tile, scale), _per_query_head(q_HTK, v_JTV)
    lse_HT = scores_HTJ.logsumexp(-1)
    out_HTV = (scores_HTJ - lse_HT[..., None]).exp() @ v_HJV
    return out_HTV.to(v_JTV.dtype), lse_HT


def tile_backward(dout_HTV, operands, results, tile, scale) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one tile's q, k, v, given the final output and log-sum-exp of its queries."""
    (q_HTK, k_JTK, v_JTV), (out_HTV, lse_HT) = operands, results
    if _has_flash(q_HTK, v_JTV):
        narrow = (x.to(q_HTK.dtype) for x in (dout_HTV, q_HTK, k_JTK, v_JTV, out_HTV))
        saved = (x[None] for x in (*narrow, lse_HT))
        grads = _FLASH_BACKWARD(*saved, **_flash_options(q_HTK, tile, scale))
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
    return x_JTD.to(_wide(q_HTK)).repeat_interleave(q_HTK.shape[0] // x_JTD.shape[0], 0)


def _scores(q_HTK: Tensor, k_JTK: Tensor, tile: Tile, scale: float) -> Tensor:
    k_HJK = _per_query_head(q_HTK, k_JTK)
    scores_HTJ = q_HTK.to(k_HJK.dtype) @ k_HJK.mT * scale
    mask = tile.mask(scores_HTJ.dtype, scores_HTJ.device)
    return scores_HTJ if mask is None else scores_HTJ + mask


def _flash_options(q_HTK: Tensor, tile: Tile, scale: float) -> dict:
    causal = tile.is_causal_square
    mask = None if causal else tile.mask(q_HTK.dtype, q_HTK.device)
    return {"dropout_p": 0.0, "is_causal": causal, "attn_mask": mask, "scale": scale}
