"""Aaren, attention as a recurrent network (arXiv 2405.13956): softmax with a learned query.

The query of a head is a parameter and the same for all tokens, so that token t reads
`sum_j softmax_j(q.k_j / sqrt(K)) v_j` over the tokens up to itself: a running mean, a state of V
numbers and their scale. The paper's query is a learned token, projected in the first
layer and passed on from there; here it is one vector for each head and layer.
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
class AarenConfig(ValueConfig, kind="aaren"):
    """Softmax attention whose query is learned, and the same for all tokens."""

    def build(self, place: Place) -> "Aaren":
        return Aaren(self, place)


class AarenParts(NamedTuple):
    """Scores of keys with the query of their head, and values."""

    score_BTH1: Tensor
    v_BTHV: Tensor


class Aaren(Mixer):
    """See the module's docstring."""

    def __init__(self, config: AarenConfig, place: Place):
        super().__init__()
        self.config, self.num_heads = config, config.num_heads
        H, K = config.num_heads, config.size_of_head(place.width)
        self.size, self.value_size = K, config.value_dim or K
        self.query = nn.Parameter(torch.empty(H, K))
        self.key = nn.Linear(place.width, H * K, bias=False)
        self.value = nn.Linear(place.width, H * self.value_size, bias=False)
        self.project_out = nn.Linear(H * self.value_size, place.width, bias=False)
        nn.init.normal_(self.query)

    def initial(self, name: str, generator: torch.Generator) -> Tensor | None:
        """Queries of unit variance, so that scores differ from the start."""
        return torch.randn(self.query.shape, generator=generator) if name == "query" else None

    def project(self, x_BTD: Tensor, view: SequenceView) -> AarenParts:
        k_BTHK = wide(split_heads(self.key(x_BTD), self.num_heads))
        score_BTH1 = (k_BTHK * self.query).sum(-1, keepdim=True) * self.size**-0.5
        return AarenParts(score_BTH1, split_heads(self.value(x_BTD), self.num_heads))

    def core(self, projected: AarenParts, view: Runs) -> Tensor:
        # Depends on the values, so that what is exchanged for it also is on the way back.
        one_BTH1 = 1 + 0 * projected.v_BTHV[..., :1]
        return running_means(view, projected[0], one_BTH1, projected[1], self.config.computes_with)

    def core_reference(self, projected: AarenParts, view: LocalView) -> Tensor:
        score_MH1, v_MHV = (one_row(x)[0] for x in projected)
        ones = torch.ones_like(score_MH1)
        means_MH1V = weighted_means_reference(score_MH1, ones, v_MHV, view.plan.cuts)
        return means_MH1V[:, :, 0].view_as(projected.v_BTHV)

    def advance(
        self, projected: AarenParts, memory: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        resumed = Resumed(memory)
        return self.core(projected, resumed), resumed.kept

    def output(self, y_BTHV: Tensor) -> Tensor:
        return self.project_out(y_BTHV.flatten(2))

    def core_flops(self, contexts_M: Tensor) -> int:
        return 2 * self.num_heads * self.value_size * contexts_M.numel()

    def expected_traffic(self, share: Share) -> Expected:
        return means_traffic(share, Sizes(self.num_heads, self.num_heads, 1, self.value_size))
