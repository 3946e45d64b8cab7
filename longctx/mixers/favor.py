"""FAVOR+ of Performers (arXiv 2009.14794): softmax attention by positive random features.

`phi_r(x) = exp(w_r.x' - |x'|^2 / 2)` with `x' = x K^(-1/4)` and w in orthogonal blocks of normal
length (both in its section 2); `o_t = sum_j phi(q_t).phi(k_j) v_j / sum_j phi(q_t).phi(k_j)`.

No exponential is taken before a scale is off. The released code stabilises keys by the largest
exponent of the whole sequence, which sees the future and differs from rank to rank if every rank
takes its own. Here every feature r carries the log of its running sum, L, and a mean of values, W:
`o_t = sum_r softmax_r(log phi_r(q_t) + L_t) W_t`, the same for any split.

The code's 1e-4, added to features, is here added to `phi(k)` as it is, and to `phi(q)` over its
largest feature, as the code does. The features are drawn once and never again.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from longctx_kernels.running import running_log_sum_exp_reference, weighted_means_reference
from torch import Tensor, nn

from longctx.errors import InputError
from longctx.mixers.base import Mixer, Place, ValueConfig, split_heads
from longctx.mixers.random_features import random_features
from longctx.sequence.expected import Expected, Share, Sizes, means_traffic
from longctx.sequence.local import LocalView
from longctx.sequence.running import Resumed, Runs, wide
from longctx.sequence.view import SequenceView, one_row

LOG_FLOOR = math.log(1e-4)


@dataclass(frozen=True)
class FavorConfig(ValueConfig, kind="favor"):
    """Softmax attention approximated by positive orthogonal random features (Performer)."""

    num_features: int = 0
    """Random features of a head; 0 means K log K for a key size K, rounded down."""
    feature_seed: int = 0
    """Seed of the random features, which also differ by layer and head."""

    def build(self, place: Place) -> "Favor":
        return Favor(self, place)

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        for name in ("num_features", "feature_seed"):
            if getattr(self, name) < 0:
                raise InputError(f"{where}.{name} = {getattr(self, name)}: must be 0 or positive")

    def features_of_head(self, width: int) -> int:
        """Random features of a head."""
        size = self.size_of_head(width)
        return self.num_features or max(1, int(size * math.log(size)))


class FavorParts(NamedTuple):
    """Logs of the features of queries and keys, and values."""

    log_q_BTHR: Tensor
    log_k_BTHR: Tensor
    v_BTHV: Tensor


class Favor(Mixer):
    """See the module's docstring."""

    features_HRK: Tensor

    def __init__(self, config: FavorConfig, place: Place):
        super().__init__()
        self.config, self.num_heads = config, config.num_heads
        H, K, R = config.num_heads, *self._sizes(config, place)
        self.size, self.num_features, self.value_size = K, R, config.value_dim or K
        self.query = nn.Linear(place.width, H * K, bias=False)
        self.key = nn.Linear(place.width, H * K, bias=False)
        self.value = nn.Linear(place.width, H * self.value_size, bias=False)
        self.project_out = nn.Linear(H * self.value_size, place.width, bias=False)
        drawn = [random_features(config.feature_seed, place.layer, h, R, K) for h in range(H)]
        self.register_buffer("features_HRK", torch.stack(drawn), persistent=False)

    @staticmethod
    def _sizes(config: FavorConfig, place: Place) -> tuple[int, int]:
        return config.size_of_head(place.width), config.features_of_head(place.width)

    def project(self, x_BTD: Tensor, view: SequenceView) -> FavorParts:
        q_BTHR, _ = self._exponents(split_heads(self.query(x_BTD), self.num_heads))
        k_BTHR, half_BTH1 = self._exponents(split_heads(self.key(x_BTD), self.num_heads))
        floor = k_BTHR.new_full((), LOG_FLOOR)
        # The length of a query scales all its features, and so does their largest.
        log_q_BTHR = torch.logaddexp(q_BTHR - q_BTHR.amax(-1, keepdim=True), floor)
        log_k_BTHR = torch.logaddexp(k_BTHR - half_BTH1, floor)
        return FavorParts(log_q_BTHR, log_k_BTHR, split_heads(self.value(x_BTD), self.num_heads))

    def _exponents(self, x_BTHK: Tensor) -> tuple[Tensor, Tensor]:
        """Products with random vectors, half the squared length; autocast would round them."""
        with torch.autocast(x_BTHK.device.type, enabled=False):
            x_BTHK = wide(x_BTHK) * self.size**-0.25
            products = torch.einsum("bthk,hrk->bthr", x_BTHK, self.features_HRK.to(x_BTHK.dtype))
            return products, x_BTHK.square().sum(-1, keepdim=True) / 2

    def core(self, projected: FavorParts, view: Runs) -> Tensor:
        log_q_BTHR, log_k_BTHR, v_BTHV = projected
        sums = view.running_log_sum_exp(log_k_BTHR)
        read_BTHR = ((log_q_BTHR + sums.total).log_softmax(-1) - sums.whole).exp().type_as(v_BTHV)
        own_BTHR = sums.own.exp().type_as(v_BTHV)
        backend = self.config.computes_with
        return view.decay_attention(read_BTHR, own_BTHR, v_BTHV, sums.decay, backend)

    def core_reference(self, projected: FavorParts, view: LocalView) -> Tensor:
        log_q_MHR, log_k_MHR, v_MHV = (one_row(x)[0] for x in projected)
        total_1MHR = running_log_sum_exp_reference(log_k_MHR[None], None, view.cu_seqlens)
        read_MHR = (log_q_MHR + total_1MHR[0]).softmax(-1)
        ones = torch.ones_like(log_k_MHR)
        means_MHRV = weighted_means_reference(log_k_MHR, ones, v_MHV, view.plan.cuts)
        return (read_MHR[:, :, None] @ means_MHRV).view_as(projected.v_BTHV)

    def advance(
        self, projected: FavorParts, memory: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        resumed = Resumed(memory)
        return self.core(projected, resumed), resumed.kept

    def output(self, y_BTHV: Tensor) -> Tensor:
        return self.project_out(y_BTHV.flatten(2))

    def core_flops(self, contexts_M: Tensor) -> int:
        """Of features of queries and keys, and of features with values twice."""
        rows = self.num_heads * self.num_features
        return 4 * rows * (self.size + self.value_size) * contexts_M.numel()

    def expected_traffic(self, share: Share) -> Expected:
        H, R = self.num_heads, self.num_features
        return means_traffic(share, Sizes(H, H, R, self.value_size))
