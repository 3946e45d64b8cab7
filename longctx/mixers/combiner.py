"""Combiner (arXiv 2107.05768), causal: the tokens of a query's own block, and earlier blocks whole.

A softmax goes over the tokens of the own block up to the query and over one summary of each block
before it. What a block is summarised by does not depend on the query: a softmax over its tokens of
a learned product with their keys, the same for key and value. So every token has a weight, the
product of its block's and its own in the block, and a summary is all that crosses ranks. The paper
pools keys by their maximum.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from longctx_kernels.lifetime_attention import merge
from torch import Tensor, nn

from longctx.mixers.attention import Attention, AttentionParts, SparseConfig, masked_attention
from longctx.mixers.base import Place
from longctx.sequence.block_sums import block_pieces, block_sums_traffic, joined_pieces
from longctx.sequence.expected import Expected, Share, combined
from longctx.sequence.local import LocalView
from longctx.sequence.past_blocks import past_blocks_attention
from longctx.sequence.patterned import patterned_attention, patterned_traffic
from longctx.sequence.policy import Neighbourhood
from longctx.sequence.running import wide
from longctx.sequence.view import SequenceView


@dataclass(frozen=True)
class CombinerConfig(SparseConfig, kind="combiner"):
    """Attention to the own block's tokens and to summaries of the blocks before it."""

    block: int = 64
    """Tokens of a block."""

    def build(self, place: Place) -> "Combiner":
        return Combiner(self, place)

    def verbs(self) -> frozenset[str]:
        return frozenset({"fetch", "means"})

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        self.check_positive(where, "block")


class Remembered(NamedTuple):
    """Keys and values of summaries, and of tokens of the block that is not whole yet."""

    summaries: tuple[Tensor, Tensor]
    own: tuple[Tensor, Tensor]


class Combiner(Attention):
    """See the module's docstring."""

    config: CombinerConfig

    def __init__(self, config: CombinerConfig, place: Place):
        super().__init__(config, place)
        self.pool = nn.Parameter(torch.zeros(self.num_kv_heads, self.size))
        self.own_block = Neighbourhood(config.block, config.block)

    def core(self, projected: AttentionParts, view: SequenceView) -> Tensor:
        near, far = self._parts(projected, view)
        return merge(near, far)[0].type_as(projected.v_BTJV)

    @torch.compiler.disable
    def _parts(
        self, projected: AttentionParts, view: SequenceView
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(out, lse) over the own block and over summaries."""
        q_BTHK, k_BTJK, v_BTJV = projected[:3]
        block, backend = self.config.block, self.config.computes_with
        operands = q_BTHK, k_BTJK, v_BTJV
        near = patterned_attention(view, operands, self.own_block, backend=backend)
        pairs_NLJD = block_pieces(view, torch.cat((k_BTJK, v_BTJV), -1), block)
        score_BTJ = self._scores(k_BTJK)
        known = torch.stack((score_BTJ, torch.ones_like(score_BTJ)), -1)
        score_NLJ, is_token_NLJ = block_pieces(view, known, block).unbind(-1)
        score_NLJ = score_NLJ.masked_fill(is_token_NLJ == 0, -torch.inf)
        parts_NJD = torch.cat(_weighed(score_NLJ, pairs_NLJD), -1)
        pairs_UJD = _merged(joined_pieces(view, parts_NJD, block)).type_as(v_BTJV)
        operands = q_BTHK, *pairs_UJD.split((k_BTJK.shape[-1], v_BTJV.shape[-1]), -1)
        far = past_blocks_attention(view, operands, block, delay=1, backend=backend)
        return near, far

    def _scores(self, k_BTJK: Tensor) -> Tensor:
        """`[..., J]`: what a token's weight in its block is the exponential of."""
        return (wide(k_BTJK) * self.pool).sum(-1) * self.size**-0.5

    def core_reference(self, projected: AttentionParts, view: LocalView) -> Tensor:
        q_MHK, k_MJK, v_MJV = (x.flatten(0, 1).transpose(0, 1) for x in projected[:3])
        q_MHK = q_MHK.transpose(0, 1)
        cuts, rows, block = view.cu_seqlens.tolist(), [], self.config.block
        for start, stop in zip(cuts, cuts[1:]):
            keys, values = list[Tensor](), list[Tensor]()
            for t in range(start, stop):
                own = slice(t - (t - start) % block, t + 1)
                k_JUK = torch.cat([*keys, k_MJK[:, own]], 1)
                v_JUV = torch.cat([*values, v_MJV[:, own]], 1)
                q_JgK = q_MHK[t].unflatten(0, (self.num_kv_heads, -1))
                weights_JgU = (q_JgK @ k_JUK.mT * self.size**-0.5).softmax(-1)
                rows.append((weights_JgU @ v_JUV).flatten(0, 1))
                if own.stop - own.start == block:
                    share_J1L = self._shares(k_MJK[:, own])
                    keys.append(share_J1L @ k_MJK[:, own])
                    values.append(share_J1L @ v_MJV[:, own])
        return torch.stack(rows).view(projected.q_BTHK.shape)

    def _shares(self, k_JLK: Tensor) -> Tensor:
        """Weights of the tokens of a block."""
        return (self.pool[:, None] @ k_JLK.mT * self.size**-0.5).softmax(-1)

    def advance(
        self, projected: AttentionParts, memory: Remembered | None
    ) -> tuple[Tensor, Remembered]:
        q_BTHK, k_BTJK, v_BTJV = projected[:3]
        block, nothing = self.config.block, (k_BTJK[:, :0], v_BTJV[:, :0])
        before = memory or Remembered(nothing, nothing)
        k_BUJK, v_BUJV = (torch.cat(both, 1) for both in zip(before.own, (k_BTJK, v_BTJV)))
        known, whole = before.summaries[0].shape[1], k_BUJK.shape[1] // block
        pairs = torch.cat((k_BUJK, v_BUJV), -1)[:, : whole * block].unflatten(1, (whole, block))
        scores = self._scores(pairs[..., : self.size])
        new = (scores.softmax(2)[..., None] * pairs).sum(2).type_as(v_BTJV).chunk(2, -1)
        keys, values = (torch.cat(both, 1) for both in zip(before.summaries, new))
        rest = k_BUJK[:, whole * block :], v_BUJV[:, whole * block :]
        after = Remembered((keys, values), rest)
        if memory is None:
            view = LocalView.whole(q_BTHK.shape[0], q_BTHK.shape[1], q_BTHK.device)
            return self.core(projected, view), after
        first, tokens = known * block, k_BUJK.shape[1]
        position_U = torch.arange(first, first + tokens, device=q_BTHK.device)
        query_T1 = position_U[tokens - q_BTHK.shape[1] :, None]
        sees_own = (position_U <= query_T1) & (position_U // block == query_T1 // block)
        number_n = torch.arange(keys.shape[1], device=q_BTHK.device)
        seen = torch.cat((number_n < query_T1 // block, sees_own), 1)
        k, v = torch.cat((keys, k_BUJK), 1), torch.cat((values, v_BUJV), 1)
        return masked_attention(q_BTHK, k, v, seen[None]), after

    def core_flops(self, contexts_M: Tensor) -> int:
        """Of seen tokens and summaries, and of making one of every whole block."""
        block, J, K = self.config.block, self.num_kv_heads, self.size
        seen = int(((contexts_M - 1) % block + 1 + (contexts_M - 1) // block).sum())
        made = int((contexts_M % block == 0).sum()) * block
        return 4 * self.num_heads * K * seen + 6 * J * K * made

    def expected_traffic(self, share: Share) -> Expected:
        elements = self.num_kv_heads * (2 * self.size + 2)
        means = block_sums_traffic(share, self.config.block, elements)
        return combined((patterned_traffic(share, self.sizes, self.own_block), means))


def _weighed(score_NLJ: Tensor, pairs_NLJD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each piece its largest score, and over that the sums of weights and of weighed tokens."""
    # Where exponentials are measured from changes nothing, so it has no gradient.
    top_NJ1 = score_NLJ.detach().amax(1)[..., None]
    weight_NLJ1 = (score_NLJ[..., None] - top_NJ1[:, None]).exp()
    return top_NJ1, weight_NLJ1.sum(1), (weight_NLJ1 * wide(pairs_NLJD)).sum(1)


def _merged(parts_UQJD: Tensor) -> Tensor:
    """Weighted means of blocks from their pieces; a piece that is none has no weight."""
    top_UQJ1, total_UQJ1, sums_UQJD = parts_UQJD.split((1, 1, parts_UQJD.shape[-1] - 2), -1)
    top_UQJ1 = top_UQJ1.detach().masked_fill(total_UQJ1 == 0, -torch.inf)
    scale_UQJ1 = (top_UQJ1 - top_UQJ1.amax(1, keepdim=True)).exp()
    return (scale_UQJ1 * sums_UQJD).sum(1) / (scale_UQJ1 * total_UQJ1).sum(1)
