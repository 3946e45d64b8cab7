"""Scatterbrain (arXiv 2110.15343): exact softmax weights near by, features for all before that.

Tokens in a window have the weight `exp(q.k / sqrt(K))`, those before it an estimate of the same,
`phi(q).phi(k)` with FAVOR+'s `phi_r(x) = exp(w_r.x' - |x'|^2 / 2) / sqrt(R)`, `x' = x K^(-1/4)`.
One normaliser divides by the sum of all. The paper has features everywhere and adds their error
where attention is sparse, which it finds by hashing; here the sparse part is the window.

Keys and values reach the state of the features when they leave the window, so that nothing is
added and taken away again. A feature of a query is taken over its largest, whose log joins that of
the sum; keys have to be of bounded length, so QK-norm is not optional.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from longctx_kernels.decay_attention import decay_attention
from longctx_kernels.launch import SIZES
from longctx_kernels.lifetime_attention import flash_lifetime, merge
from torch import Tensor

from longctx.errors import InputError
from longctx.mixers.attention import Attention, AttentionParts, SparseConfig
from longctx.mixers.base import Place, StateConfig
from longctx.mixers.random_features import random_features
from longctx.sequence.expected import (
    Expected,
    Share,
    Sizes,
    combined,
    decay_traffic,
    halo_traffic,
)
from longctx.sequence.local import LocalView
from longctx.sequence.patterned import patterned_attention, patterned_traffic
from longctx.sequence.policy import Window
from longctx.sequence.running import wide
from longctx.sequence.sharded import Transports
from longctx.sequence.view import SequenceView


@dataclass(frozen=True)
class ScatterbrainConfig(SparseConfig, StateConfig, kind="scatterbrain"):
    """Softmax attention in a window, and by random features before it."""

    window: int = 128
    """Keys whose weights are exact, the query's own included."""
    num_features: int = 0
    """Random features of a head; 0 means twice its size."""
    feature_seed: int = 0
    """Seed of the random features, which also differ by layer and key head."""

    def build(self, place: Place) -> "Scatterbrain":
        return Scatterbrain(self, place)

    def verbs(self) -> frozenset[str]:
        return frozenset({"fetch", "halo", "prefix"})

    def refusal(self, transports: Transports) -> str:
        return StateConfig.refusal(self, transports)

    def features_of_head(self, width: int) -> int:
        """Random features of a head."""
        return self.num_features or 2 * self.size_of_head(width)

    def check_length(self, seq_len: int, where: str) -> None:
        self.check_window(self.window, seq_len, where)

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        self.check_positive(where, "window")
        for name in ("num_features", "feature_seed"):
            if getattr(self, name) < 0:
                raise InputError(f"{where}.{name} = {getattr(self, name)}: must be 0 or positive")
        if not self.qk_norm:
            raise InputError(
                f"{where}.qk_norm = false: features are exponentials of keys, which only the norm "
                "keeps small; leave it on"
            )
        features = self.features_of_head(width)
        self.check_state(features, self.size_of_head(width) + 1, f"{where}.num_features")


class Remembered(NamedTuple):
    """Keys and values in the window, how many tokens were, and the state of those before it."""

    k_BWJK: Tensor
    v_BWJV: Tensor
    tokens: int
    state: Tensor | None


class Scatterbrain(Attention):
    """See the module's docstring."""

    config: ScatterbrainConfig
    features_JRK: Tensor

    def __init__(self, config: ScatterbrainConfig, place: Place):
        super().__init__(config, place)
        self.num_features = config.features_of_head(place.width)
        seed, sizes = config.feature_seed, (self.num_features, self.size)
        drawn = [random_features(seed, place.layer, j, *sizes) for j in range(self.num_kv_heads)]
        self.register_buffer("features_JRK", torch.stack(drawn), persistent=False)
        self.backend = config.computes_with
        if self.backend == "auto" and max(self.num_features, self.size + 1) > SIZES[-1]:
            # The Triton kernels end there.
            self.backend = "torch"

    def core(self, projected: AttentionParts, view: SequenceView) -> Tensor:
        q_BTHK, k_BTJK, v_BTJV = projected[:3]
        window, backend = self.config.window, self.config.computes_with
        operands = q_BTHK, k_BTJK, v_BTJV
        near = patterned_attention(view, operands, Window(window), backend=backend)
        left = min(window, view.plan.placement.length)
        pairs = torch.cat((k_BTJK, v_BTJV), -1)
        parts = [x[:, : x.shape[1] - left] for x in view.halo(pairs, left)]
        delayed = torch.cat(parts, 1).split(self.size, -1)
        q, k, v = self._operands(q_BTHK, delayed, view.positions_BT >= window)
        sums_BTHV = view.decay_attention(q.features_BTHR, k, v, None, self.backend)
        far = self._far(q, sums_BTHV, view.positions_BT >= window)
        return merge(near, far)[0].type_as(v_BTJV)

    def _operands(
        self, q_BTHK: Tensor, delayed: tuple[Tensor, ...], is_past: Tensor
    ) -> tuple["Queries", Tensor, Tensor]:
        """Features of queries and of keys that left the window, and their values with a one."""
        k_BTJK, v_BTJV = delayed
        log_q_BTHR = self._log_features(q_BTHK)
        # What is taken off here is added to the log of the sum: neither has a gradient.
        top_BTH1 = log_q_BTHR.detach().amax(-1, keepdim=True)
        log_k_BTJR = self._log_features(k_BTJK) - math.log(self.num_features)
        k_BTJR = log_k_BTJR.exp() * is_past[..., None, None]
        v_BTJV = F.pad(v_BTJV, (0, 1), value=1.0)
        group = self.num_heads // self.num_kv_heads
        k, v = (x.type_as(v_BTJV).repeat_interleave(group, 2) for x in (k_BTJR, v_BTJV))
        return Queries((log_q_BTHR - top_BTH1).exp().type_as(v), top_BTH1), k, v

    def _log_features(self, x_BTHK: Tensor) -> Tensor:
        """`w.x' - |x'|^2 / 2` of queries or keys; autocast would round products."""
        with torch.autocast(x_BTHK.device.type, enabled=False):
            x_BTHK = wide(x_BTHK) * self.size**-0.25
            features_JRK = self.features_JRK.to(x_BTHK.dtype)
            x_JmK = x_BTHK.unflatten(2, (self.num_kv_heads, -1)).movedim(2, 0).flatten(1, 3)
            products_JmR = x_JmK @ features_JRK.mT
        shape = *x_BTHK.shape[:2], x_BTHK.shape[2] // self.num_kv_heads
        products_BTHR = products_JmR.unflatten(1, shape).movedim(0, 2).flatten(2, 3)
        return products_BTHR - x_BTHK.square().sum(-1, keepdim=True) / 2

    def _far(self, q: "Queries", sums_BTHV: Tensor, is_past: Tensor) -> tuple[Tensor, Tensor]:
        """(out, log of the sum of weights) of what is before the window; -inf of nothing."""
        is_past_BT11 = is_past[..., None, None]
        total_BTH1 = torch.where(is_past_BT11, wide(sums_BTHV[..., -1:]), 1.0)
        total_BTH1 = total_BTH1.clamp(min=torch.finfo(total_BTH1.dtype).tiny)
        lse_BTH1 = (q.top_BTH1 + total_BTH1.log()).masked_fill(~is_past_BT11, -torch.inf)
        return wide(sums_BTHV[..., :-1]) / total_BTH1, lse_BTH1[..., 0]

    def core_reference(self, projected: AttentionParts, view: LocalView) -> Tensor:
        q_MHK, k_MJK, v_MJV = (x.flatten(0, 1) for x in projected[:3])
        ones_MJV = torch.cat((v_MJV, torch.ones_like(v_MJV[..., :1])), -1)
        cuts, rows, window = view.cu_seqlens.tolist(), [], self.config.window
        for start, stop in zip(cuts, cuts[1:]):
            state_JRV = q_MHK.new_zeros(self.num_kv_heads, self.num_features, ones_MJV.shape[-1])
            for t in range(start, stop):
                seen = slice(max(start, t - window + 1), t + 1)
                q_JgK = q_MHK[t].unflatten(0, (self.num_kv_heads, -1))
                scores_JgU = q_JgK @ k_MJK[seen].permute(1, 2, 0) * self.size**-0.5
                weights_JgU, v_JUV = scores_JgU.exp(), v_MJV[seen].transpose(0, 1)
                sums_JgV, total_Jg1 = weights_JgU @ v_JUV, weights_JgU.sum(-1, keepdim=True)
                if t - window >= start:
                    left = t - window
                    k_JR1 = self._features(k_MJK[left, :, None]).mT
                    state_JRV = state_JRV + k_JR1 @ ones_MJV[left, :, None]
                    far_JgV = self._features(q_JgK) @ state_JRV
                    sums_JgV = sums_JgV + far_JgV[..., :-1]
                    total_Jg1 = total_Jg1 + far_JgV[..., -1:]
                rows.append((sums_JgV / total_Jg1).flatten(0, 1))
        return torch.stack(rows).view(projected.q_BTHK.shape)

    def _features(self, x_JgK: Tensor) -> Tensor:
        x_JgK = x_JgK * self.size**-0.25
        products_JgR = x_JgK @ self.features_JRK.to(x_JgK.dtype).mT
        half_Jg1 = x_JgK.square().sum(-1, keepdim=True) / 2
        return (products_JgR - half_Jg1).exp() * self.num_features**-0.5

    def advance(
        self, projected: AttentionParts, memory: Remembered | None
    ) -> tuple[Tensor, Remembered]:
        q_BTHK, k_BTJK, v_BTJV = projected[:3]
        window, tokens = self.config.window, q_BTHK.shape[1]
        nothing = [F.pad(x[:, :0], (0, 0, 0, 0, window, 0)) for x in (k_BTJK, v_BTJV)]
        before = memory or Remembered(nothing[0], nothing[1], 0, None)
        k_BUJK, v_BUJV = (torch.cat(both, 1) for both in zip(before[:2], (k_BTJK, v_BTJV)))
        position_T = torch.arange(before.tokens, before.tokens + tokens, device=q_BTHK.device)
        is_past = (position_T >= window)[None]
        delayed = k_BUJK[:, :tokens], v_BUJV[:, :tokens]
        q, k, v = self._operands(q_BTHK, delayed, is_past)
        sums_BTHV, state = decay_attention(
            q.features_BTHR,
            k,
            v,
            scale=1.0,
            initial_state=before.state,
            output_final_state=True,
            backend=self.backend,
        )
        near = self._near(q_BTHK, k_BUJK, v_BUJV, before.tokens)
        y_BTHV = merge(near, self._far(q, sums_BTHV, is_past))[0].type_as(v_BTJV)
        kept = k_BUJK[:, tokens:], v_BUJV[:, tokens:]
        return y_BTHV, Remembered(*kept, before.tokens + tokens, state)

    def _near(
        self, q_BTHK: Tensor, k_BUJK: Tensor, v_BUJV: Tensor, before: int
    ) -> tuple[Tensor, Tensor]:
        """Attention to the window; the first of `window + T` keys may be of no token."""
        window, (rows, length) = self.config.window, k_BUJK.shape[:2]
        place_BU = torch.arange(rows * length, device=q_BTHK.device).view(rows, length)
        expiry_BU = place_BU + window
        expiry_BU[:, : max(0, window - before)] = 0
        q, k, v = (x.flatten(0, 1)[None] for x in (q_BTHK, k_BUJK, v_BUJV))
        out, lse = flash_lifetime(
            q,
            k,
            v,
            expiry=expiry_BU.view(1, -1),
            query_positions=place_BU[:, window:].reshape(1, -1),
            key_positions=place_BU.view(1, -1),
            backend=self.config.computes_with,
        )
        return out.view(q_BTHK.shape), lse.view(q_BTHK.shape[:3])

    def core_flops(self, contexts_M: Tensor) -> int:
        """Of keys and values in the window, and of features and their state for tokens before."""
        H, J, K, R = self.num_heads, self.num_kv_heads, self.size, self.num_features
        seen = int(contexts_M.clamp(max=self.config.window).sum())
        beyond = int((contexts_M > self.config.window).sum())
        return 4 * H * K * seen + 2 * (H + J) * R * (K + K + 1) * beyond

    def expected_traffic(self, share: Share) -> Expected:
        window, H, pair = self.config.window, self.num_heads, 2 * self.num_kv_heads * self.size
        left = min(window, share.placement.length)
        return combined(
            (
                patterned_traffic(share, self.sizes, Window(window)),
                halo_traffic(share, left, pair),
                decay_traffic(share, Sizes(H, H, self.num_features, self.size + 1)),
            )
        )


class Queries(NamedTuple):
    """Features of queries over the largest of each, and its log."""

    features_BTHR: Tensor
    top_BTH1: Tensor
