"""Attention that keeps a window and a bounded set of survivors of all before, chosen by a score."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.errors import InputError
from longctx.mixers.attention import Attention, AttentionConfig, SparseConfig
from longctx.mixers.base import Place
from longctx.sequence.expected import Expected, Share
from longctx.sequence.local import LocalView
from longctx.sequence.survivors import (
    Eviction,
    Keys,
    Layout,
    attend_survivors,
    best_of,
    survivors_attention,
    survivors_traffic,
)
from longctx.sequence.view import SequenceView


@dataclass(frozen=True)
class EvictingConfig(SparseConfig):
    """Base of mixers whose keys live longer if their score is among the best."""

    capacity: int = 512
    """Keys of a head that outlive their window."""
    window: int = 512
    """Keys that a query sees for sure, its own included."""

    @abstractmethod
    def eviction(self) -> Eviction:
        """What becomes of a key."""

    def verbs(self) -> frozenset[str]:
        return frozenset({"fetch", "survivors"})

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        self.check_positive(where, "capacity", "window")

    def check_length(self, seq_len: int, where: str) -> None:
        if self.window >= seq_len:
            raise InputError(
                f"{where}.window = {self.window}: never ends in train.seq_len = {seq_len}; "
                "shorten it, or use softmax attention"
            )


class Memory(NamedTuple):
    """The last keys, the survivors of all, and how many tokens there were."""

    recent: Keys
    survivors: Keys | None
    tokens: int


class Evicting(Attention):
    """See the module's docstring."""

    config: AttentionConfig

    def __init__(self, config: EvictingConfig, place: Place):
        super().__init__(config, place)
        self.eviction = config.eviction()

    @abstractmethod
    def scored(self, projected: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values and the score of each key `[B, T, J]` in at least fp32; -inf is not
        kept."""

    def core(self, projected: Any, view: SequenceView) -> Tensor:
        *operands, score_BTJ = self.scored(projected)
        backend = self.config.computes_with
        return survivors_attention(view, tuple(operands), score_BTJ, self.eviction, backend)[0]

    def core_reference(self, projected: Any, view: LocalView) -> Tensor:
        q, k, v, score = (x.flatten(0, 1) for x in self.scored(projected))
        cuts, rows = view.cu_seqlens.tolist(), []
        for start, stop in zip(cuts, cuts[1:]):
            keys = k[start:stop], v[start:stop], score[start:stop]
            rows += [self._row(q[start + i], keys, i) for i in range(stop - start)]
        return torch.stack(rows).view(projected.q_BTHK.shape[:3] + v.shape[-1:])

    def _row(self, q_HK: Tensor, keys: tuple[Tensor, ...], i: int) -> Tensor:
        """Output of query i, over as many slots as it may see."""
        rule, outs = self.eviction, []
        slots = min(i + 1, rule.window + rule.capacity)
        for j, q_GK in enumerate(q_HK.unflatten(0, (self.num_kv_heads, -1))):
            k_UK, v_UV, score_U = (x[:, j] for x in keys)
            sign = -1 if rule.later_wins else 1
            values = score_U[: max(0, i + 1 - rule.delay)].tolist()
            competing = sorted((-x, sign * n, n) for n, x in enumerate(values) if x > -torch.inf)
            window = range(max(0, i + 1 - rule.window), i + 1)
            seen = sorted({*window, *(n for *_, n in competing[: rule.capacity])})
            padded = torch.tensor(seen + [0] * (slots - len(seen)))
            scores_GU = q_GK @ k_UK[padded].T * self.size**-0.5
            if rule.biased:
                scores_GU = scores_GU + score_U[padded]
            hidden_U = torch.arange(slots) >= len(seen)
            weights_GU = scores_GU.masked_fill(hidden_U, -torch.inf).softmax(-1)
            outs.append(weights_GU.to(v_UV.dtype) @ v_UV[padded])
        return torch.cat(outs)

    def advance(self, projected: Any, memory: Memory | None) -> tuple[Tensor, Memory]:
        q_BTHK, k_BTJK, v_BTJV, score_BTJ = self.scored(projected)
        pairs = torch.cat((k_BTJK, v_BTJV), -1).transpose(1, 2)
        return self.continued(q_BTHK, pairs, score_BTJ.transpose(1, 2), memory)

    def continued(
        self, q_BTHK: Tensor, pairs_BJTD: Tensor, score_BJT: Tensor, memory: Memory | None
    ) -> tuple[Tensor, Memory]:
        """Output of new tokens, whose scores are those of the keys that they bring to compete."""
        rule, (rows, tokens) = self.eviction, q_BTHK.shape[:2]
        before, entering = (memory.tokens, memory.survivors) if memory else (0, None)
        position = torch.arange(before, before + tokens, device=q_BTHK.device)
        wide = Keys(pairs_BJTD, torch.zeros_like(score_BJT), position.expand(score_BJT.shape))
        if memory:
            wide = Keys(*(torch.cat(pair, 2) for pair in zip(memory.recent, wide)))
        lacking = rule.left + tokens - wide.score_LJU.shape[2]
        wide = Keys(
            F.pad(wide.pairs_LJUD, (0, 0, lacking, 0)), *(F.pad(x, (lacking, 0)) for x in wide[1:])
        )
        arriving = slice(rule.left - rule.delay, rule.left - rule.delay + tokens)
        wide.score_LJU[..., arriving] = score_BJT
        layout = _going_on(before, tokens, rows, rule, q_BTHK.device)
        backend = self.config.computes_with
        out, _, survives = attend_survivors(q_BTHK, wide, entering, layout, rule, backend)
        competed = Keys(wide.pairs_LJUD[:, :, arriving], *(x[..., arriving] for x in wide[1:]))
        if entering:
            competed = Keys(*(torch.cat(pair, 2) for pair in zip(entering, competed)))
        score = competed.score_LJU.masked_fill(~survives, -torch.inf)
        kept = competed._replace(score_LJU=score)
        kept = kept.chosen(best_of(score, rule.capacity, rule.later_wins))
        total = before + tokens
        first = tokens + max(0, rule.left - total)
        recent = Keys(wide.pairs_LJUD[:, :, first:], *(x[..., first:] for x in wide[1:]))
        return out, Memory(recent, kept, total)

    def core_flops(self, contexts_M: Tensor) -> int:
        rule = self.eviction
        slots = int(contexts_M.clamp(max=rule.window + rule.capacity).sum())
        return 4 * self.num_heads * self.size * slots

    def expected_traffic(self, share: Share) -> Expected:
        return survivors_traffic(share, self.sizes, self.eviction)


def _going_on(before: int, tokens: int, rows: int, rule: Eviction, device: torch.device) -> Layout:
    """The layout of the next tokens of sequences that are one document each."""
    first = before - rule.left
    slots = torch.arange(first, before + tokens, device=device).expand(rows, -1)
    own = slots[:, rule.left :]
    return Layout(
        slots[:, 0],
        slots >= 0,
        torch.full_like(slots, rule.left + tokens + 1),
        own >= rule.delay,
        torch.zeros_like(own),
        torch.ones_like(own, dtype=torch.bool),
    )
