"""Multi-token attention (arXiv 2504.00927) within a window: scores of neighbours are mixed.

Before the softmax a filter for each head runs over scores of the query and those before it, and of
the key and those around it; where a query does not see a key, the score is 0. After the softmax
neighbouring heads can mix their weights. Both start as the identity.

Scores of a query lie by distance, `[.., T, window]`: the last column is the query's own key.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longctx.errors import InputError
from longctx.mixers.attention import Attention, AttentionParts, SparseConfig
from longctx.mixers.base import Place, indivisible
from longctx.sequence.expected import Expected, Share, combined, halo_traffic
from longctx.sequence.local import LocalView
from longctx.sequence.policy import Window
from longctx.sequence.running import wide
from longctx.sequence.view import SequenceView

BLOCK = 128
"""Queries whose scores are held at once."""


@dataclass(frozen=True)
class MTAConfig(SparseConfig, kind="mta"):
    """Windowed softmax attention to several tokens at once."""

    window: int = 512
    """Keys a query sees, its own included."""
    past_queries: int = 6
    """Queries whose scores are mixed: its own and those before it."""
    near_keys: int = 11
    """Keys whose scores are mixed, as many on either side of each."""
    mixed_heads: int = 1
    """Neighbouring heads whose weights are mixed; 1 mixes none."""

    def build(self, place: Place) -> "MTA":
        return MTA(self, place)

    def verbs(self) -> frozenset[str]:
        return frozenset({"halo"})

    def policy(self) -> Window:
        """Which tokens take part: filters reach a little beyond the window."""
        return Window(self.window + min(self.past_queries - 1, self.near_keys // 2))

    def tp_refusal(self, tp: int) -> str:
        groups = self.num_heads // self.mixed_heads
        reason = indivisible("num_heads / mixed_heads", groups, "tp", tp)
        return super().tp_refusal(tp) or reason

    def check_length(self, seq_len: int, where: str) -> None:
        self.check_window(self.window, seq_len, where)

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        if self.window < 1:
            raise InputError(
                f"{where}.window = {self.window}: scores of a window are laid out; set at least 1"
            )
        self.check_positive(where, "past_queries", "near_keys", "mixed_heads")
        if self.near_keys % 2 == 0:
            raise InputError(f"{where}.near_keys = {self.near_keys}: must be odd")
        if self.num_heads % self.mixed_heads:
            raise InputError(
                f"{where}.mixed_heads = {self.mixed_heads} does not divide "
                f"num_heads = {self.num_heads}"
            )


class MTAMemory(NamedTuple):
    """The last queries, the last keys and values side by side, and how many tokens were."""

    q_BTHK: Tensor
    pair_BTJD: Tensor
    tokens: int


class MTA(Attention):
    """See the module's docstring."""

    config: MTAConfig

    def __init__(self, config: MTAConfig, place: Place):
        super().__init__(config, place)
        self.before = config.past_queries - 1
        self.left = config.window - 1 + self.before
        shape = config.num_heads, config.past_queries, config.near_keys
        self.filter_HQN = nn.Parameter(torch.empty(shape))
        names = ["filter_HQN"]
        if config.mixed_heads > 1:
            groups = config.num_heads // config.mixed_heads
            self.mix_GMM = nn.Parameter(torch.empty(groups, *2 * (config.mixed_heads,)))
            names.append("mix_GMM")
        for name in names:
            getattr(self, name).data = self.identity(name)

    def initial(self, name: str, generator: torch.Generator) -> Tensor | None:
        """Filters that pass scores on, and mixtures of one head."""
        return self.identity(name) if name in ("filter_HQN", "mix_GMM") else None

    def identity(self, name: str) -> Tensor:
        """A parameter that changes nothing."""
        values = torch.zeros(getattr(self, name).shape)
        if name == "filter_HQN":
            values[:, 0, self.config.near_keys // 2] = 1
        else:
            values.diagonal(dim1=1, dim2=2).fill_(1)
        return values

    def core(self, projected: AttentionParts, view: SequenceView) -> Tensor:
        q_BTHK, k_BTJK, v_BTJV, _ = projected
        queries = view.halo(q_BTHK, self.before)
        pairs = view.halo(torch.cat((k_BTJK, v_BTJV), -1), self.left)
        lengths = [x.shape[1] - self.before for x in queries]
        positions = view.positions_BT.split(lengths, 1)
        return torch.cat([self._segment(*x) for x in zip(queries, pairs, positions)], 1)

    def _segment(self, q_BRHK: Tensor, pair_BUJD: Tensor, position_BT: Tensor) -> Tensor:
        """Output of tokens that `before` queries, and `left` keys and values come before."""
        outs = []
        for start in range(0, position_BT.shape[1], BLOCK):
            stop = min(start + BLOCK, position_BT.shape[1])
            q_BRhK = q_BRHK[:, start : stop + self.before]
            pair_BUjD = pair_BUJD[:, start : stop + self.left]
            outs.append(self._block(q_BRhK, pair_BUjD, position_BT[:, start:stop]))
        return torch.cat(outs, 1)

    def _block(self, q_BRHK: Tensor, pair_BUJD: Tensor, position_BT: Tensor) -> Tensor:
        group, dtype = self.num_heads // self.num_kv_heads, pair_BUJD.dtype
        k_BHUK, v_BHUV = (
            wide(x).transpose(1, 2).repeat_interleave(group, 1)
            for x in pair_BUJD.split(self.size, -1)
        )
        q_BHRK = wide(q_BRHK).transpose(1, 2) * self.size**-0.5
        scores_BHRW = _by_distance(q_BHRK @ k_BHUK.mT)
        age_W = torch.arange(self.config.window - 1, -1, -1, device=position_BT.device)
        left_BTW = position_BT[..., None] - age_W
        weights_BHTW = self._filtered(scores_BHRW, left_BTW)
        weights_BHTW = weights_BHTW.masked_fill((left_BTW < 0)[:, None], -torch.inf).softmax(-1)
        if self.config.mixed_heads > 1:
            mix_GMM = self.mix_GMM.to(weights_BHTW.dtype)
            by_group = weights_BHTW.unflatten(1, (len(mix_GMM), -1))
            weights_BHTW = (mix_GMM @ by_group.flatten(3)).view_as(weights_BHTW)
        y_BHTV = _by_key(weights_BHTW) @ v_BHUV[:, :, self.before :]
        return y_BHTV.transpose(1, 2).to(dtype)

    def _filtered(self, scores_BHRW: Tensor, left_BTW: Tensor) -> Tensor:
        """Scores `[B, H, T, W]`; a query has `left` tokens of its document before a key."""
        T, W = left_BTW.shape[1:]
        filters = self.filter_HQN.to(scores_BHRW.dtype)[..., None, None]
        near, total = self.config.near_keys // 2, torch.zeros_like(scores_BHRW[:, :, :T])
        for ago in range(self.config.past_queries):
            first = self.before - ago
            # An earlier query sees only keys of the same document.
            row_BHTW = scores_BHRW[:, :, first : first + T]
            row_BHTW = row_BHTW.masked_fill((left_BTW < ago)[:, None], 0.0)
            padded = F.pad(row_BHTW, (near, near + ago))
            for n in range(self.config.near_keys):
                total = total + filters[:, ago, n] * padded[..., ago + n : ago + n + W]
        return total

    def core_reference(self, projected: AttentionParts, view: LocalView) -> Tensor:
        q_MHK, k_MJK, v_MJV = (x.flatten(0, 1) for x in projected[:3])
        group, cuts = self.num_heads // self.num_kv_heads, view.plan.cuts
        k_HMK, v_HMV = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k_MJK, v_MJV))
        outs, near = [], self.config.near_keys // 2
        for start, stop in zip(cuts, cuts[1:]):
            rows: list[Tensor] = []
            for t in range(start, stop):
                first = max(start, t - self.config.window + 1)
                scores_HU = (q_MHK[t][:, None] @ k_HMK[:, first : t + 1].mT)[:, 0] * self.size**-0.5
                # As a row of the whole document, and room for the filter on both sides.
                rows.append(F.pad(scores_HU, (near + first - start, near + stop - 1 - t)))
                mixed = [
                    (row.unfold(1, 2 * near + 1, 1) * self.filter_HQN[:, ago, None]).sum(-1)
                    for ago, row in enumerate(rows[: -self.config.past_queries - 1 : -1])
                ]
                weights_HU = sum(mixed[1:], mixed[0])[:, first - start : t + 1 - start].softmax(-1)
                if self.config.mixed_heads > 1:
                    by_group = weights_HU.unflatten(0, (len(self.mix_GMM), -1))
                    weights_HU = (self.mix_GMM[..., None] * by_group[:, None]).sum(2).flatten(0, 1)
                outs.append((weights_HU[:, None] @ v_HMV[:, first : t + 1])[:, 0])
        return torch.stack(outs).view(projected.q_BTHK.shape)

    def advance(
        self, projected: AttentionParts, memory: MTAMemory | None
    ) -> tuple[Tensor, MTAMemory]:
        q_BTHK, k_BTJK, v_BTJV, _ = projected
        rows, tokens = q_BTHK.shape[:2]
        pair_BTJD = torch.cat((k_BTJK, v_BTJV), -1)
        memory = memory or MTAMemory(
            q_BTHK.new_zeros(rows, self.before, *q_BTHK.shape[2:]),
            pair_BTJD.new_zeros(rows, self.left, *pair_BTJD.shape[2:]),
            0,
        )
        q_BRHK = torch.cat((memory.q_BTHK, q_BTHK), 1)
        pair_BUJD = torch.cat((memory.pair_BTJD, pair_BTJD), 1)
        total = memory.tokens + tokens
        position_BT = torch.arange(memory.tokens, total, device=q_BTHK.device).expand(rows, -1)
        y_BTHV = self._segment(q_BRHK, pair_BUJD, position_BT)
        return y_BTHV, MTAMemory(q_BRHK[:, tokens:], pair_BUJD[:, tokens:], total)

    def core_flops(self, contexts_M: Tensor) -> int:
        seen = int(contexts_M.clamp(max=self.config.window).sum())
        return 4 * self.num_heads * self.size * seen

    def expected_traffic(self, share: Share) -> Expected:
        """Of queries, and of keys and values, of the tokens before each segment."""
        queries = halo_traffic(share, self.before, self.num_heads * self.size)
        pairs = halo_traffic(share, self.left, 2 * self.num_kv_heads * self.size)
        return combined((queries, pairs))


def _by_distance(dense_BHRU: Tensor) -> Tensor:
    """Of each row r, columns r to r + W - 1, where U = R + W - 1: `[.., R, W]`."""
    R, U = dense_BHRU.shape[-2:]
    sheared = F.pad(dense_BHRU.flatten(-2), (0, R)).unflatten(-1, (R, U + 1))
    return sheared[..., : U - R + 1]


def _by_key(banded_BHTW: Tensor) -> Tensor:
    """The inverse, zeros elsewhere: `[.., T, T + W - 1]`."""
    T, W = banded_BHTW.shape[-2:]
    U = T + W - 1
    return F.pad(banded_BHTW, (0, T)).flatten(-2)[..., : T * U].unflatten(-1, (T, U))
