"""Lifetime attention in torch operations, by tiles that skip what no query of them sees."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from longctx_kernels.score import Gradients, Score, wide_dtype
from longctx_kernels.sight import Sight

QUERY_TILE = 256
KEY_TILE = 64
Operands = tuple[Tensor, Tensor, Tensor]


class _Tile(NamedTuple):
    """Queries and keys of some key heads (of group query heads each) that are met at once."""

    rows: slice
    columns: Tensor
    key_heads: slice
    heads: slice


def _tiles(sight: Sight, operands: Operands) -> Iterator[_Tile]:
    """Tiles that cover all pairs that see each other; queries that see nothing are left out."""
    q_THK, k_UJK, _ = operands
    J, group = k_UJK.shape[1], q_THK.shape[1] // k_UJK.shape[1]
    blocks, query_tile, key_tile = _visits(sight)
    heads_each = J if len(blocks) == 1 else 1
    offsets = torch.arange(key_tile, device=q_THK.device)
    for plan, rows_of_plan in enumerate(blocks):
        key_heads = slice(plan * heads_each, (plan + 1) * heads_each)
        heads = slice(key_heads.start * group, key_heads.stop * group)
        for m, visited in enumerate(rows_of_plan):
            start = m * query_tile
            columns = torch.tensor(visited, dtype=torch.int64, device=q_THK.device)
            columns = (columns[:, None] * key_tile + offsets).flatten()
            columns = columns[columns < len(k_UJK)]
            rows = slice(start, min(start + query_tile, len(q_THK)))
            if len(visited):
                yield _Tile(rows, columns, key_heads, heads)


def _visits(sight: Sight) -> tuple[list[list[list[int]]], int, int]:
    """Key blocks that each query tile of each plan visits, and the sizes of both."""
    if sight.blocks is not None:
        keys, counts, *_ = sight.lists()
        visited = [
            [row[:count] for row, count in zip(*plan)]
            for plan in zip(keys.tolist(), counts.tolist())
        ]
        return visited, sight.block_size, sight.block_size
    ranges = sight.ranges(QUERY_TILE, KEY_TILE).tolist()
    visited = [[[*range(a, b), *range(c, d)] for a, b, c, _, _, d in plan] for plan in ranges]
    return visited, QUERY_TILE, KEY_TILE


def _tile_scores(tile: _Tile, operands, sight: Sight, score: Score) -> tuple[Tensor, Tensor]:
    """Scores [J, G, t, u] and which pairs see each other, in a shape that broadcasts to that."""
    q_tHK, k_uJK, _ = _tile_operands(tile, operands)
    J = k_uJK.shape[1]
    q_JGtK = q_tHK.unflatten(1, (J, -1)).permute(1, 2, 0, 3)
    scores_JGtu = q_JGtK @ k_uJK.permute(1, 2, 0)[:, None] * score.scale
    if score.key_bias_UH is not None:
        bias_uH = score.key_bias_UH[tile.columns][:, tile.heads].to(scores_JGtu.dtype)
        scores_JGtu = scores_JGtu + bias_uH.T.unflatten(0, (J, -1))[:, :, None]
    if score.query_bias_TH is not None:
        bias_tH = score.query_bias_TH[tile.rows, tile.heads].to(scores_JGtu.dtype)
        scores_JGtu = scores_JGtu + bias_tH.T.unflatten(0, (J, -1))[..., None]
    positions_t1 = sight.query_positions[tile.rows, None]
    seen = sight.key_positions[tile.columns] <= positions_t1
    if sight.expires_by_head:
        seen = seen & (positions_t1 < sight.expiry[tile.key_heads, None, tile.columns])
        return scores_JGtu, seen[:, None]
    if sight.expiry is not None:
        seen = seen & (positions_t1 < sight.expiry[tile.columns])
    return scores_JGtu, seen


def _tile_operands(tile: _Tile, operands) -> tuple[Tensor, Tensor, Tensor]:
    q_THK, k_UJK, v_UJV = operands
    dtype = wide_dtype(q_THK)
    q_tHK = q_THK[tile.rows, tile.heads].to(dtype)
    return q_tHK, *(x[tile.columns][:, tile.key_heads].to(dtype) for x in (k_UJK, v_UJV))


def forward(operands: Operands, sight: Sight, score: Score, wide: bool) -> tuple[Tensor, Tensor]:
    """(out [T, H, V], lse [T, H])."""
    q_THK, _, v_UJV = operands
    dtype = wide_dtype(q_THK)
    out_THV = torch.zeros(*q_THK.shape[:2], v_UJV.shape[-1], dtype=dtype, device=q_THK.device)
    lse_TH = torch.zeros(q_THK.shape[:2], dtype=dtype, device=q_THK.device)
    if not score.is_sum:
        lse_TH.fill_(-torch.inf)
    for tile in _tiles(sight, operands):
        scores, seen = _tile_scores(tile, operands, sight, score)
        lse = _log_sum(scores, seen, score.normaliser)
        weights, _ = _weights(scores, seen, lse, score.normaliser)
        v_JuV = _tile_operands(tile, operands)[2].transpose(0, 1)
        out_JGtV = weights @ v_JuV[:, None]
        out_THV[tile.rows, tile.heads] = out_JGtV.flatten(0, 1).transpose(0, 1)
        lse_TH[tile.rows, tile.heads] = lse.flatten(0, 1).T
    return out_THV if wide else out_THV.to(v_UJV.dtype), lse_TH


def _log_sum(scores: Tensor, seen: Tensor, normaliser: str) -> Tensor:
    """lse [J, G, t] of a tile that holds all keys of its queries."""
    if normaliser in ("sigmoid", "relu"):
        return scores.new_zeros(scores.shape[:-1])
    if normaliser == "softplus":
        return F.softplus(scores, threshold=40).masked_fill(~seen, 0.0).sum(-1).log()
    sizes = scores.abs() if normaliser == "signed" else scores
    return sizes.masked_fill(~seen, -torch.inf).logsumexp(-1)


def _weights(scores, seen, lse, normaliser: str) -> tuple[Tensor, tuple[Tensor, Tensor] | Tensor]:
    """Weights of values, and (a, b) such that dscore = a * dweight - b * delta."""
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]
    if normaliser == "softmax":
        weights = slope = drop = (scores.masked_fill(~seen, -torch.inf) - lse).exp()
    elif normaliser == "signed":
        slope = (scores.abs().masked_fill(~seen, -torch.inf) - lse).exp() * (scores != 0)
        weights = drop = slope * scores.sign()
    elif normaliser == "softplus":
        share = (-lse).exp()
        weights, slope = F.softplus(scores, threshold=40) * share, scores.sigmoid() * share
        weights, slope = (x.masked_fill(~seen, 0.0) for x in (weights, slope))
        drop = slope
    elif normaliser == "sigmoid":
        weights = scores.sigmoid().masked_fill(~seen, 0.0)
        slope, drop = weights * (1 - weights), torch.zeros_like(weights)
    else:
        weights = scores.relu().masked_fill(~seen, 0.0)
        slope, drop = (weights > 0).to(weights.dtype), torch.zeros_like(weights)
    return weights, (slope, drop)


def backward(
    cotangents: tuple[Tensor, Tensor | None],
    operands: Operands,
    results: tuple[Tensor, Tensor],
    sight: Sight,
    score: Score,
    wide: bool,
) -> Gradients:
    """Gradients of operands and biases, given (dout, dlse) and (out, lse)."""
    (dout_THV, dlse_TH), (out_THV, lse_TH) = cotangents, results
    dtype = wide_dtype(operands[0])
    dq_THK, dk_UJK, dv_UJV = (torch.zeros_like(x, dtype=dtype) for x in operands)
    biases = score.key_bias_UH, score.query_bias_TH
    dkey_bias, dquery_bias = (None if b is None else torch.zeros_like(b) for b in biases)
    dout_THV = dout_THV.to(dtype)
    delta_TH = (dout_THV * out_THV).sum(-1)
    if dlse_TH is not None:
        delta_TH = delta_TH - dlse_TH
    for tile in _tiles(sight, operands):
        scores, seen = _tile_scores(tile, operands, sight, score)
        J = scores.shape[0]
        by_head = (x[tile.rows, tile.heads].unflatten(1, (J, -1)) for x in (lse_TH, delta_TH))
        lse_JGt, delta_JGt = (x.permute(1, 2, 0) for x in by_head)
        weights, (slope, drop) = _weights(scores, seen, lse_JGt, score.normaliser)
        q_tHK, k_uJK, v_uJV = _tile_operands(tile, operands)
        dout_JGtV = dout_THV[tile.rows, tile.heads].unflatten(1, (J, -1)).permute(1, 2, 0, 3)
        dweights = dout_JGtV @ v_uJV.permute(1, 2, 0)[:, None]
        dscores_JGtu = slope * dweights - drop * delta_JGt[..., None]
        dq_JGtK = dscores_JGtu @ k_uJK.transpose(0, 1)[:, None] * score.scale
        dq_THK[tile.rows, tile.heads] += dq_JGtK.flatten(0, 1).transpose(0, 1)
        q_JGtK = q_tHK.unflatten(1, (J, -1)).permute(1, 2, 0, 3)
        dk_JuK = (dscores_JGtu.mT @ q_JGtK).sum(1) * score.scale
        dk_UJK[:, tile.key_heads].index_add_(0, tile.columns, dk_JuK.transpose(0, 1))
        dv_JuV = (weights.mT @ dout_JGtV).sum(1)
        dv_UJV[:, tile.key_heads].index_add_(0, tile.columns, dv_JuV.transpose(0, 1))
        if dkey_bias is not None:
            db_uH = dscores_JGtu.sum(2).flatten(0, 1).T.to(dkey_bias.dtype)
            dkey_bias[:, tile.heads].index_add_(0, tile.columns, db_uH)
        if dquery_bias is not None:
            dquery_bias[tile.rows, tile.heads] += dscores_JGtu.sum(3).flatten(0, 1).T
    grads = (dq_THK, dk_UJK, dv_UJV)
    grads = grads if wide else tuple(g.to(x.dtype) for g, x in zip(grads, operands))
    return Gradients(*grads, dkey_bias, dquery_bias)
