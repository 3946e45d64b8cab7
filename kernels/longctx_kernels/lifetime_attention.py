"""Attention in which every key has a lifetime: causal, packed, windowed, evicting, or in blocks.

Query i stands at position p_i and key j at c_j, both in rising order; key j is seen by query i iff
`c_j <= p_i < e_j`, where the expiry e_j may differ by key head (NEVER: the key stays for ever).
A partial result is (out, lse), lse the natural log-sum-exp, -inf where a query saw nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from longctx_kernels.launch import backend_of

NEVER = 2**31 - 1
NORMALISERS = ("softmax", "sigmoid", "relu", "softplus", "signed")
LARGEST_HEAD = 256
QUERY_TILE = 256
KEY_TILE = 64


@dataclass(frozen=True)
class Score:
    """`scale * q . k + key bias + query bias`, and what makes weights of it.

    "signed" weights are sign(s) exp|s| / sum exp|s|; "softplus" ones softplus(s) over their sum;
    "sigmoid" and "relu" ones are not normalised, and their lse is 0.
    """

    scale: float
    normaliser: str = "softmax"
    key_bias_UH: Tensor | None = None
    query_bias_TH: Tensor | None = None

    @property
    def is_sum(self) -> bool:
        """Whether partial results just add up."""
        return self.normaliser in ("sigmoid", "relu")


class Gradients(NamedTuple):
    """Gradients of the operands; none for a bias that is not there."""

    dq_THK: Tensor
    dk_UJK: Tensor
    dv_UJV: Tensor
    dkey_bias_UH: Tensor | None = None
    dquery_bias_TH: Tensor | None = None


class Lists(NamedTuple):
    """Listed key blocks per plan and query block, first in the row, and the same by key block.

    `queries[offsets[plan * key_blocks + n] : offsets[... + 1]]` are the query blocks of block n.
    """

    keys_PML: Tensor
    counts_PM: Tensor
    offsets: Tensor
    queries: Tensor


@dataclass(frozen=True)
class Sight:
    """Who sees whom: int32 positions [T] and [U], rising; expiry None, [U] or [J, U].

    With `blocks` [1 or J, query blocks, L] (-1: no block) a query sees, of those keys, only ones
    in the key blocks listed for its own block of `block_size` queries.
    """

    query_positions: Tensor
    key_positions: Tensor
    expiry: Tensor | None = None
    blocks: Tensor | None = None
    block_size: int = 0
    _kept: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def is_by_head(self) -> bool:
        """Whether plans differ by key head."""
        return _has_heads(self.blocks) if self.blocks is not None else self.expires_by_head

    @property
    def expires_by_head(self) -> bool:
        """Whether key heads have expiries of their own."""
        return self.expiry is not None and self.expiry.dim() == 2

    def ranges(self, query_block: int, key_block: int) -> Tensor:
        """Per plan and query block, int32: sink start, stop; start, whole start, whole stop, stop.

        In units of key blocks. Whole ones are seen by all queries of the block.
        """
        key = ("ranges", query_block, key_block)
        if key not in self._kept:
            self._kept[key] = self._key_ranges(query_block, key_block)
        return self._kept[key]

    def block_expiry(self, key_block: int) -> Tensor:
        """Latest expiry in each key block, int32 [plans, key blocks]."""
        return self._expiries(key_block)[0]

    def transposed(self, query_block: int, key_block: int) -> Tensor:
        """Per plan and key block, int32: start, whole start, whole stop, stop in query blocks."""
        key = ("transposed", query_block, key_block)
        if key not in self._kept:
            self._kept[key] = self._query_ranges(query_block, key_block)
        return self._kept[key]

    def lists(self) -> Lists:
        """The listed blocks, without doubles, as kernels read them."""
        if "lists" not in self._kept:
            key_blocks = -(-len(self.key_positions) // self.block_size)
            self._kept["lists"] = _arrange_lists(self.blocks, key_blocks)
        return self._kept["lists"]

    def _expiries(self, key_block: int) -> tuple[Tensor, Tensor]:
        """Latest and earliest expiry per plan and key block."""
        key = ("expiries", key_block)
        if key not in self._kept:
            expiry = self.expiry
            if expiry is None:
                expiry = torch.full_like(self.key_positions, NEVER)
            expiry_PU = expiry.view(-1, len(self.key_positions))
            spare = -expiry_PU.shape[1] % key_block
            latest = F.pad(expiry_PU, (0, spare), value=-NEVER).unflatten(1, (-1, key_block))
            earliest = F.pad(expiry_PU, (0, spare), value=NEVER).unflatten(1, (-1, key_block))
            self._kept[key] = latest.amax(-1).contiguous(), earliest.amin(-1).contiguous()
        return self._kept[key]

    def _key_ranges(self, query_block: int, key_block: int) -> Tensor:
        p_first, p_last = _ends(self.query_positions, query_block)
        seen_by_last = torch.searchsorted(self.key_positions, p_last, right=True)
        seen_by_all = torch.searchsorted(self.key_positions, p_first, right=True)
        latest, earliest = self._expiries(key_block)
        p_first, p_last = (p.expand(latest.shape[0], -1) for p in (p_first, p_last))
        some = _Search(latest)
        every = _Search(earliest)
        stop = ((seen_by_last + key_block - 1) // key_block).expand_as(p_first)
        # The first run of blocks with a live key is apart from the rest if a dead block follows.
        sink_start = some.first(torch.zeros_like(stop), p_first, above=True).minimum(stop)
        sink_stop = some.first(sink_start, p_first, above=False).minimum(stop)
        start = some.first(sink_stop, p_first, above=True).minimum(stop)
        is_one_run = start >= stop
        start = torch.where(is_one_run, sink_start, start)
        stop = torch.where(is_one_run, sink_stop, stop)
        sink_stop = torch.where(is_one_run, sink_start, sink_stop)
        whole_start = every.first(start, p_last, above=True).minimum(stop)
        whole_stop = every.first(whole_start, p_last, above=False)
        whole_stop = whole_stop.minimum((seen_by_all // key_block).expand_as(stop)).minimum(stop)
        has_whole = whole_stop > whole_start
        whole_start, whole_stop = (
            torch.where(has_whole, x, start) for x in (whole_start, whole_stop)
        )
        fields = (sink_start, sink_stop, start, whole_start, whole_stop, stop)
        return torch.stack(fields, -1).to(torch.int32).contiguous()

    def _query_ranges(self, query_block: int, key_block: int) -> Tensor:
        c_first, c_last = _ends(self.key_positions, key_block)
        latest, earliest = self._expiries(key_block)
        start, after = (
            torch.searchsorted(self.query_positions, x).expand_as(latest) for x in (c_first, c_last)
        )
        stop, whole_stop = (torch.searchsorted(self.query_positions, x) for x in (latest, earliest))
        start, whole_stop = start // query_block, whole_stop // query_block
        # The last query block may be short; if all its queries see the keys it is masked anyway.
        stop = (stop + query_block - 1) // query_block
        stop = torch.maximum(start, stop)
        whole_start = (after + query_block - 1) // query_block
        has_whole = whole_stop > whole_start
        whole_start, whole_stop = (
            torch.where(has_whole, x, start) for x in (whole_start, whole_stop)
        )
        fields = (start, whole_start, whole_stop, stop)
        return torch.stack(fields, -1).to(torch.int32).contiguous()


def _has_heads(x: Tensor) -> bool:
    return x.shape[0] > 1


def _ends(positions: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """First and last position of each block."""
    count = len(positions)
    first = torch.arange(0, count, block, device=positions.device)
    return positions[first], positions[(first + block - 1).clamp(max=count - 1)]


class _Search:
    """Finds, in rows of values [P, N], the first from an index on that is (not) above a bound.

    `levels[s]` holds the largest and the smallest of each run of 2^s values.
    """

    def __init__(self, values_PN: Tensor):
        self.count = values_PN.shape[1]
        self.levels = [(values_PN, values_PN)]
        for step in range((self.count - 1).bit_length()):
            largest, smallest = self.levels[-1]
            nxt = (torch.arange(self.count, device=values_PN.device) + 2**step).clamp(
                max=self.count - 1
            )
            self.levels.append(
                (largest.maximum(largest[:, nxt]), smallest.minimum(smallest[:, nxt]))
            )

    def first(self, start_PM: Tensor, bound_PM: Tensor, above: bool) -> Tensor:
        """Index >= start of the first value above (or not above) the bound; N if none is."""
        index = start_PM.clone()
        for step in range(len(self.levels) - 1, -1, -1):
            largest, smallest = self.levels[step]
            at = index.clamp(max=self.count - 1)
            # A run in which none qualifies is jumped over.
            if above:
                is_jumped = largest.gather(1, at) <= bound_PM
            else:
                is_jumped = smallest.gather(1, at) > bound_PM
            index = torch.where(is_jumped & (index < self.count), index + 2**step, index)
        return index.clamp(max=self.count)


def _arrange_lists(blocks_PML: Tensor, key_blocks: int) -> Lists:
    P, M, L = blocks_PML.shape
    is_real = (blocks_PML >= 0) & (blocks_PML < key_blocks)
    keys = blocks_PML.masked_fill(~is_real, key_blocks).sort(-1)[0]
    # A block listed twice counts once.
    is_double = F.pad(keys[..., 1:] == keys[..., :-1], (1, 0), value=False)
    keys = keys.masked_fill(is_double, key_blocks).sort(-1)[0].to(torch.int32).contiguous()
    is_real = keys < key_blocks
    plan = torch.arange(P, device=keys.device)[:, None, None]
    owners = (plan * key_blocks + keys).masked_fill(~is_real, P * key_blocks).flatten()
    owners, order = owners.sort(stable=True)
    bounds = torch.arange(P * key_blocks + 1, device=keys.device)
    offsets = torch.searchsorted(owners, bounds).to(torch.int32)
    queries = (order // L % M).to(torch.int32)
    return Lists(keys, is_real.sum(-1, dtype=torch.int32), offsets, queries)


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
    operands = q_THK, k_UJK, v_UJV
    if backend_of(q_THK, backend) == "triton":
        from longctx_kernels import lifetime_triton

        return lifetime_triton.forward(operands, sight, score, wide)
    return _torch_forward(operands, sight, score, wide)


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
    if backend_of(operands[0], backend) == "triton":
        from longctx_kernels import lifetime_triton

        return lifetime_triton.backward(dout_THV, dlse_TH, operands, results, sight, score, wide)
    return _torch_backward(dout_THV, dlse_TH, operands, results, sight, score, wide)


def merge(
    left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], normaliser: str = "softmax"
) -> tuple[Tensor, Tensor]:
    """Joins two partial results of the same queries over disjoint keys; two empty stay empty."""
    (left_out, left_lse), (right_out, right_lse) = left, right
    if normaliser in ("sigmoid", "relu"):
        return left_out + right_out, left_lse
    lse_TH = torch.logaddexp(left_lse, right_lse)
    finite_TH = lse_TH.masked_fill(lse_TH == -torch.inf, 0.0)
    left_share = (left_lse - finite_TH).exp()[..., None]
    right_share = (right_lse - finite_TH).exp()[..., None]
    return left_out * left_share + right_out * right_share, lse_TH


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _Tile(NamedTuple):
    """Queries and keys of some key heads (of group query heads each) that are met at once."""

    rows: slice
    columns: Tensor
    key_heads: slice
    heads: slice


def _tiles(sight: Sight, operands: tuple[Tensor, Tensor, Tensor]) -> Iterator[_Tile]:
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
    dtype = _wide(q_THK)
    q_tHK = q_THK[tile.rows, tile.heads].to(dtype)
    return q_tHK, *(x[tile.columns][:, tile.key_heads].to(dtype) for x in (k_UJK, v_UJV))


def _torch_forward(operands, sight: Sight, score: Score, wide: bool) -> tuple[Tensor, Tensor]:
    q_THK, _, v_UJV = operands
    dtype = _wide(q_THK)
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


def _torch_backward(dout_THV, dlse_TH, operands, results, sight, score, wide) -> Gradients:
    out_THV, lse_TH = results
    dtype = _wide(operands[0])
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


def lifetime_reference(
    q_THK: Tensor,
    k_UJK: Tensor,
    v_UJV: Tensor,
    sight: Sight,
    score: Score,
) -> tuple[Tensor, Tensor]:
    """The definition, query by query in the operands' wide dtype; differentiable by autograd."""
    dtype = _wide(q_THK)
    group = q_THK.shape[1] // k_UJK.shape[1]
    k_UHK, v_UHV = (x.to(dtype).repeat_interleave(group, 1) for x in (k_UJK, v_UJV))
    outs, sums = [], []
    for t in range(len(q_THK)):
        scores_HU = torch.einsum("hk,uhk->hu", q_THK[t].to(dtype), k_UHK) * score.scale
        if score.key_bias_UH is not None:
            scores_HU = scores_HU + score.key_bias_UH.T
        if score.query_bias_TH is not None:
            scores_HU = scores_HU + score.query_bias_TH[t][:, None]
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
        sizes_HU = (1 + scores_HU.exp()).log().log()
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
    normaliser: str = "softmax",
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention (out [B, T, H, V], lse [B, T, H]) of q [B, T, H, K] to k, v [B, U, J, K or V].

    Without positions, each row is causal by itself and `expiry` ([B, U] or [B, U, J]) counts
    tokens of its row. With positions ([1, T] and [1, U] int32, rising), B must be 1: number the
    tokens of a batch, or of packed documents, through. Biases are fp32 [B, U, H] and [B, T, H].
    """
    sight = _public_sight(q, k, v, expiry, query_positions, key_positions)
    return _apply(q, k, v, sight, key_bias, query_bias, normaliser, scale, backend)


def _apply(q, k, v, sight, key_bias, query_bias, normaliser, scale, backend):
    """Checks what is left to check, and calls the custom op on flattened tokens."""
    B, T, H, K = q.shape
    if normaliser not in NORMALISERS:
        raise ValueError(f"normaliser {normaliser!r}: expected one of {', '.join(NORMALISERS)}")
    _check_bias("key_bias", key_bias, (*k.shape[:2], H))
    _check_bias("query_bias", query_bias, (B, T, H))
    scale = K**-0.5 if scale is None else scale
    flat = [None if x is None else x.flatten(0, 1) for x in (q, k, v, key_bias, query_bias)]
    if backend == "fla":
        raise ValueError("backend 'fla' has no lifetime attention: choose auto, torch or triton")
    out, lse = _forward_op(
        *flat[:3], sight.query_positions, sight.key_positions, sight.expiry, *flat[3:],
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


def _public_sight(q, k, v, expiry, query_positions, key_positions, blocks=None, block_size=0):
    """Checks operands and positions, and numbers the tokens of all rows through."""
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
    blocks: Tensor | None, block_size: int, normaliser: str, scale: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sight = Sight(query_positions, key_positions, expiry, blocks, block_size)
    score = Score(scale, normaliser, key_bias, query_bias)
    return lifetime_forward(q, k, v, sight, score, backend=backend)


@_forward_op.register_fake
def _(q, _k, v, *_others):
    shape = q.shape[:2]
    return v.new_empty(*shape, v.shape[-1]), q.new_empty(shape, dtype=_wide(q))


@torch.library.custom_op("longctx::lifetime_backward", mutates_args=())
def _backward_op(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor, key_positions: Tensor,
    expiry: Tensor | None, key_bias: Tensor | None, query_bias: Tensor | None,
    blocks: Tensor | None, block_size: int, normaliser: str, scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    sight = Sight(query_positions, key_positions, expiry, blocks, block_size)
    score = Score(scale, normaliser, key_bias, query_bias)
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
    ctx.save_for_backward(*inputs[:9], *output)
    ctx.constants = inputs[9:]


def _differentiate(ctx, dout, dlse):
    *inputs, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, dkey, dquery = _backward_op(dout, dlse, out, lse, *inputs, *ctx.constants)
    biases = (None if b is None else g for b, g in zip(inputs[6:8], (dkey, dquery)))
    return dq, dk, dv, None, None, None, *biases, *(None,) * 5


_forward_op.register_autograd(_differentiate, setup_context=_save)
