"""Attention to a query's own block and to the earlier blocks whose mean key it agrees with best."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longctx.errors import InputError
from longctx.mixers.attention import Attention, AttentionParts, SparseConfig
from longctx.mixers.base import Place
from longctx.sequence.block_sums import Blocks, block_sums, block_sums_traffic
from longctx.sequence.expected import Expected, Share, combined
from longctx.sequence.local import LocalView
from longctx.sequence.running import wide
from longctx.sequence.selected import (
    Choice,
    Tile,
    best,
    best_blocks,
    selected_after,
    selected_blocks_attention,
    selected_blocks_traffic,
)
from longctx.sequence.view import SequenceView


@dataclass(frozen=True)
class SelectingConfig(SparseConfig):
    """Base of attention that selects blocks by their mean keys."""

    block: int = 512
    """Tokens of a block."""
    num_blocks: int = 3
    """Blocks that a query sees, its own included."""

    one_key_head_is_shared = False

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        self.check_positive(where, "block")
        if self.num_blocks < 2:
            raise InputError(
                f"{where}.num_blocks = {self.num_blocks}: must be at least 2, a query's own block "
                "and one before it"
            )

    def verbs(self) -> frozenset[str]:
        return frozenset({"fetch", "means"})


class Selectable(NamedTuple):
    """Keys and values of all tokens so far, and the mean keys of whole blocks."""

    k_BUJK: Tensor
    v_BUJV: Tensor
    mean_BnJK: Tensor

    @property
    def tokens(self) -> int:
        """How many there were."""
        return self.k_BUJK.shape[1]

    def extended(self, k_BTJK: Tensor, v_BTJV: Tensor, block: int) -> "Selectable":
        """With the next tokens."""
        k_BUJK = torch.cat((self.k_BUJK, k_BTJK), 1)
        known, whole = self.mean_BnJK.shape[1], k_BUJK.shape[1] // block
        new = k_BUJK[:, known * block : whole * block].unflatten(1, (whole - known, block))
        mean_BnJK = torch.cat((self.mean_BnJK, wide(new).mean(2)), 1)
        return Selectable(k_BUJK, torch.cat((self.v_BUJV, v_BTJV), 1), mean_BnJK)


class Selecting(Attention):
    """See the module's docstring; heads of a key group share what they select."""

    config: SelectingConfig

    def __init__(self, config: SelectingConfig, place: Place):
        super().__init__(config, place)
        self.choice = Choice(config.block, config.num_blocks)

    def core(self, projected: AttentionParts, view: SequenceView) -> Tensor:
        return self.attend(projected, view)

    @torch.compiler.disable
    def attend(self, projected: AttentionParts, view: SequenceView) -> Tensor:
        """Softmax attention to selected blocks."""
        q_BTHK, k_BTJK, v_BTJV = projected[:3]
        blocks_BTJL = self._selection(q_BTHK, k_BTJK, view)
        operands, backend = (q_BTHK, k_BTJK, v_BTJV), self.config.computes_with
        return selected_blocks_attention(view, operands, blocks_BTJL, self.config.block, backend)[0]

    def _selection(self, q_BTHK: Tensor, k_BTJK: Tensor, view: SequenceView) -> Tensor:
        """The blocks that each query sees."""
        block, q_MHK = self.config.block, q_BTHK.flatten(0, 1)
        mean_UJK = block_sums(view, k_BTJK.detach(), block) / block
        documents = view.plan.once(Blocks, block, block).documents

        def score(tile: Tile) -> Tensor:
            first, _ = documents[tile.document]
            return self._agreement(q_MHK[tile.tokens], mean_UJK[first : first + tile.blocks])

        return best_blocks(view, score, self.choice, self.num_kv_heads, self.num_kv_heads)

    def _agreement(self, q_THK: Tensor, mean_nJK: Tensor) -> Tensor:
        """`[..., T, J, n]`: products of queries, summed over a key group, and mean keys."""
        with torch.autocast(q_THK.device.type, enabled=False):
            q_TJK = wide(q_THK).unflatten(-2, (self.num_kv_heads, -1)).sum(-2)
            score_JTn = q_TJK.transpose(-3, -2) @ wide(mean_nJK).movedim(-3, -1)
        return score_JTn.transpose(-3, -2)

    def core_reference(self, projected: AttentionParts, view: LocalView) -> Tensor:
        q_MHK, k_MJK, v_MJV = (x.flatten(0, 1) for x in projected[:3])
        cuts, rows = view.cu_seqlens.tolist(), []
        for start, stop in zip(cuts, cuts[1:]):
            for query in range(start, stop):
                seen = slice(start, query + 1)
                rows.append(self._row(q_MHK[query], k_MJK[seen], v_MJV[seen]))
        return torch.stack(rows).view(projected.q_BTHK.shape[:3] + v_MJV.shape[-1:])

    def _row(self, q_HK: Tensor, k_UJK: Tensor, v_UJV: Tensor) -> Tensor:
        """Output of the last of U tokens, key head by key head."""
        outs = []
        for q_gK, k_UK, v_UV in zip(
            q_HK.chunk(self.num_kv_heads), k_UJK.unbind(1), v_UJV.unbind(1)
        ):
            seen = torch.cat([self._tokens_of(n, len(k_UK)) for n in self._chosen(q_gK, k_UK)])
            scores_gU = q_gK @ k_UK[seen].T * self.size**-0.5
            outs.append(scores_gU.softmax(-1) @ v_UV[seen])
        return torch.cat(outs)

    def _tokens_of(self, number: int, tokens: int) -> Tensor:
        block = self.config.block
        return torch.arange(number * block, min(tokens, (number + 1) * block))

    def _chosen(self, q_gK: Tensor, k_UK: Tensor) -> list[int]:
        block = self.config.block
        own = (len(k_UK) - 1) // block
        if own == 0:
            return [0]
        means_nK = torch.stack([k_UK[n * block : (n + 1) * block].mean(0) for n in range(own)])
        agreement = (q_gK.sum(0, keepdim=True) @ means_nK.T)[0].tolist()
        ranked = sorted(range(own), key=lambda n: (-agreement[n], n))
        return [*ranked[: self.config.num_blocks - 1], own]

    def advance(self, projected: AttentionParts, memory: Any) -> tuple[Tensor, Any]:
        q_BTHK, k_BTJK, v_BTJV = projected[:3]
        known = memory or Selectable(k_BTJK[:, :0], v_BTJV[:, :0], wide(k_BTJK[:, :0]))
        after = known.extended(k_BTJK, v_BTJV, self.config.block)
        if memory is None:
            view = LocalView.whole(q_BTHK.shape[0], q_BTHK.shape[1], q_BTHK.device)
            return self.attend(projected, view), after
        own_T = torch.arange(known.tokens, after.tokens, device=q_BTHK.device) // self.config.block
        blocks = best(self._agreement(q_BTHK, after.mean_BnJK), own_T, self.choice)
        operands, backend = (q_BTHK, after.k_BUJK, after.v_BUJV), self.config.computes_with
        return selected_after(operands, blocks, self.config.block, backend), after

    def core_flops(self, contexts_M: Tensor) -> int:
        """Of mean keys with queries, and of seen keys and values."""
        block = self.config.block
        earlier_M = (contexts_M - 1) // block
        whole = int(earlier_M.clamp(max=self.config.num_blocks - 1).sum()) * block
        seen = whole + int(((contexts_M - 1) % block + 1).sum())
        means = 2 * self.num_kv_heads * self.size * int(earlier_M.sum())
        return 4 * self.num_heads * self.size * seen + means

    def expected_traffic(self, share: Share) -> Expected:
        elements = self.num_kv_heads * self.size
        means = block_sums_traffic(share, self.config.block, elements, has_gradient=False)
        return combined((means, selected_blocks_traffic(share, self.sizes)))
