"""RALA, rank-augmented linear attention (arXiv 2411.07635), causal.

With `phi = elu + 1` the paper weighs key j by `e_j`, a softmax over all tokens of
`qbar.phi(k_j) / sqrt(K)` where qbar is the mean of all phi(q), which raises the rank of the sum of
keys and values; queries and keys are turned by position above, and not below:
`o_t = sum_j e_j (R phi(q_t)).(R phi(k_j)) v_j / sum_j e_j phi(q_t).phi(k_j)`, times a linear map
of x, which raises the rank of the output.

The causal form is ours and no reproduction: sums are over the tokens of the document up to t, and
`e_j = exp(qbar_j.phi(k_j) / sqrt(K))` with qbar_j the mean of phi(q) up to j, as it is when key j
is written; the mean at the reader would need all keys. What is common to all e_j cancels. The
paper's positions are of images, and its convolution of values is left out.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from longctx_kernels.running import weighted_means_reference
from torch import Tensor, nn

from longctx.errors import InputError
from longctx.mixers.base import Mixer, Place, ValueConfig, split_heads
from longctx.mixers.parts import rotate
from longctx.sequence.expected import (
    Expected,
    Gate,
    Share,
    Sizes,
    combined,
    decay_traffic,
    running_sum_traffic,
    running_traffic,
)
from longctx.sequence.local import LocalView
from longctx.sequence.running import Resumed, Runs, wide
from longctx.sequence.view import SequenceView, one_row

FLOOR = 1e-6
"""Added to the denominator, a mean of phi(q).phi(k)."""


@dataclass(frozen=True)
class RalaConfig(ValueConfig, kind="rala"):
    """Linear attention whose keys are weighted by how well the mean query matches them."""

    rope_base: float = 10000.0
    """Base of the rotary frequencies of the numerator."""

    def build(self, place: Place) -> "Rala":
        return Rala(self, place)

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        if self.rope_base <= 0:
            raise InputError(f"{where}.rope_base = {self.rope_base}: must be positive")


class RalaParts(NamedTuple):
    """Mapped queries and keys, the same turned, values, the output's factor, tokens so far."""

    q_BTHK: Tensor
    k_BTHK: Tensor
    turned_q_BTHK: Tensor
    turned_k_BTHK: Tensor
    v_BTHV: Tensor
    factor_BTHV: Tensor
    seen_BT: Tensor


class Rala(Mixer):
    """See the module's docstring."""

    def __init__(self, config: RalaConfig, place: Place):
        super().__init__()
        self.config, self.num_heads = config, config.num_heads
        H, K = config.num_heads, config.size_of_head(place.width)
        self.size, self.value_size = K, config.value_dim or K
        self.query = nn.Linear(place.width, H * K, bias=False)
        self.key = nn.Linear(place.width, H * K, bias=False)
        self.value = nn.Linear(place.width, H * self.value_size, bias=False)
        self.factor = nn.Linear(place.width, H * self.value_size, bias=False)
        self.project_out = nn.Linear(H * self.value_size, place.width, bias=False)

    def project(self, x_BTD: Tensor, view: SequenceView) -> RalaParts:
        positions_BT, base = view.positions_BT, self.config.rope_base
        q_BTHK, k_BTHK = (
            F.elu(wide(split_heads(linear(x_BTD), self.num_heads))) + 1
            for linear in (self.query, self.key)
        )
        turned = rotate(q_BTHK, positions_BT, base), rotate(k_BTHK, positions_BT, base)
        v_BTHV, factor_BTHV = (
            split_heads(linear(x_BTD), self.num_heads) for linear in (self.value, self.factor)
        )
        return RalaParts(q_BTHK, k_BTHK, *turned, v_BTHV, factor_BTHV, positions_BT + 1)

    def _log_weight(self, k: Tensor, total_q: Tensor, seen: Tensor) -> Tensor:
        """Of keys, from the sum of the queries so far."""
        return (total_q * k).sum(-1) / seen[..., None] * self.size**-0.5

    def core(self, projected: RalaParts, view: Runs) -> Tensor:
        q_BTHK, k_BTHK, turned_q_BTHK, turned_k_BTHK, v_BTHV, _, seen_BT = projected
        backend = self.config.computes_with
        # Ones that depend on what they go with: what is exchanged for them is on the way back too.
        one_BTH1 = 1 + 0 * q_BTHK[..., :1]
        total_BTHK = view.decay_attention(one_BTH1, one_BTH1, q_BTHK, None, backend)
        sums = view.running_log_sum_exp(self._log_weight(k_BTHK, total_BTHK, seen_BT))
        read_BTH1, own_BTH1 = (-sums.whole).exp()[..., None], sums.own.exp()[..., None]
        q, k, one = (x.type_as(v_BTHV) for x in (read_BTH1 * q_BTHK, own_BTH1 * k_BTHK, one_BTH1))
        below_BTH1 = view.decay_attention(q, k, one, sums.decay, backend)
        q = (read_BTH1 * turned_q_BTHK).type_as(v_BTHV)
        k = (own_BTH1 * turned_k_BTHK).type_as(v_BTHV)
        above_BTHV = view.decay_attention(q, k, v_BTHV, sums.decay, backend)
        return (above_BTHV / (wide(below_BTH1) + FLOOR)).type_as(v_BTHV)

    def core_reference(self, projected: RalaParts, view: LocalView) -> Tensor:
        q, k, turned_q, turned_k, v, _ = (one_row(x)[0] for x in projected[:-1])
        cuts, seen_M = view.plan.cuts, projected.seen_BT.flatten()
        totals = [q[a:b].cumsum(0) for a, b in zip(cuts, cuts[1:])]
        log_weight_MH1 = self._log_weight(k, torch.cat(totals), seen_M)[..., None]
        state_MHKV = weighted_means_reference(log_weight_MH1, turned_k, v, cuts)
        ones_MH1 = torch.ones_like(v[..., :1])
        scale_MHK1 = weighted_means_reference(log_weight_MH1, k, ones_MH1, cuts)
        above_MH1V, below_MH11 = turned_q[:, :, None] @ state_MHKV, q[:, :, None] @ scale_MHK1
        return (above_MH1V / (below_MH11 + FLOOR)).view_as(projected.v_BTHV)

    def advance(
        self, projected: RalaParts, memory: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        resumed = Resumed(memory)
        return self.core(projected, resumed), resumed.kept

    def read(self, y_BTHV: Tensor, projected: RalaParts) -> Tensor:
        return y_BTHV * projected.factor_BTHV

    def output(self, y_BTHV: Tensor) -> Tensor:
        return self.project_out(y_BTHV.flatten(2))

    def core_flops(self, contexts_M: Tensor) -> int:
        return 4 * self.num_heads * self.size * (self.value_size + 1) * contexts_M.numel()

    def expected_traffic(self, share: Share) -> Expected:
        """Of the mean query, of the weights, and of both states with a gate per head."""
        H, K, gate = self.num_heads, self.size, Gate(1, share.widths.state, has_gradient=False)
        states = (decay_traffic(share, Sizes(H, H, K, V), gate) for V in (self.value_size, 1))
        return combined([running_sum_traffic(share, H, K), running_traffic(share, H), *states])
