"""What attention layers share: projections of queries, keys and values, positions, output gate."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from longctx.errors import InputError
from longctx.mixers.base import (
    Backend,
    HeadsConfig,
    Mixer,
    Place,
    RMSNorm,
    indivisible,
    split_heads,
)
from longctx.mixers.parts import rotate
from longctx.sequence.expected import Sizes
from longctx.sequence.local import LocalView
from longctx.sequence.sharded import Transports
from longctx.sequence.view import SequenceView


@dataclass(frozen=True)
class RotaryConfig(HeadsConfig):
    """Base of mixers of rotated queries and keys, which fla does not compute."""

    rope_base: float = 10000.0
    """Base of the rotary frequencies."""
    rope_fraction: float = 1.0
    """Share of each head that is rotated; 0 uses no positions (NoPE)."""

    def on(self, backend: Backend) -> Self:
        # fla's softmax attention is not among its operators for which there is a use here.
        return super().on("auto" if backend == "fla" else backend)

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        if self.backend == "fla":
            raise InputError(f"{where}.backend = 'fla': is for linear layers; leave it out")
        if not 0 <= self.rope_fraction <= 1:
            raise InputError(f"{where}.rope_fraction = {self.rope_fraction}: must be in 0..1")
        if self.rope_base <= 0:
            raise InputError(f"{where}.rope_base = {self.rope_base}: must be positive")


@dataclass(frozen=True)
class AttentionConfig(RotaryConfig):
    """Base of attention with queries, keys and values of its own."""

    num_kv_heads: int = 0
    """Key and value heads, shared by groups of query heads; 0 means num_heads."""
    qk_norm: bool = True
    """RMSNorm of queries and keys per head."""
    gate: Literal["none", "sigmoid"] = "none"
    """Activation of the output gate."""
    reuses: Literal["nothing", "values", "keys and values"] = "nothing"
    """What it takes from the last attention layer before it that has its own."""

    @property
    def key_heads(self) -> int:
        """Key and value heads."""
        return self.num_kv_heads or self.num_heads

    one_key_head_is_shared: ClassVar[bool] = True
    """Whether shares of the query heads can do with a copy each of a single key head."""

    def over_tp(self, width: int, tp: int) -> Self:
        return replace(super().over_tp(width, tp), num_kv_heads=max(1, self.key_heads // tp))

    def tp_refusal(self, tp: int) -> str:
        if self.key_heads == 1 and self.one_key_head_is_shared:
            return super().tp_refusal(tp)
        return super().tp_refusal(tp) or indivisible("num_kv_heads", self.key_heads, "tp", tp)

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        if self.num_kv_heads < 0 or self.num_heads % (self.num_kv_heads or 1):
            raise InputError(
                f"{where}.num_kv_heads = {self.num_kv_heads} does not divide "
                f"num_heads = {self.num_heads}"
            )


@dataclass(frozen=True)
class SparseConfig(AttentionConfig):
    """Base of attention whose exchange is its own: it takes no part in Ulysses groups."""

    def refusal(self, transports: Transports) -> str:
        return ""


class AttentionParts(NamedTuple):
    """Rotated queries and keys, values, and the raw output gate."""

    q_BTHK: Tensor
    k_BTJK: Tensor
    v_BTJV: Tensor
    gate_BTHV: Tensor | None


class Attention(Mixer):
    """Everything but the core, its traffic and its FLOPs."""

    def __init__(self, config: AttentionConfig, place: Place):
        super().__init__()
        self.config, self.num_heads = config, config.num_heads
        H, K, J = config.num_heads, config.size_of_head(place.width), config.key_heads
        self.num_kv_heads, self.size = J, K
        self.query = nn.Linear(place.width, H * K, bias=False)
        if config.reuses != "keys and values":
            self.key = nn.Linear(place.width, J * K, bias=False)
            self.key_norm = RMSNorm(K) if config.qk_norm else nn.Identity()
        if config.reuses == "nothing":
            self.value = nn.Linear(place.width, J * K, bias=False)
        self.query_norm = RMSNorm(K) if config.qk_norm else nn.Identity()
        self.gate = nn.Linear(place.width, H * K, bias=False) if config.gate != "none" else None
        self.project_out = nn.Linear(H * K, place.width, bias=False)

    @property
    def sizes(self) -> Sizes:
        """Heads and sizes, for formulas of traffic."""
        return Sizes(self.num_heads, self.num_kv_heads, self.size, self.size)

    def project(self, x_BTD: Tensor, view: SequenceView) -> Any:
        return self.attention_parts(x_BTD, view)

    def attention_parts(self, x_BTD: Tensor, view: SequenceView) -> AttentionParts:
        """Queries, keys, values and gate of these tokens."""
        q_BTHK = self.query_norm(split_heads(self.query(x_BTD), self.num_heads))
        k_BTJK, v_BTJV = self._keys_and_values(x_BTD, view)
        gate = None if self.gate is None else split_heads(self.gate(x_BTD), self.num_heads)
        return AttentionParts(self._rotate(q_BTHK, view).type_as(v_BTJV), k_BTJK, v_BTJV, gate)

    def _keys_and_values(self, x_BTD: Tensor, view: SequenceView) -> tuple[Tensor, Tensor]:
        """Own ones, left on the view for layers to come, or those that an earlier one left."""
        reuses = self.config.reuses
        if reuses == "keys and values":
            return view.left_by_attention()
        if reuses == "values":
            v_BTJV = view.left_by_attention()[1]
        else:
            v_BTJV = split_heads(self.value(x_BTD), self.num_kv_heads)
        k_BTJK = self.key_norm(split_heads(self.key(x_BTD), self.num_kv_heads))
        k_BTJK = self._rotate(k_BTJK, view).type_as(v_BTJV)
        if reuses == "nothing" and view.shelf is not None:
            view.shelf[:] = k_BTJK, v_BTJV
        return k_BTJK, v_BTJV

    def _rotate(self, x_BTHK: Tensor, view: SequenceView) -> Tensor:
        config = self.config
        return rotate(x_BTHK, view.positions_BT, config.rope_base, config.rope_fraction)

    def read(self, y_BTHV: Tensor, projected: Any) -> Tensor:
        gate = projected.gate_BTHV
        return y_BTHV if gate is None else y_BTHV * gate.sigmoid()

    def output(self, y_BTHV: Tensor) -> Tensor:
        return self.project_out(y_BTHV.flatten(2))

    @abstractmethod
    def core(self, projected: Any, view: SequenceView) -> Tensor: ...

    @abstractmethod
    def core_reference(self, projected: Any, view: LocalView) -> Tensor: ...


def masked_attention(
    q_BTHK: Tensor, k_BUJK: Tensor, v_BUJV: Tensor, seen_HTU: Tensor, scale: float | None = None
) -> Tensor:
    """Softmax attention over what is seen, `[..., H or J or 1, T, U]`; zeros where nothing is.

    Everything is laid out: for few queries, and for definitions.
    """
    H, K = q_BTHK.shape[2:]
    k_BUHK, v_BUHV = (x.repeat_interleave(H // x.shape[2], 2) for x in (k_BUJK, v_BUJV))
    if seen_HTU.shape[-3] > 1:
        seen_HTU = seen_HTU.repeat_interleave(H // seen_HTU.shape[-3], -3)
    wide = torch.promote_types(q_BTHK.dtype, torch.float32)
    scores_BHTU = q_BTHK.to(wide).transpose(1, 2) @ k_BUHK.to(wide).permute(0, 2, 3, 1)
    scores_BHTU = scores_BHTU * (K**-0.5 if scale is None else scale)
    sees_HT1 = seen_HTU.any(-1, keepdim=True)
    scores_BHTU = scores_BHTU.masked_fill(~seen_HTU & sees_HT1, -torch.inf)
    weights_BHTU = scores_BHTU.softmax(-1) * sees_HT1
    y_BTHV = (weights_BHTU @ v_BUHV.to(wide).transpose(1, 2)).transpose(1, 2)
    return y_BTHV.to(v_BUJV.dtype)
