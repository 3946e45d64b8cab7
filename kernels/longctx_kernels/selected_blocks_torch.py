"""Attention to listed key blocks in torch operations, by tiles of (query, key head) pairs.

A pair is a row of its own in batched products, and how many pairs a tile holds depends on shapes
alone: what a query gets does not depend on what other queries hold or list.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from longctx_kernels.score import wide_dtype
from longctx_kernels.selected_blocks_lists import Selection

TILE_ELEMENTS = 1 << 18
"""Most elements of keys and values that are gathered at once, unless one pair lists more."""

Operands = tuple[Tensor, Tensor, Tensor]


class _Tile(NamedTuple):
    """Some pairs m, the rows of their blocks in `_by_block`, keys, values, and who sees whom."""

    pairs: slice
    rows: Tensor
    k_muK: Tensor
    v_muV: Tensor
    seen_m1u: Tensor


def _by_block(x_UJD: Tensor, selection: Selection) -> Tensor:
    """[J * (key blocks + 1), block size * D]: blocks by key head, behind them one of zeros."""
    padded_UJD = F.pad(x_UJD, (0, 0, 0, 0, 0, selection.block_size))
    x_JnuD = padded_UJD.unflatten(0, (-1, selection.block_size)).permute(2, 0, 1, 3)
    return x_JnuD.flatten(2).flatten(0, 1)


def _from_blocks(x_rows: Tensor, like_UJD: Tensor, selection: Selection) -> Tensor:
    """The inverse of `_by_block`, without the block of zeros."""
    _, J, D = like_UJD.shape
    x_JnuD = x_rows.view(J, selection.key_blocks + 1, selection.block_size, D)[:, :-1]
    return x_JnuD.permute(1, 2, 0, 3).reshape(like_UJD.shape).to(like_UJD.dtype).contiguous()


def _by_pair(x_NHD: Tensor, key_heads: int) -> Tensor:
    """[N * J, G, D] in the wide dtype."""
    N, H, D = x_NHD.shape
    return x_NHD.to(wide_dtype(x_NHD)).reshape(N * key_heads, H // key_heads, D)


def _tiles(operands: Operands, selection: Selection) -> Iterator[_Tile]:
    """Tiles that cover all pairs."""
    _, k_UJK, v_UJV = operands
    N, J, L = selection.blocks_NJL.shape
    K, V, size = k_UJK.shape[-1], v_UJV.shape[-1], selection.block_size
    heads_J1 = torch.arange(J, device=k_UJK.device)[:, None] * (selection.key_blocks + 1)
    rows_ML = (selection.blocks_NJL + heads_J1).flatten(0, 1)
    dtype = wide_dtype(k_UJK)
    k_rows, v_rows = (_by_block(x.to(dtype), selection) for x in (k_UJK, v_UJV))
    born_nu = F.pad(selection.key_positions_U, (0, size), value=2**31 - 1).view(-1, size)
    positions_M = selection.query_positions_N.repeat_interleave(J)
    step = max(1, TILE_ELEMENTS // (L * size * (K + V)))
    for start in range(0, N * J, step):
        pairs = slice(start, start + step)
        rows = rows_ML[pairs].flatten()
        k_muK = k_rows.index_select(0, rows).view(-1, L * size, K)
        v_muV = v_rows.index_select(0, rows).view(-1, L * size, V)
        born_m1u = born_nu.index_select(0, rows % (selection.key_blocks + 1)).view(-1, 1, L * size)
        yield _Tile(pairs, rows, k_muK, v_muV, born_m1u <= positions_M[pairs, None, None])


def forward(operands: Operands, selection: Selection, scale: float) -> tuple[Tensor, Tensor]:
    """(out [N, H, V], lse [N, H])."""
    q_NHK, k_UJK, v_UJV = operands
    (N, H, _), J, V = q_NHK.shape, k_UJK.shape[1], v_UJV.shape[-1]
    q_MGK = _by_pair(q_NHK, J)
    out_MGV, lse_MG = q_MGK.new_empty(N * J, H // J, V), q_MGK.new_empty(N * J, H // J)
    for tile in _tiles(operands, selection):
        scores_mGu = (q_MGK[tile.pairs] @ tile.k_muK.mT).mul_(scale)
        scores_mGu.masked_fill_(~tile.seen_m1u, -torch.inf)
        lse_MG[tile.pairs] = scores_mGu.logsumexp(-1)
        out_MGV[tile.pairs] = _weights(scores_mGu, lse_MG[tile.pairs]) @ tile.v_muV
    return out_MGV.view(N, H, V).to(v_UJV.dtype), lse_MG.view(N, H)


def _weights(scores_mGu: Tensor, lse_mG: Tensor) -> Tensor:
    """Shares of keys, 0 for pairs that see nothing; overwrites scores, -inf for unseen keys."""
    lse_mG = lse_mG.masked_fill(lse_mG == -torch.inf, torch.inf)
    return scores_mGu.sub_(lse_mG[..., None]).exp_()


def backward(
    cotangents: tuple[Tensor, Tensor],
    operands: Operands,
    results: tuple[Tensor, Tensor],
    selection: Selection,
    scale: float,
) -> Operands:
    """Gradients of the operands, given (dout, dlse) and (out, lse)."""
    q_NHK, k_UJK, v_UJV = operands
    J = k_UJK.shape[1]
    q_MGK, dout_MGV, out_MGV = (_by_pair(x, J) for x in (q_NHK, cotangents[0], results[0]))
    dlse_MG, lse_MG = (x.reshape(q_MGK.shape[:2]) for x in (cotangents[1], results[1]))
    delta_MG1 = ((dout_MGV * out_MGV).sum(-1) - dlse_MG)[..., None]
    dq_MGK = torch.empty_like(q_MGK)
    block_rows, size = J * (selection.key_blocks + 1), selection.block_size
    dk_rows, dv_rows = (q_MGK.new_zeros(block_rows, size * x.shape[-1]) for x in (k_UJK, v_UJV))
    for tile in _tiles(operands, selection):
        q_mGK, dout_mGV = q_MGK[tile.pairs], dout_MGV[tile.pairs]
        scores_mGu = (q_mGK @ tile.k_muK.mT).mul_(scale)
        scores_mGu.masked_fill_(~tile.seen_m1u, -torch.inf)
        weights_mGu = _weights(scores_mGu, lse_MG[tile.pairs])
        dv_muV = weights_mGu.mT @ dout_mGV
        dscores_mGu = (dout_mGV @ tile.v_muV.mT).sub_(delta_MG1[tile.pairs]).mul_(weights_mGu)
        # A gradient of the lse of a query that sees nothing may be infinite.
        dscores_mGu = dscores_mGu.masked_fill_(~tile.seen_m1u, 0.0).mul_(scale)
        dq_MGK[tile.pairs] = dscores_mGu @ tile.k_muK
        dk_muK = dscores_mGu.mT @ q_mGK
        dk_rows.index_add_(0, tile.rows, dk_muK.view(len(tile.rows), -1))
        dv_rows.index_add_(0, tile.rows, dv_muV.view(len(tile.rows), -1))
    dq_NHK = dq_MGK.view(q_NHK.shape).to(q_NHK.dtype)
    return dq_NHK, _from_blocks(dk_rows, k_UJK, selection), _from_blocks(dv_rows, v_UJV, selection)
