"""Lifetime attention in torch operations, by tiles that skip what no query of them sees."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from longctx_kernels.score import Gradients, Score, bias_of, wide_dtype
from longctx_kernels.sight import Sight

QUERY_TILE = 128
KEY_TILE = 64
Operands = tuple[Tensor, Tensor, Tensor]


class _Tile(NamedTuple):
    """Queries and keys of some key heads (of group query heads each) that are met at once."""

    rows: slice
    columns: Tensor | slice
    key_heads: slice
    heads: slice


class _Edge(NamedTuple):
    """The first position of a tile, and the ends of keys up to its first and its last query."""

    first: int
    old: int
    stop: int


def _tiles(sight: Sight, operands: Operands) -> Iterator[_Tile]:
    """Tiles that cover all pairs that see each other; queries that see nothing are left out.

    A tile holds the same keys whatever comes after its first query: sums round differently with
    other keys among them, even masked ones, and a query would feel tokens after it. So keys that
    are dead at the first query are left out, and those that come after it never are.
    """
    q_THK, k_UJK, _ = operands
    J, group = k_UJK.shape[1], q_THK.shape[1] // k_UJK.shape[1]
    size = QUERY_TILE if sight.blocks is None else sight.block_size
    candidates = _ranges(sight) if sight.blocks is None else _listed(sight)
    edges, expiries = _edges(sight, size), _expiries(sight, len(candidates))
    heads_each = J if len(candidates) == 1 else 1
    for plan, (tiles, expiry_U) in enumerate(zip(candidates, expiries)):
        key_heads = slice(plan * heads_each, (plan + 1) * heads_each)
        heads = slice(key_heads.start * group, key_heads.stop * group)
        for m, (candidate, edge) in enumerate(zip(tiles, edges)):
            rows = slice(m * size, min((m + 1) * size, len(q_THK)))
            if sight.blocks is None:
                columns = _live_in_ranges(candidate, edge, expiry_U)
            else:
                columns = _live_in_blocks(candidate, size, edge, expiry_U)
            if columns is not None:
                yield _Tile(rows, columns, key_heads, heads)


def _edges(sight: Sight, size: int) -> list[_Edge]:
    """Of each tile of `size` queries."""
    positions = sight.query_positions
    starts = torch.arange(0, len(positions), size, device=positions.device)
    first, last = positions[starts], positions[(starts + size - 1).clamp(max=len(positions) - 1)]
    counts = (torch.searchsorted(sight.key_positions, p, right=True) for p in (first, last))
    return [_Edge(*edge) for edge in zip(first.tolist(), *(n.tolist() for n in counts))]


def _expiries(sight: Sight, plans: int) -> Iterable[Tensor | None]:
    """When a key has left all heads of a plan, [U] for each plan."""
    if sight.expiry is None:
        return [None] * plans
    expiry_PU = sight.expiry.view(-1, len(sight.key_positions))
    return expiry_PU.amax(0, keepdim=True) if plans == 1 else expiry_PU.expand(plans, -1)


def _ranges(sight: Sight) -> list[list[list[slice]]]:
    """Keys of each tile of each plan that may be alive: two ranges."""
    found = sight.ranges(QUERY_TILE, KEY_TILE).mul(KEY_TILE).tolist()
    return [[[slice(a, b), slice(c, d)] for a, b, c, _, _, d in plan] for plan in found]


def _listed(sight: Sight) -> list[list[Tensor]]:
    """Key blocks of each tile of each plan."""
    keys_PML, counts_PM, *_ = sight.lists()
    counts = counts_PM.tolist()
    return [[row[:n] for row, n in zip(*plan)] for plan in zip(keys_PML, counts)]


def _live_in_ranges(
    ranges: list[slice], edge: _Edge, expiry_U: Tensor | None
) -> Tensor | slice | None:
    """Keys of a tile, in `ranges` or after its first query."""
    if expiry_U is None:
        return slice(0, edge.stop) if edge.stop else None
    found = []
    for keys in ranges:
        old = expiry_U[keys.start : min(keys.stop, edge.old)]
        found.append((old > edge.first).nonzero()[:, 0] + keys.start)
    found.append(torch.arange(edge.old, edge.stop, device=expiry_U.device))
    return _compact(torch.cat(found))


def _live_in_blocks(
    blocks: Tensor, size: int, edge: _Edge, expiry_U: Tensor | None
) -> Tensor | slice | None:
    """Keys of a tile, in these blocks of `size` keys."""
    columns = (blocks[:, None] * size + torch.arange(size, device=blocks.device)).flatten()
    columns = columns[columns < edge.stop]
    if expiry_U is not None:
        columns = columns[(columns >= edge.old) | (expiry_U[columns] > edge.first)]
    return _compact(columns)


def _compact(columns: Tensor) -> Tensor | slice | None:
    """A slice if the columns have no gap, None if there is no column."""
    if not len(columns):
        return None
    first, last = columns[[0, -1]].tolist()
    return slice(first, last + 1) if last - first < len(columns) else columns


def _tile_scores(tile: _Tile, operands, sight: Sight, score: Score) -> tuple[Tensor, Tensor]:
    """Scores [J, G, t, u] and which pairs see each other, in a shape that broadcasts to that."""
    q_tHK, k_uJK, _ = _tile_operands(tile, operands)
    J = k_uJK.shape[1]
    scores_JGtu = _by_key_head(q_tHK * score.scale, J) @ k_uJK.permute(1, 2, 0)
    scores_JGtu = scores_JGtu.unflatten(1, (-1, len(q_tHK)))
    bias_tuH = bias_of(score, tile.rows, tile.columns, tile.heads)
    if bias_tuH is not None:
        bias_Htu = bias_tuH.to(scores_JGtu.dtype).movedim(-1, 0)
        scores_JGtu = scores_JGtu + bias_Htu.unflatten(0, (J, -1))
    positions_t1 = sight.query_positions[tile.rows, None]
    positions_u = sight.key_positions[tile.columns]
    if score.slope_H is not None:
        slope_JG11 = score.slope_H[tile.heads].view(J, -1, 1, 1).to(scores_JGtu.dtype)
        scores_JGtu = scores_JGtu + slope_JG11 * (positions_u - positions_t1)
    seen = positions_u <= positions_t1
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
    keys, values = (_rows(x, tile.columns)[:, tile.key_heads].to(dtype) for x in (k_UJK, v_UJV))
    return q_tHK, keys, values


def _rows(x_UJK: Tensor, columns: Tensor | slice) -> Tensor:
    return x_UJK[columns] if isinstance(columns, slice) else x_UJK.index_select(0, columns)


def _by_key_head(x_tHK: Tensor, key_heads: int) -> Tensor:
    """[J, G * t, K]: the rows of all query heads that read a key head."""
    return x_tHK.unflatten(1, (key_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _by_token(x_JgK: Tensor, tokens: int) -> Tensor:
    """[t, H, K] again."""
    return x_JgK.unflatten(1, (-1, tokens)).flatten(0, 1).transpose(0, 1)


def _add(total_UJK: Tensor, columns: Tensor | slice, x_uJK: Tensor) -> None:
    if isinstance(columns, slice):
        total_UJK[columns] += x_uJK
    else:
        # Whole rows are added faster than a slice of each.
        whole = total_UJK.is_contiguous()
        total, x = (y.flatten(1) if whole else y for y in (total_UJK, x_uJK))
        total.index_add_(0, columns, x)


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
        v_JuV = _tile_operands(tile, operands)[2].transpose(0, 1)
        if score.normaliser == "softmax":
            weights, total, lse = _softmax(scores, seen)
            out_JgV = (weights.flatten(1, 2) @ v_JuV).div_(total.flatten(1, 2))
        else:
            lse = _log_sum(scores, seen, score.normaliser)
            weights, _ = _weights(scores, seen, lse, score.normaliser)
            out_JgV = weights.flatten(1, 2) @ v_JuV
        out_THV[tile.rows, tile.heads] = _by_token(out_JgV, weights.shape[2])
        lse_TH[tile.rows, tile.heads] = lse.flatten(0, 1).T
    return out_THV if wide else out_THV.to(v_UJV.dtype), lse_TH


def _softmax(scores: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of a tile that holds all keys of its queries, by what they are too large, and lse;
    overwrites scores."""
    _hide(scores, seen)
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top.masked_fill(top == -torch.inf, 0.0)).exp_()
    total = weights.sum(-1, keepdim=True)
    return weights, total.masked_fill(total == 0, 1.0), (top + total.log())[..., 0]


def _hide(scores: Tensor, seen: Tensor) -> None:
    """Overwrites what is not seen with -inf, leaving out keys that all queries see."""
    shown = seen.flatten(0, -2).all(0).nonzero()[:, 0]
    first, last = shown[[0, -1]].tolist() if len(shown) else (0, -1)
    if last - first >= len(shown):
        first, last = 0, -1
    for keys in (slice(0, first), slice(last + 1, None)):
        scores[..., keys].masked_fill_(~seen[..., keys], -torch.inf)


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
        _hide(scores, seen)
        weights = slope = drop = scores.sub_(lse).exp_()
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
        dout_JgV = _by_key_head(dout_THV[tile.rows, tile.heads], J)
        dweights = (dout_JgV @ v_uJV.permute(1, 2, 0)).view_as(scores)
        if slope is drop:
            dscores_JGtu = dweights.sub_(delta_JGt[..., None]).mul_(slope)
        else:
            dscores_JGtu = slope * dweights - drop * delta_JGt[..., None]
        dscores_Jgu, weights_Jgu = (x.flatten(1, 2) for x in (dscores_JGtu, weights))
        dq_JgK = dscores_Jgu @ k_uJK.transpose(0, 1) * score.scale
        dq_THK[tile.rows, tile.heads] += _by_token(dq_JgK, len(q_tHK))
        dk_JuK = dscores_Jgu.mT @ _by_key_head(q_tHK * score.scale, J)
        _add(dk_UJK[:, tile.key_heads], tile.columns, dk_JuK.transpose(0, 1))
        dv_JuV = weights_Jgu.mT @ dout_JgV
        _add(dv_UJV[:, tile.key_heads], tile.columns, dv_JuV.transpose(0, 1))
        _add_to_biases((dkey_bias, dquery_bias), tile, dscores_JGtu.flatten(0, 1))
    grads = (dq_THK, dk_UJK, dv_UJV)
    grads = grads if wide else tuple(g.to(x.dtype) for g, x in zip(grads, operands))
    return Gradients(*grads, dkey_bias, dquery_bias)


def _add_to_biases(biases: tuple[Tensor | None, ...], tile: _Tile, dscores_Htu: Tensor) -> None:
    dkey_bias, dquery_bias = biases
    if dkey_bias is not None:
        db_uH = dscores_Htu.sum(1).T.to(dkey_bias.dtype)
        _add(dkey_bias[:, tile.heads], tile.columns, db_uH)
    if dquery_bias is not None:
        dquery_bias[tile.rows, tile.heads] += dscores_Htu.sum(2).T
