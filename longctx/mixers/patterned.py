"""Attention by a policy of positions: what S2, Sparse Transformers, PowerAttention and the like are
but for the policy itself."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longctx.mixers.attention import (
    Attention,
    AttentionConfig,
    AttentionParts,
    SparseConfig,
    masked_attention,
)
from longctx.mixers.base import Place
from longctx.sequence.expected import Expected, Share
from longctx.sequence.local import LocalView
from longctx.sequence.patterned import patterned_attention, patterned_traffic
from longctx.sequence.policy import Lifetime, Policy
from longctx.sequence.view import SequenceView


@dataclass(frozen=True)
class PatternedConfig(SparseConfig):
    """Base of them: a subclass says which policy its fields mean."""

    @abstractmethod
    def policy(self) -> Policy:
        """Who sees whom."""

    def policy_at(self, _place: Place) -> Policy:
        """The same for the share of the heads that stands there."""
        return self.policy()

    def build(self, place: Place) -> "Patterned":
        return Patterned(self, place)

    def verbs(self) -> frozenset[str]:
        return frozenset({"fetch"})


class Kept(NamedTuple):
    """Keys and values of a pattern that tokens to come may see, and their positions."""

    k_BUJK: Tensor
    v_BUJV: Tensor
    position_U: Tensor


class Remembered(NamedTuple):
    """What is kept for each pattern, and how many tokens there were."""

    kept: tuple[Kept, ...]
    tokens: int


class Patterned(Attention):
    """See the module's docstring."""

    config: AttentionConfig

    def __init__(self, config: PatternedConfig, place: Place):
        super().__init__(config, place)
        self.policy = config.policy_at(place)

    def core(self, projected: AttentionParts, view: SequenceView) -> Tensor:
        backend = self.config.computes_with
        return patterned_attention(view, projected[:3], self.policy, backend=backend)[0]

    def core_reference(self, projected: AttentionParts, view: LocalView) -> Tensor:
        q_MHK, k_MJK, v_MJV = (x.flatten(0, 1) for x in projected[:3])
        cuts, rows = view.cu_seqlens.tolist(), []
        for start, stop in zip(cuts, cuts[1:]):
            for query in range(start, stop):
                keys = torch.arange(query + 1 - start)
                seen_NU = self.policy.sees(torch.tensor(query - start), keys)
                rows.append(self._row(q_MHK[query], k_MJK, v_MJV, seen_NU, start))
        return torch.stack(rows).view(projected.q_BTHK.shape[:3] + v_MJV.shape[-1:])

    def _row(self, q_HK: Any, k_MJK: Any, v_MJV: Any, seen_NU: Tensor, start: int) -> Tensor:
        """Output of a query, pattern by pattern."""
        outs, group = [], self.num_heads // self.num_kv_heads
        patterns = len(seen_NU)
        for n, q_hK in enumerate(q_HK.chunk(patterns)):
            seen = seen_NU[n].nonzero()[:, 0] + start
            k_hUK, v_hUV = (
                x[seen].chunk(patterns, 1)[n].repeat_interleave(group, 1).transpose(0, 1)
                for x in (k_MJK, v_MJV)
            )
            scores_h1U = q_hK[:, None] @ k_hUK.mT * self.size**-0.5
            outs.append((scores_h1U.softmax(-1) @ v_hUV)[:, 0])
        return torch.cat(outs)

    def advance(
        self, projected: AttentionParts, memory: Remembered | None
    ) -> tuple[Tensor, Remembered]:
        q_BTHK, k_BTJK, v_BTJV = projected[:3]
        before, (rows, tokens) = memory.tokens if memory else 0, q_BTHK.shape[:2]
        position_T = torch.arange(before, before + tokens)
        patterns = self.policy.patterns
        keys = [
            Kept(k, v, position_T)
            for k, v in zip(k_BTJK.chunk(patterns, 2), v_BTJV.chunk(patterns, 2))
        ]
        if memory is None:
            y_BTHV = self.core(projected, LocalView.whole(rows, tokens, q_BTHK.device))
        else:
            keys = [
                Kept(torch.cat((old[0], k), 1), torch.cat((old[1], v), 1), torch.cat((old[2], at)))
                for old, (k, v, at) in zip(memory.kept, keys)
            ]
            queries = enumerate(q_BTHK.chunk(patterns, 2))
            y_BTHV = torch.cat([self._seen(n, q, keys[n], position_T) for n, q in queries], 2)
        kept = tuple(self._pruned(n, own, before + tokens) for n, own in enumerate(keys))
        return y_BTHV, Remembered(kept, before + tokens)

    def _seen(self, n: int, q_BThK: Tensor, keys: Kept, position_T: Tensor) -> Tensor:
        """Output of the heads of pattern n."""
        seen_TU = self.policy.sees(position_T[:, None], keys.position_U)[n]
        return masked_attention(q_BThK, keys.k_BUJK, keys.v_BUJV, seen_TU[None].to(q_BThK.device))

    def _pruned(self, n: int, keys: Kept, tokens: int) -> Kept:
        """Without what no later token of pattern n sees."""
        if not isinstance(self.policy, Lifetime):
            return keys
        kept_U = self.policy.expiry(keys.position_U)[n] > tokens
        on_device = kept_U.to(keys.k_BUJK.device)
        return Kept(keys.k_BUJK[:, on_device], keys.v_BUJV[:, on_device], keys.position_U[kept_U])

    def core_flops(self, contexts_M: Tensor) -> int:
        counts_NT = self.policy.counts(int(contexts_M.max()))
        pairs = int(counts_NT.to(contexts_M.device)[:, contexts_M - 1].sum())
        return 4 * self.size * self.num_heads // self.policy.patterns * pairs

    def expected_traffic(self, share: Share) -> Expected:
        return patterned_traffic(share, self.sizes, self.policy)
