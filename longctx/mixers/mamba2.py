"""Mamba-2: a state-space layer whose heads decay by one gate each, as decay attention.

arXiv 2405.21060 (SSD), as in its code and transformers' Mamba2Mixer:
`S_t = exp(-exp(A_log) dt_t) S_{t-1} + B_t (dt_t x_t)^T`, `y_t = S_t^T C_t + D x_t`, where
`dt = softplus(dt_raw + dt_bias)` and x, B, C have gone through one short convolution. So keys are
B, queries C, values `dt x`. B and C belong to groups of heads. The output is `RMSNorm(y silu(z))`,
with a norm over the heads of each group. Splits send one state and one gate a head, and the
convolution's halo; Ulysses alone sends B and C, once for each head.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from longctx_kernels.norm_gate import norm_gate
from torch import Tensor, nn

from longctx.errors import InputError
from longctx.mixers.base import Place, StateConfig, indivisible, split_heads
from longctx.mixers.parts import DecayMixer, SelectiveDecay, ShortConvolution
from longctx.sequence.expected import Expected, Share, combined
from longctx.sequence.view import SequenceView


@dataclass(frozen=True)
class Mamba2Config(StateConfig, kind="mamba2"):
    """Mamba-2."""

    num_heads: int = 8
    """Heads; published models have model.width / 32."""
    head_dim: int = 0
    """Channels of a head; 0 means twice model.width / num_heads, which published models have."""
    state_size: int = 128
    """Size of the keys B and queries C: each head's state is state_size x head_dim."""
    num_groups: int = 1
    """Groups of heads that share B and C, and a norm."""
    convolution: int = 4
    """Taps of the short convolution of x, B and C."""

    def build(self, place: Place) -> "Mamba2":
        return Mamba2(self, place)

    def verbs(self) -> frozenset[str]:
        return super().verbs() | {"halo"}

    def size_of_head(self, width: int) -> int:
        return self.state_size

    def size_of_value(self, width: int) -> int:
        """Channels of a head."""
        return self.head_dim or 2 * width // self.num_heads

    def over_tp(self, width: int, tp: int) -> Self:
        share = super().over_tp(width, tp)
        groups = self.num_groups // tp
        return replace(share, head_dim=self.size_of_value(width), num_groups=groups)

    def tp_refusal(self, tp: int) -> str:
        return super().tp_refusal(tp) or indivisible("num_groups", self.num_groups, "tp", tp)

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        if self.state_size < 1:
            raise InputError(f"{where}.state_size = {self.state_size}: must be at least 1")
        if self.num_groups < 1 or self.num_heads % self.num_groups:
            raise InputError(
                f"{where}.num_groups = {self.num_groups} does not divide num_heads = "
                f"{self.num_heads}; change one of them"
            )
        if self.convolution not in range(2, 9):
            raise InputError(f"{where}.convolution = {self.convolution}: must be 2..8 taps")
        self.check_state(self.state_size, self.size_of_value(width), f"{where}.state_size")


class Mamba2Parts(NamedTuple):
    """C, B, `dt x`, log decays, x and the raw output gate z."""

    q_BTHK: Tensor
    k_BTHK: Tensor
    v_BTHV: Tensor
    log_decay_BTH: Tensor
    x_BTHV: Tensor
    gate_BTHV: Tensor


class Mamba2(DecayMixer):
    """See the module's docstring."""

    def __init__(self, config: Mamba2Config, place: Place):
        H, K, V = config.num_heads, config.state_size, config.size_of_value(place.width)
        super().__init__(config, key_dim=K, value_dim=V, gate_size=1)
        self.num_groups = config.num_groups
        self.sizes = (H * V, self.num_groups * K, self.num_groups * K)
        self.project_in = nn.Linear(place.width, H * V + sum(self.sizes) + H, bias=False)
        self.convolve = ShortConvolution(sum(self.sizes), config.convolution, bias=True)
        self.decay = SelectiveDecay(H, rates=(1, 16))
        self.D = nn.Parameter(torch.ones(H))
        self.norm_weight = nn.Parameter(torch.ones(H * V))
        self.project_out = nn.Linear(H * V, place.width, bias=False)

    def stretches(self) -> dict[str, tuple[int, ...]]:
        return {
            "project_in.weight": (self.sizes[0], *self.sizes, self.num_heads),
            "convolve.weight": self.sizes,
            "convolve.bias": self.sizes,
        }

    def project(self, x_BTD: Tensor, view: SequenceView) -> Mamba2Parts:
        H, groups = self.num_heads, self.num_groups
        gate, xBC, dt_BTH = self.project_in(x_BTD).split((self.sizes[0], sum(self.sizes), H), -1)
        x, B, C = self.convolve(xBC, view, self.computes_with).split(self.sizes, -1)
        x_BTHV = split_heads(x, H)
        step_BTH = self.decay.steps(dt_BTH)
        k_BTHK, q_BTHK = (split_heads(y, groups).repeat_interleave(H // groups, 2) for y in (B, C))
        return Mamba2Parts(
            q_BTHK,
            k_BTHK,
            (step_BTH[..., None] * x_BTHV).type_as(x_BTHV),
            self.decay(dt_BTH),
            x_BTHV,
            split_heads(gate, H),
        )

    def _wide(self, x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def read(self, y_BTHV: Tensor, projected: Mamba2Parts) -> Tensor:
        wide_BTHV = self._wide(y_BTHV) + self.D[:, None] * projected.x_BTHV
        wide_BTHV = wide_BTHV * F.silu(self._wide(projected.gate_BTHV))
        grouped = split_heads(wide_BTHV.flatten(2), self.num_groups)
        backend = "torch" if self.computes_with == "fla" else self.computes_with
        normed = norm_gate(grouped, eps=1e-5, activation="none", backend=backend)
        return (normed.flatten(2) * self.norm_weight).view_as(y_BTHV).type_as(y_BTHV)

    def output(self, y_BTHV: Tensor) -> Tensor:
        return self.project_out(y_BTHV.flatten(2))

    def expected_traffic(self, share: Share) -> Expected:
        core = super().expected_traffic(share)
        return combined((core, self.convolve.expected_traffic(share)))
