"""Linear attention: a feature map, a constant decay or none, a state of fixed size.

`basic` is elu1 with a denominator. Lightning Attention is silu with the `alibi` decay (the
schedule of the TransNormerLLM and MiniMax code) or `paper` (equation 10 of arXiv 2405.17381);
RetNet's constants are `retention`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from longctx_kernels.decay_attention import decay_attention, decay_attention_reference
from torch import Tensor, nn

from longctx.errors import InputError
from longctx.mixers.base import HeadsConfig, Mixer, Place, RMSNorm, split_heads
from longctx.sequence.expected import Expected, Share, Sizes, decay_traffic
from longctx.sequence.local import LocalView
from longctx.sequence.sharded import Transports
from longctx.sequence.view import SequenceView, one_row


class FeatureMap(NamedTuple):
    """A map of queries and keys; only positive ones allow a denominator."""

    apply: Callable[[Tensor], Tensor]
    is_positive: bool


FEATURE_MAPS: dict[str, FeatureMap] = {
    "identity": FeatureMap(lambda x: x, False),
    "silu": FeatureMap(F.silu, False),
    "unit": FeatureMap(lambda x: F.normalize(x, dim=-1), False),
    "relu": FeatureMap(F.relu, True),
    "elu1": FeatureMap(lambda x: F.elu(x) + 1, True),
    "sigmoid": FeatureMap(torch.sigmoid, True),
    "softmax": FeatureMap(lambda x: x.softmax(-1), True),
}

GATES: dict[str, Callable[[Tensor], Tensor]] = {"swish": F.silu, "sigmoid": torch.sigmoid}


def log_decay(schedule: str, num_heads: int, place: Place) -> Tensor | None:
    """Log decay per head of a named schedule, at most 0."""
    h = torch.arange(1, num_heads + 1, dtype=torch.float64)
    if schedule == "alibi":
        depth_factor = 1 - place.layer / max(1, place.depth - 1) + 1e-5
        return -torch.exp2(-8 * h / num_heads) * depth_factor
    if schedule == "paper":
        return -8 * h / num_heads * (1 - place.layer / place.depth)
    if schedule == "retention":
        return torch.log1p(-torch.exp2(-4 - h))
    return None


@dataclass(frozen=True)
class LinearConfig(HeadsConfig, kind="linear"):
    """Linear attention with constant decay (lightning, retention) or none."""

    value_dim: int = 0
    """Value size of a head; 0 means the key size."""
    feature_map: str = "silu"
    """Map of queries and keys: identity, silu, unit, relu, elu1, sigmoid, softmax."""
    decay: Literal["none", "alibi", "paper", "retention"] = "alibi"
    """Schedule of the constant decay per head and layer."""
    denominator: bool = False
    """Divide by the sum of the weights; needs a positive feature map."""
    gate: Literal["none", "swish", "sigmoid"] = "swish"
    """Activation of the output gate."""
    output_norm: bool = True
    """RMSNorm of each head's output."""

    def build(self, place: Place) -> "Linear":
        return Linear(self, place)

    def verbs(self) -> frozenset[str]:
        return frozenset({"prefix"})

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        if self.feature_map not in FEATURE_MAPS:
            known = ", ".join(FEATURE_MAPS)
            raise InputError(f"{where}.feature_map = {self.feature_map!r}: expected one of {known}")
        if self.denominator and not FEATURE_MAPS[self.feature_map].is_positive:
            raise InputError(
                f"{where}.denominator needs a positive feature map; {self.feature_map!r} is not: "
                "choose relu, elu1, sigmoid or softmax, or leave the denominator out"
            )

    def refusal(self, transports: Transports) -> str:
        if transports.prefix == "ulysses":
            return super().refusal(transports)
        if self.backend == "fla":
            return "backend = 'fla' cannot split a sequence: choose auto, or prefix 'ulysses'"
        return ""


class LinearParts(NamedTuple):
    """Mapped queries and keys, values, and the raw output gate."""

    q_BTHK: Tensor
    k_BTHK: Tensor
    v_BTHV: Tensor
    gate_BTHV: Tensor | None


class Linear(Mixer):
    """See the module's docstring."""

    log_decay_H: Tensor | None

    def __init__(self, config: LinearConfig, place: Place):
        super().__init__()
        self.config, self.num_heads = config, config.num_heads
        H, K = config.num_heads, config.size_of_head(place.width)
        V = config.value_dim or K
        self.query = nn.Linear(place.width, H * K, bias=False)
        self.key = nn.Linear(place.width, H * K, bias=False)
        self.value = nn.Linear(place.width, H * V, bias=False)
        self.gate = nn.Linear(place.width, H * V, bias=False) if config.gate != "none" else None
        self.norm = RMSNorm(V) if config.output_norm else None
        self.project_out = nn.Linear(H * V, place.width, bias=False)
        self.register_buffer("log_decay_H", log_decay(config.decay, H, place), persistent=False)
        self.state_size = K * (V + config.denominator)

    def project(self, x_BTD: Tensor, view: SequenceView) -> LinearParts:
        feature_map = FEATURE_MAPS[self.config.feature_map].apply
        v_BTHV = split_heads(self.value(x_BTD), self.num_heads)
        q_BTHK = feature_map(split_heads(self.query(x_BTD), self.num_heads))
        k_BTHK = feature_map(split_heads(self.key(x_BTD), self.num_heads))
        if self.config.denominator:
            v_BTHV = F.pad(v_BTHV, (0, 1), value=1.0)
        gate = None if self.gate is None else split_heads(self.gate(x_BTD), self.num_heads)
        return LinearParts(q_BTHK.type_as(v_BTHV), k_BTHK.type_as(v_BTHV), v_BTHV, gate)

    def core(self, projected: LinearParts, view: SequenceView) -> Tensor:
        q_BTHK, k_BTHK, v_BTHV, _ = projected
        return self._divide(
            view.decay_attention(
                q_BTHK, k_BTHK, v_BTHV, self.log_decay_H, self.config.computes_with
            )
        )

    def core_reference(self, projected: LinearParts, view: LocalView) -> Tensor:
        q, k, v = (one_row(x) for x in projected[:3])
        y, _ = decay_attention_reference(
            q, k, v, g_gamma=self.log_decay_H, scale=1.0, cu_seqlens=view.cu_seqlens
        )
        return self._divide(y.view_as(projected.v_BTHV))

    def advance(
        self, projected: LinearParts, memory: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        q_BTHK, k_BTHK, v_BTHV, _ = projected
        y_BTHV, memory = decay_attention(
            q_BTHK,
            k_BTHK,
            v_BTHV,
            g_gamma=self.log_decay_H,
            scale=1.0,
            initial_state=memory,
            output_final_state=True,
        )
        return self._divide(y_BTHV), memory

    def _divide(self, y_BTHV: Tensor) -> Tensor:
        if not self.config.denominator:
            return y_BTHV
        return y_BTHV[..., :-1] / y_BTHV[..., -1:].clamp(min=1e-6)

    def read(self, y_BTHV: Tensor, projected: LinearParts) -> Tensor:
        if self.norm is not None:
            y_BTHV = self.norm(y_BTHV)
        if projected.gate_BTHV is not None:
            y_BTHV = y_BTHV * GATES[self.config.gate](projected.gate_BTHV)
        return y_BTHV

    def output(self, y_BTHV: Tensor) -> Tensor:
        return self.project_out(y_BTHV.flatten(2))

    def core_flops(self, contexts_M: Tensor) -> int:
        return 4 * self.num_heads * self.state_size * contexts_M.numel()

    def expected_traffic(self, share: Share) -> Expected:
        key_dim = self.query.out_features // self.num_heads
        value_dim = self.state_size // key_dim
        return decay_traffic(share, Sizes(self.num_heads, self.num_heads, key_dim, value_dim))
