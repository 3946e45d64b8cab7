"""Efficient attention (arXiv 1812.01243), causal: softmaxes of queries and keys by themselves.

The paper's equation is `rho_q(Q) (rho_k(K)^T V)` with a softmax of every query over its features
and of every feature of the keys over all positions. In the causal form, which is ours and no
reproduction, the latter is over the tokens of the document up to the query's: feature r keeps a
mean of the values weighted by `exp(k_j[r])`, so a state of K x V numbers and K scales.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from longctx_kernels.running import weighted_means_reference
from torch import Tensor, nn

from longctx.mixers.base import Mixer, Place, ValueConfig, split_heads
from longctx.sequence.expected import Expected, Share, Sizes, means_traffic
from longctx.sequence.local import LocalView
from longctx.sequence.running import Resumed, Runs, running_means, wide
from longctx.sequence.view import SequenceView, one_row


@dataclass(frozen=True)
class EfficientConfig(ValueConfig, kind="efficient"):
    """Queries weigh features, and each feature keeps a softmax mean of the values."""

    def build(self, place: Place) -> "Efficient":
        return Efficient(self, place)


class EfficientParts(NamedTuple):
    """Weights of features, log weights of tokens for each feature, and values."""

    read_BTHK: Tensor
    k_BTHK: Tensor
    v_BTHV: Tensor


class Efficient(Mixer):
    """See the module's docstring."""

    def __init__(self, config: EfficientConfig, place: Place):
        super().__init__()
        self.config, self.num_heads = config, config.num_heads
        H, K = config.num_heads, config.size_of_head(place.width)
        self.size, self.value_size = K, config.value_dim or K
        self.query = nn.Linear(place.width, H * K, bias=False)
        self.key = nn.Linear(place.width, H * K, bias=False)
        self.value = nn.Linear(place.width, H * self.value_size, bias=False)
        self.project_out = nn.Linear(H * self.value_size, place.width, bias=False)

    def project(self, x_BTD: Tensor, view: SequenceView) -> EfficientParts:
        q_BTHK, k_BTHK, v_BTHV = (
            split_heads(linear(x_BTD), self.num_heads)
            for linear in (self.query, self.key, self.value)
        )
        return EfficientParts(wide(q_BTHK).softmax(-1), wide(k_BTHK), v_BTHV)

    def core(self, projected: EfficientParts, view: Runs) -> Tensor:
        read_BTHK, k_BTHK, v_BTHV = projected
        return running_means(view, k_BTHK, read_BTHK, v_BTHV, self.config.computes_with)

    def core_reference(self, projected: EfficientParts, view: LocalView) -> Tensor:
        read_MHK, k_MHK, v_MHV = (one_row(x)[0] for x in projected)
        ones = torch.ones_like(k_MHK)
        means_MHKV = weighted_means_reference(k_MHK, ones, v_MHV, view.plan.cuts)
        return (read_MHK[:, :, None] @ means_MHKV).view_as(projected.v_BTHV)

    def advance(
        self, projected: EfficientParts, memory: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        resumed = Resumed(memory)
        return self.core(projected, resumed), resumed.kept

    def output(self, y_BTHV: Tensor) -> Tensor:
        return self.project_out(y_BTHV.flatten(2))

    def core_flops(self, contexts_M: Tensor) -> int:
        return 4 * self.num_heads * self.size * self.value_size * contexts_M.numel()

    def expected_traffic(self, share: Share) -> Expected:
        sizes = Sizes(self.num_heads, self.num_heads, self.size, self.value_size)
        return means_traffic(share, sizes)
