"""Gated linear attention: every key channel of a head decays by a gate of its own.

arXiv 2312.06635, section 4.4: `S_t = Diag(alpha_t) S_{t-1} + k_t v_t^T` and
`o_t = S_t^T q_t / sqrt(K)`, where `alpha_t = sigmoid(W2 W1 x_t + b)^{1 / temperature}` is of low
rank; each head's output is normalised (RMSNorm, as in the code of flash-linear-attention, where
the paper has LayerNorm) and gated by `swish(W x)`. Sizes default to those of that code. Token
shift is not the paper's: all projections see it, with one mix, where RWKV has one for each.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, Self

from torch import Tensor, nn

from longctx.errors import InputError
from longctx.mixers.base import Place, StateConfig, split_heads
from longctx.mixers.parts import (
    DecayMixer,
    GatedNorm,
    LowRank,
    TokenShift,
    log_sigmoid,
)
from longctx.sequence.expected import Expected, Share, combined
from longctx.sequence.view import SequenceView


@dataclass(frozen=True)
class GLAConfig(StateConfig, kind="gla"):
    """Gated linear attention."""

    num_heads: int = 4
    """Heads."""
    head_dim: int = 0
    """Key and query size of a head; 0 means half of model.width / num_heads."""
    value_dim: int = 0
    """Value size of a head; 0 means model.width / num_heads."""
    decay_rank: int = 16
    """Dimensions through which log decays are computed."""
    temperature: float = 16.0
    """What log decays are divided by: the larger, the longer the memory at first."""
    token_shift: bool = False
    """Mix every token with the one before it, by a learned weight per channel."""

    def build(self, place: Place) -> "GLA":
        return GLA(self, place)

    def verbs(self) -> frozenset[str]:
        return super().verbs() | ({"halo"} if self.token_shift else frozenset())

    def size_of_head(self, width: int) -> int:
        return self.head_dim or width // (2 * self.num_heads)

    def size_of_value(self, width: int) -> int:
        """Value size of a head."""
        return self.value_dim or width // self.num_heads

    def over_tp(self, width: int, tp: int) -> Self:
        return replace(super().over_tp(width, tp), value_dim=self.size_of_value(width))

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        if self.value_dim < 0:
            raise InputError(f"{where}.value_dim = {self.value_dim}: must be 0 or positive")
        if self.decay_rank < 1:
            raise InputError(f"{where}.decay_rank = {self.decay_rank}: must be at least 1")
        if self.head_dim == 0 and width % (2 * self.num_heads):
            raise InputError(
                f"{where}.num_heads = {self.num_heads}: twice as many do not divide model.width = "
                f"{width}; change one of them or set head_dim"
            )
        if self.value_dim == 0 and width % self.num_heads:
            raise InputError(
                f"{where}.num_heads = {self.num_heads} does not divide model.width = {width}; "
                "change one of them or set value_dim"
            )
        if self.temperature <= 0:
            raise InputError(f"{where}.temperature = {self.temperature}: must be positive")
        key_dim, value_dim = self.size_of_head(width), self.size_of_value(width)
        self.check_state(key_dim, value_dim, f"{where}.head_dim")


class GLAParts(NamedTuple):
    """Scaled queries, keys, values, log decays and the raw output gate."""

    q_BTHK: Tensor
    k_BTHK: Tensor
    v_BTHV: Tensor
    log_decay_BTHK: Tensor
    gate_BTHV: Tensor


class GLA(DecayMixer):
    """See the module's docstring."""

    def __init__(self, config: GLAConfig, place: Place):
        H, K = config.num_heads, config.size_of_head(place.width)
        V = config.size_of_value(place.width)
        super().__init__(config, key_dim=K, value_dim=V, gate_size=K)
        self.temperature = config.temperature
        self.shift = TokenShift(place.width) if config.token_shift else None
        self.query = nn.Linear(place.width, H * K, bias=False)
        self.key = nn.Linear(place.width, H * K, bias=False)
        self.value = nn.Linear(place.width, H * V, bias=False)
        self.decay = LowRank(place.width, config.decay_rank, H * K, bias=True)
        self.gate = nn.Linear(place.width, H * V, bias=False)
        self.norm = GatedNorm(V)
        self.project_out = nn.Linear(H * V, place.width, bias=False)

    def project(self, x_BTD: Tensor, view: SequenceView) -> GLAParts:
        if self.shift is not None:
            x_BTD = self.shift(x_BTD, view)
        H = self.num_heads
        return GLAParts(
            split_heads(self.query(x_BTD), H) * self.key_dim**-0.5,
            split_heads(self.key(x_BTD), H),
            split_heads(self.value(x_BTD), H),
            split_heads(log_sigmoid(self.decay(x_BTD)) / self.temperature, H),
            split_heads(self.gate(x_BTD), H),
        )

    def read(self, y_BTHV: Tensor, projected: GLAParts) -> Tensor:
        return self.norm(y_BTHV, projected.gate_BTHV, self.computes_with)

    def output(self, y_BTHV: Tensor) -> Tensor:
        return self.project_out(y_BTHV.flatten(2))

    def expected_traffic(self, share: Share) -> Expected:
        core = super().expected_traffic(share)
        return core if self.shift is None else combined((core, self.shift.expected_traffic(share)))
