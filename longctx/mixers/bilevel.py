"""Bi-level routing (BiFormer, arXiv 2303.08810), causal: a block of queries chooses blocks.

All queries of a block see the same blocks: their own, and those before it whose mean keys agree
best with the mean query of the block before theirs, over all heads together. The paper, on images,
lets a region choose by its own mean query; in a text that would show its first queries the last.
Nothing is differentiated through the selection.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from longctx.mixers.attention import AttentionParts
from longctx.mixers.base import Place
from longctx.mixers.selecting import Selectable, Selecting, SelectingConfig
from longctx.sequence.block_sums import Blocks, block_sums, block_sums_traffic
from longctx.sequence.expected import Expected, Share, combined
from longctx.sequence.listed import listed_blocks_attention, query_blocks
from longctx.sequence.local import LocalView
from longctx.sequence.running import wide
from longctx.sequence.selected import (
    TILE_ELEMENTS,
    best,
    selected_after,
    selected_blocks_traffic,
)
from longctx.sequence.view import SequenceView


@dataclass(frozen=True)
class BilevelConfig(SelectingConfig, kind="bilevel"):
    """Attention of blocks of queries to the own and chosen blocks."""

    def tp_refusal(self, tp: int) -> str:
        if tp > 1:
            return "kind = 'bilevel' selects blocks by all heads together: set parallel.tp to 1"
        return ""

    def build(self, place: Place) -> "Bilevel":
        return Bilevel(self, place)


class Remembered(NamedTuple):
    """Keys and values, mean queries of whole blocks, and queries of the one that is not whole."""

    known: Selectable
    mean_BnJK: Tensor
    rest_BUJK: Tensor


class Bilevel(Selecting):
    """See the module's docstring."""

    @torch.compiler.disable
    def attend(self, projected: AttentionParts, view: SequenceView) -> Tensor:
        q_BTHK, k_BTJK, v_BTJV = projected[:3]
        block, backend = self.config.block, self.config.computes_with
        blocks_ML = self._lists(q_BTHK.detach(), k_BTJK.detach(), view)
        operands = q_BTHK, k_BTJK, v_BTJV
        return listed_blocks_attention(view, operands, blocks_ML, block, backend)[0]

    @torch.no_grad()
    def _lists(self, q_BTHK: Tensor, k_BTJK: Tensor, view: SequenceView) -> Tensor:
        """The blocks that each own block of queries sees, `[M, num_blocks]`."""
        block, lists = self.config.block, []
        together = torch.cat((self._grouped(q_BTHK), wide(k_BTJK)), -1)
        means_UJD = block_sums(view, together, block) / block
        query_UJK, key_UJK = means_UJD.split(self.size, -1)
        documents = view.plan.once(Blocks, block, block).documents
        own = view.plan.once(query_blocks, block, q_BTHK.device)
        for document, which in own.documents:
            first, count = documents[document]
            numbers = own.numbers_M[which]
            keys = key_UJK[first : first + count]
            for part in numbers.split(max(1, TILE_ELEMENTS // (count + 1))):
                queries = query_UJK[first + (part - 1).clamp(min=0)] if count else key_UJK[:0]
                lists.append(self._best(queries, keys, part))
        return torch.cat(lists)

    def _grouped(self, q_BTHK: Tensor) -> Tensor:
        """Sums of the queries of each key group, which agree with a key as they do together."""
        return wide(q_BTHK).unflatten(2, (self.num_kv_heads, -1)).sum(3)

    def _best(self, query_mJK: Tensor, key_nJK: Tensor, own_m: Tensor) -> Tensor:
        """`[..., m, num_blocks]` of blocks with these numbers, by the mean queries before them."""
        with torch.autocast(own_m.device.type, enabled=False):
            score_mn = query_mJK.flatten(-2) @ key_nJK.flatten(-2).mT
        if score_mn.shape[-2] < len(own_m):
            score_mn = key_nJK.new_zeros(len(own_m), 0)
        return best(score_mn[..., None, :], own_m, self.choice)[..., 0, :]

    def core_reference(self, projected: AttentionParts, view: LocalView) -> Tensor:
        q_MHK, k_MJK, v_MJV = (x.flatten(0, 1) for x in projected[:3])
        cuts, rows, block = view.cu_seqlens.tolist(), [], self.config.block
        for start, stop in zip(cuts, cuts[1:]):
            for t in range(start, stop):
                tokens = t + 1 - start
                if (tokens - 1) % block == 0:
                    blocks = self._chosen_at(q_MHK[start:t], k_MJK[start:t])
                seen = torch.cat([self._tokens_of(n, tokens) for n in blocks]) + start
                q_JgK = q_MHK[t].unflatten(0, (self.num_kv_heads, -1))
                scores_JgU = q_JgK @ k_MJK[seen].permute(1, 2, 0) * self.size**-0.5
                rows.append((scores_JgU.softmax(-1) @ v_MJV[seen].transpose(0, 1)).flatten(0, 1))
        return torch.stack(rows).view(projected.q_BTHK.shape)

    def _chosen_at(self, q_UHK: Tensor, k_UJK: Tensor) -> list[int]:
        """Blocks that a block sees, given all tokens before it."""
        block = self.config.block
        own = len(q_UHK) // block
        if own == 0:
            return [0]
        group = self.num_heads // self.num_kv_heads
        keys = k_UJK.repeat_interleave(group, 1).flatten(1).split(block)
        query_D = q_UHK[-block:].flatten(1).mean(0)
        agreement = (query_D[None] @ torch.stack([x.mean(0) for x in keys]).T)[0].tolist()
        ranked = sorted(range(own), key=lambda n: (-agreement[n], n))
        return [*ranked[: self.config.num_blocks - 1], own]

    def advance(
        self, projected: AttentionParts, memory: Remembered | None
    ) -> tuple[Tensor, Remembered]:
        q_BTHK, k_BTJK, v_BTJV = projected[:3]
        block, grouped = self.config.block, self._grouped(q_BTHK)
        if memory is None:
            empty = Selectable(k_BTJK[:, :0], v_BTJV[:, :0], wide(k_BTJK[:, :0]))
            before = Remembered(empty, grouped[:, :0], grouped[:, :0])
        else:
            before = memory
        known = before.known.extended(k_BTJK, v_BTJV, block)
        rest = torch.cat((before.rest_BUJK, grouped), 1)
        whole = rest.shape[1] // block
        new_BnJK = rest[:, : whole * block].unflatten(1, (whole, block)).mean(2)
        mean_BnJK = torch.cat((before.mean_BnJK, new_BnJK), 1)
        after = Remembered(known, mean_BnJK, rest[:, whole * block :])
        if memory is None:
            view = LocalView.whole(q_BTHK.shape[0], q_BTHK.shape[1], q_BTHK.device)
            return self.attend(projected, view), after
        own_T = torch.arange(before.known.tokens, known.tokens, device=q_BTHK.device) // block
        if mean_BnJK.shape[1]:
            mean_BnJK = mean_BnJK[:, (own_T - 1).clamp(min=0)]
        blocks_BTL = self._best(mean_BnJK, known.mean_BnJK, own_T)
        blocks = blocks_BTL[:, :, None].expand(-1, -1, self.num_kv_heads, -1)
        operands = q_BTHK, known.k_BUJK, known.v_BUJV
        return selected_after(operands, blocks, block, self.config.computes_with), after

    def core_flops(self, contexts_M: Tensor) -> int:
        """Of seen keys and values, and, once a block, of mean keys with a mean query."""
        block = self.config.block
        earlier_M, place_M = (contexts_M - 1) // block, (contexts_M - 1) % block
        whole = int(earlier_M.clamp(max=self.config.num_blocks - 1).sum()) * block
        seen = whole + int((place_M + 1).sum())
        routed = int(earlier_M[place_M == 0].sum())
        return self.num_heads * self.size * (4 * seen + 2 * routed)

    def expected_traffic(self, share: Share) -> Expected:
        elements = 2 * self.num_kv_heads * self.size
        means = block_sums_traffic(share, self.config.block, elements, has_gradient=False)
        return combined((means, selected_blocks_traffic(share, self.sizes)))
