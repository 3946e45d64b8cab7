"""Attention to listed key blocks in torch operations: block by block, all queries that list it.

Queries of a block come in tiles of a fixed number of rows, the last of which is filled up with
zeros, and what blocks contribute to a query is added in their order: what a query gets does not
depend on what other queries hold or list.
"""

from collections.abc import Iterator
from itertools import pairwise
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from longctx_kernels.score import wide_dtype
from longctx_kernels.selected_blocks_lists import Selection

TILE_ROWS = 32
"""A product has so many rows or a multiple: query heads that share keys, of several queries."""
TILE_ELEMENTS = 1 << 18
"""Most scores that are laid out at once, unless one tile has more."""
HEAD_STEP = 4
"""Heads are filled up to a multiple, or products of a row would depend on its place in a tile."""

Operands = tuple[Tensor, Tensor, Tensor]


class _Part(NamedTuple):
    """Some of the queries that list a block: its row in `_by_block`, those of the queries in
    `_by_pair`, how many tiles they fill, and which keys are hidden from which, if any is."""

    block: int
    pairs_m: Tensor
    tiles: int
    hidden_mu: Tensor | None

    def tiled(self, x_MGD: Tensor, fill: float = 0.0) -> Tensor:
        """Rows of these queries in tiles, [tiles, rows, D]."""
        _, G, D = x_MGD.shape
        rows = x_MGD.new_empty(self.tiles * _queries_of_tile(G), G, D)
        torch.index_select(x_MGD, 0, self.pairs_m, out=rows[: len(self.pairs_m)])
        rows[len(self.pairs_m) :] = fill
        return rows.view(self.tiles, -1, D)

    def rows_of(self, x_tgD: Tensor, group: int) -> Tensor:
        """Rows of these queries out of tiles, [queries, G, D]."""
        return x_tgD.view(-1, group, x_tgD.shape[-1])[: len(self.pairs_m)]

    def hide(self, x_tgu: Tensor, group: int, fill: float) -> None:
        """Overwrites what is hidden."""
        if self.hidden_mu is not None:
            self.rows_of(x_tgu, group).masked_fill_(self.hidden_mu[:, None], fill)


def _queries_of_tile(group: int) -> int:
    """So that tiles have a multiple of TILE_ROWS rows: products depend on how these are aligned."""
    return TILE_ROWS // gcd(TILE_ROWS, group)


def _by_block(x_UJD: Tensor, selection: Selection) -> Tensor:
    """[J * (key blocks + 1), block size, padded D] in the wide dtype: blocks by key head, behind
    them one of zeros."""
    x_UJD = x_UJD.to(wide_dtype(x_UJD))
    padded_UJD = F.pad(x_UJD, (0, -x_UJD.shape[2] % HEAD_STEP, 0, 0, 0, selection.block_size))
    x_JnuD = padded_UJD.unflatten(0, (-1, selection.block_size)).permute(2, 0, 1, 3)
    return x_JnuD.flatten(0, 1).contiguous()


def _from_blocks(x_nuD: Tensor, like_UJD: Tensor) -> Tensor:
    """The inverse of `_by_block`, without the block of zeros."""
    _, J, D = like_UJD.shape
    x_JnuD = x_nuD.unflatten(0, (J, -1))[:, :-1, :, :D]
    return x_JnuD.permute(1, 2, 0, 3).reshape(like_UJD.shape).to(like_UJD.dtype).contiguous()


def _by_pair(x_NHD: Tensor, key_heads: int) -> Tensor:
    """[N * J, G, padded D] in the wide dtype."""
    x_NHD = F.pad(x_NHD.to(wide_dtype(x_NHD)), (0, -x_NHD.shape[2] % HEAD_STEP))
    return x_NHD.reshape(-1, x_NHD.shape[1] // key_heads, x_NHD.shape[2])


def _from_pairs(x_MGD: Tensor, heads: int, size: int) -> Tensor:
    """The inverse of `_by_pair`, [N, H, size]."""
    return x_MGD.view(-1, heads, x_MGD.shape[-1])[..., :size]


def _parts(selection: Selection, group: int) -> Iterator[_Part]:
    """Parts that cover all pairs of a query and a block, block by block of each key head."""
    J, size, blocks = selection.blocks_NJL.shape[1], selection.block_size, selection.key_blocks
    offsets, queries = selection.by_block()
    born_nu = selection.key_positions_U.view(-1, size)
    latest = born_nu.amax(1).tolist()
    each = _queries_of_tile(group)
    step = each * max(1, TILE_ELEMENTS // (each * group * size))
    for owner, (start, stop) in enumerate(pairwise(offsets.tolist())):
        j, n = divmod(owner, blocks)
        for queries_m in queries[start:stop].split(step) if stop > start else ():
            positions_m = selection.query_positions_N.index_select(0, queries_m)
            is_hiding = latest[n] > int(positions_m.min())
            hidden_mu = born_nu[n] > positions_m[:, None] if is_hiding else None
            tiles = -(-len(queries_m) // each)
            yield _Part(j * (blocks + 1) + n, queries_m.long() * J + j, tiles, hidden_mu)


def _times(rows_tgK: Tensor, x_Ku: Tensor) -> Tensor:
    """Products of tiles of one shape each, so that those of a row do not depend on how many."""
    return torch.bmm(rows_tgK, x_Ku.expand(len(rows_tgK), -1, -1))


def forward(operands: Operands, selection: Selection, scale: float) -> tuple[Tensor, Tensor]:
    """(out [N, H, V], lse [N, H])."""
    q_NHK, k_UJK, v_UJV = operands
    (N, H, _), V = q_NHK.shape, v_UJV.shape[-1]
    q_MGK = _by_pair(q_NHK, k_UJK.shape[1]) * scale
    k_nuK, v_nuV = (_by_block(x, selection) for x in (k_UJK, v_UJV))
    M, G, _ = q_MGK.shape
    out_MGV, total_MG1 = q_MGK.new_zeros(M, G, v_nuV.shape[-1]), q_MGK.new_zeros(M, G, 1)
    top_MG1 = torch.full_like(total_MG1, -torch.inf)
    for part in _parts(selection, G):
        scores_tgu = _times(part.tiled(q_MGK), k_nuK[part.block].mT)
        part.hide(scores_tgu, G, -torch.inf)
        top_tg1 = scores_tgu.amax(-1, keepdim=True)
        weights_tgu = scores_tgu.sub_(_finite(top_tg1)).exp_()
        sums_tgV = _times(weights_tgu, v_nuV[part.block])
        new = top_tg1, weights_tgu.sum(-1, keepdim=True), sums_tgV
        _merge((top_MG1, total_MG1, out_MGV), part.pairs_m, tuple(part.rows_of(x, G) for x in new))
    lse_MG1 = top_MG1 + total_MG1.log()
    out_MGV /= total_MG1.masked_fill(total_MG1 == 0, 1.0)
    out_NHV = _from_pairs(out_MGV, H, V).to(v_UJV.dtype).contiguous()
    return out_NHV, lse_MG1.view(N, H)


def _finite(top: Tensor) -> Tensor:
    return top.masked_fill(top == -torch.inf, 0.0)


def _merge(known: Operands, pairs_m: Tensor, new: tuple[Tensor, ...]) -> None:
    """Into the largest scores of pairs, and sums over exponentials above these, those of a part."""
    tops = known[0].index_select(0, pairs_m), new[0]
    top_mG1 = torch.maximum(*tops)
    old_mG1, new_mG1 = (x.sub(_finite(top_mG1)).exp_() for x in tops)
    known[0].index_copy_(0, pairs_m, top_mG1)
    for sums_MGD, more_mGD in zip(known[1:], new[1:]):
        kept_mGD = sums_MGD.index_select(0, pairs_m).mul_(old_mG1)
        sums_MGD.index_copy_(0, pairs_m, kept_mGD.addcmul_(more_mGD, new_mG1))


def backward(
    cotangents: tuple[Tensor, Tensor],
    operands: Operands,
    results: tuple[Tensor, Tensor],
    selection: Selection,
    scale: float,
) -> Operands:
    """Gradients of the operands, given (dout, dlse) and (out, lse)."""
    q_NHK, k_UJK, v_UJV = operands
    J, G = k_UJK.shape[1], q_NHK.shape[1] // k_UJK.shape[1]
    q_MGK, dout_MGV, out_MGV = (_by_pair(x, J) for x in (q_NHK, cotangents[0], results[0]))
    q_MGK = q_MGK * scale
    dlse_MG1, lse_MG1 = (x.reshape(-1, G, 1) for x in (cotangents[1], results[1]))
    delta_MG1 = (dout_MGV * out_MGV).sum(-1, keepdim=True) - dlse_MG1
    # What sees nothing has no weights.
    lse_MG1 = lse_MG1.masked_fill(lse_MG1 == -torch.inf, torch.inf)
    k_nuK, v_nuV = (_by_block(x, selection) for x in (k_UJK, v_UJV))
    dq_MGK, dk_nuK, dv_nuV = (torch.zeros_like(x) for x in (q_MGK, k_nuK, v_nuV))
    for part in _parts(selection, G):
        q_tgK, dout_tgV = part.tiled(q_MGK), part.tiled(dout_MGV)
        scores_tgu = _times(q_tgK, k_nuK[part.block].mT)
        part.hide(scores_tgu, G, -torch.inf)
        weights_tgu = scores_tgu.sub_(part.tiled(lse_MG1, torch.inf)).exp_()
        dscores_tgu = _times(dout_tgV, v_nuV[part.block].mT)
        dscores_tgu.sub_(part.tiled(delta_MG1)).mul_(weights_tgu)
        # A gradient of the lse of a query that sees nothing may be infinite.
        part.hide(dscores_tgu, G, 0.0)
        dq_tgK = _times(dscores_tgu, k_nuK[part.block])
        dq_MGK.index_add_(0, part.pairs_m, part.rows_of(dq_tgK, G))
        dk_nuK[part.block].addmm_(dscores_tgu.flatten(0, 1).T, q_tgK.flatten(0, 1))
        dv_nuV[part.block].addmm_(weights_tgu.flatten(0, 1).T, dout_tgV.flatten(0, 1))
    dq_NHK = _from_pairs(dq_MGK.mul_(scale), *q_NHK.shape[1:]).to(q_NHK.dtype).contiguous()
    return dq_NHK, _from_blocks(dk_nuK, k_UJK), _from_blocks(dv_nuV, v_UJV)
