"""Flow attention of Flowformer (arXiv 2202.06258), in the causal form of its released code.

Queries are sinks and keys sources of a flow, both through a sigmoid; cs is the running sum over
the document, t counts its tokens from 1, and 1e-6 is added to both factors of every product:

    a = t / q.cs(k)          what flows into sinks        c = q.cs(b k) / t, conserved sinks
    b = t / k.cs(q)          what flows out of sources    d = k.cs(a q) / t, conserved sources
    p = t exp(d) / cs(exp(d)), d clamped                  competition of sources
    o = sigmoid(c) a / t (q^T cs(k (p v)^T))              allocation to sinks

Each sum needs those before it, so there are four dependent exchanges, of 2 K, 2 K, 1 and K V
numbers a head.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from longctx.errors import InputError
from longctx.mixers.base import Mixer, Place, ValueConfig, split_heads
from longctx.sequence.expected import (
    Expected,
    Share,
    Sizes,
    combined,
    decay_traffic,
    running_sum_traffic,
)
from longctx.sequence.local import LocalView
from longctx.sequence.running import Resumed, Runs, wide
from longctx.sequence.view import SequenceView, one_row

EPSILON = 1e-6


@dataclass(frozen=True)
class FlowformerConfig(ValueConfig, kind="flowformer"):
    """Linear attention whose weights are those of a flow that is conserved."""

    clamp: float = 1.0
    """Largest absolute value of a conserved source, whose exponential competes."""

    def build(self, place: Place) -> "Flowformer":
        return Flowformer(self, place)

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        if self.clamp <= 0:
            raise InputError(f"{where}.clamp = {self.clamp}: must be positive")


class FlowformerParts(NamedTuple):
    """Mapped queries and keys, values, and how many tokens of the document there are so far."""

    q_BTHK: Tensor
    k_BTHK: Tensor
    v_BTHV: Tensor
    seen_BTH1: Tensor


def flow(left_BTHK: Tensor, right_BTHK: Tensor) -> Tensor:
    """Products `[B, T, H, 1]`, a little above 0."""
    return ((left_BTHK + EPSILON) * (right_BTHK + EPSILON)).sum(-1, keepdim=True)


class Flowformer(Mixer):
    """See the module's docstring."""

    def __init__(self, config: FlowformerConfig, place: Place):
        super().__init__()
        self.config, self.num_heads = config, config.num_heads
        H, K = config.num_heads, config.size_of_head(place.width)
        self.size, self.value_size = K, config.value_dim or K
        self.query = nn.Linear(place.width, H * K, bias=False)
        self.key = nn.Linear(place.width, H * K, bias=False)
        self.value = nn.Linear(place.width, H * self.value_size, bias=False)
        self.project_out = nn.Linear(H * self.value_size, place.width, bias=False)

    def project(self, x_BTD: Tensor, view: SequenceView) -> FlowformerParts:
        q_BTHK, k_BTHK = (
            wide(split_heads(linear(x_BTD), self.num_heads)).sigmoid()
            for linear in (self.query, self.key)
        )
        v_BTHV = split_heads(self.value(x_BTD), self.num_heads)
        return FlowformerParts(q_BTHK, k_BTHK, v_BTHV, (view.positions_BT + 1)[..., None, None])

    def core(self, projected: FlowformerParts, view: Runs) -> Tensor:
        q_BTHK, k_BTHK, v_BTHV, seen_BTH1 = projected
        backend = self.config.computes_with
        # Depends on the queries: what is exchanged for it is on the way back too.
        one_BTH1 = 1 + 0 * q_BTHK[..., :1]
        both_BTHK = torch.cat((k_BTHK, q_BTHK), -1)
        total_BTHK = view.decay_attention(one_BTH1, one_BTH1, both_BTHK, None, backend)
        total_k_BTHK, total_q_BTHK = total_BTHK.chunk(2, -1)
        into_BTH1 = seen_BTH1 / flow(q_BTHK, total_k_BTHK)
        out_of_BTH1 = seen_BTH1 / flow(k_BTHK, total_q_BTHK)
        both_BTHK = torch.cat((out_of_BTH1 * k_BTHK, into_BTH1 * q_BTHK), -1)
        total_BTHK = view.decay_attention(one_BTH1, one_BTH1, both_BTHK, None, backend)
        total_k_BTHK, total_q_BTHK = total_BTHK.chunk(2, -1)
        sink_BTH1 = flow(q_BTHK, total_k_BTHK) / seen_BTH1
        source_BTH1 = self._competing(flow(k_BTHK, total_q_BTHK) / seen_BTH1)
        total_BTH1 = view.decay_attention(one_BTH1, one_BTH1, source_BTH1, None, backend)
        weighed_BTHV = (seen_BTH1 * source_BTH1 / total_BTH1 * v_BTHV).type_as(v_BTHV)
        q_BTHK = (into_BTH1 / seen_BTH1 * q_BTHK).type_as(v_BTHV)
        y_BTHV = view.decay_attention(q_BTHK, k_BTHK.type_as(v_BTHV), weighed_BTHV, None, backend)
        return (sink_BTH1.sigmoid() * y_BTHV).type_as(v_BTHV)

    def _competing(self, source: Tensor) -> Tensor:
        return source.clamp(-self.config.clamp, self.config.clamp).exp()

    def core_reference(self, projected: FlowformerParts, view: LocalView) -> Tensor:
        documents = zip(*(one_row(x)[0].split(self._lengths(view)) for x in projected[:3]))
        y_MHV = torch.cat([self._document(*parts) for parts in documents])
        return y_MHV.view_as(projected.v_BTHV)

    @staticmethod
    def _lengths(view: LocalView) -> list[int]:
        return [b - a for a, b in zip(view.plan.cuts, view.plan.cuts[1:])]

    def _document(self, q_THK: Tensor, k_THK: Tensor, v_THV: Tensor) -> Tensor:
        """The released code's equations for one document, token by token."""
        t_TH1 = torch.arange(1, len(q_THK) + 1, device=q_THK.device)[:, None, None]
        a_TH1 = t_TH1 / flow(q_THK, k_THK.cumsum(0))
        b_TH1 = t_TH1 / flow(k_THK, q_THK.cumsum(0))
        c_TH1 = flow(q_THK, (b_TH1 * k_THK).cumsum(0)) / t_TH1
        exp_d_TH1 = self._competing(flow(k_THK, (a_TH1 * q_THK).cumsum(0)) / t_TH1)
        p_TH1 = t_TH1 * exp_d_TH1 / exp_d_TH1.cumsum(0)
        state_THKV = (k_THK[..., None] @ (p_TH1 * v_THV)[:, :, None]).cumsum(0)
        return c_TH1.sigmoid() * ((a_TH1 / t_TH1 * q_THK)[:, :, None] @ state_THKV)[:, :, 0]

    def advance(
        self, projected: FlowformerParts, memory: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        resumed = Resumed(memory)
        return self.core(projected, resumed), resumed.kept

    def output(self, y_BTHV: Tensor) -> Tensor:
        return self.project_out(y_BTHV.flatten(2))

    def core_flops(self, contexts_M: Tensor) -> int:
        return 4 * self.num_heads * self.size * self.value_size * contexts_M.numel()

    def expected_traffic(self, share: Share) -> Expected:
        """Of four rounds; the first three are in the precision of states."""
        H, K = self.num_heads, self.size
        rounds = [running_sum_traffic(share, H, size) for size in (2 * K, 2 * K, 1)]
        return combined([*rounds, decay_traffic(share, Sizes(H, H, K, self.value_size))])
