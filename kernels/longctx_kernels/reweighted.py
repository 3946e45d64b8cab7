"""Softplus attention whose weights are sharpened (LSSAR, arXiv 2501.13428), in torch operations.

A query that sees n keys gives key j the share a_j = softplus(s_j) / sum of softplus, and from that
the weight relu(n a_j - 1)^15 over the sum of these, without the 1 if n is at most 3. Keys below the
mean get nothing; if all are alike, so does the query.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from longctx_kernels import lifetime_torch
from longctx_kernels.score import Score, wide_dtype
from longctx_kernels.sight import Sight

REWEIGHTED = "reweighted"
POWER = 15
SHORT = 3
"""Most keys of a query from which nothing is subtracted."""

Operands = tuple[Tensor, Tensor, Tensor]


def reweighted_attention(operands: Operands, sight: Sight, score: Score) -> tuple[Tensor, Tensor]:
    """(out [T, H, V], log of the sum of softplus [T, H]), by tiles that the backward pass redoes.

    A tile has all keys of its queries, so that the shares are known before they are sharpened.
    """
    q_THK, _, v_UJV = operands
    out_THV = q_THK.new_zeros(*q_THK.shape[:2], v_UJV.shape[-1], dtype=wide_dtype(q_THK))
    lse_TH = torch.full_like(out_THV[..., 0], -torch.inf)
    for tile in lifetime_torch._tiles(sight, operands):
        found = checkpoint(
            _attend_tile,
            *(tile, operands, sight, score),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        out_THV[tile.rows, tile.heads], lse_TH[tile.rows, tile.heads] = found
    return out_THV.to(v_UJV.dtype), lse_TH


def _attend_tile(
    tile: lifetime_torch._Tile, operands: Operands, sight: Sight, score: Score
) -> tuple[Tensor, Tensor]:
    scores_JGtu, seen = lifetime_torch._tile_scores(tile, operands, sight, score)
    sizes_JGtu = F.softplus(scores_JGtu, threshold=40).masked_fill(~seen, 0.0)
    total_JGt1 = sizes_JGtu.sum(-1, keepdim=True)
    weights_JGtu = _sharpened(sizes_JGtu, total_JGt1, seen.sum(-1, keepdim=True))
    v_JuV = lifetime_torch._tile_operands(tile, operands)[2].transpose(0, 1)
    out_JGtV = weights_JGtu @ v_JuV[:, None]
    lse_JGt = total_JGt1.detach()[..., 0].log()
    return out_JGtV.flatten(0, 1).transpose(0, 1), lse_JGt.flatten(0, 1).T


def _sharpened(sizes_JGtu: Tensor, total_JGt1: Tensor, count: Tensor) -> Tensor:
    """Weights of values, given softplus of scores, its sum and how many keys there are."""
    ratio_JGtu = sizes_JGtu * (count / total_JGt1.masked_fill(total_JGt1 == 0, 1.0))
    excess_JGtu = (ratio_JGtu - (count > SHORT).to(ratio_JGtu.dtype)).relu()
    # The largest becomes 1, so that powers do not leave the range of the dtype.
    top_JGt1 = excess_JGtu.detach().amax(-1, keepdim=True)
    raised_JGtu = (excess_JGtu / top_JGt1.masked_fill(top_JGt1 == 0, 1.0)) ** POWER
    sum_JGt1 = raised_JGtu.sum(-1, keepdim=True)
    return raised_JGtu / sum_JGt1.masked_fill(sum_JGt1 == 0, 1.0)
