"""Softmax attention: full or windowed, shared key heads, QK-norm, full, partial or no RoPE."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from longctx_kernels.softmax_attention import (
    softmax_attention_after,
    softmax_attention_reference,
)
from torch import Tensor, nn

from longctx.errors import InputError
from longctx.mixers.base import Backend, HeadsConfig, Mixer, Place, RMSNorm, split_heads
from longctx.mixers.parts import rotate
from longctx.sequence.expected import Expected, Share, Sizes, softmax_traffic
from longctx.sequence.local import LocalView
from longctx.sequence.sharded import Transports
from longctx.sequence.view import SequenceView, one_row


@dataclass(frozen=True)
class SoftmaxConfig(HeadsConfig, kind="softmax"):
    """Causal softmax attention."""

    num_kv_heads: int = 0
    """Key and value heads, shared by groups of query heads; 0 means num_heads."""
    window: int = 0
    """Keys a query sees, its own included; 0 sees the whole document."""
    rope_base: float = 10000.0
    """Base of the rotary frequencies."""
    rope_fraction: float = 1.0
    """Share of each head that is rotated; 0 uses no positions (NoPE)."""
    qk_norm: bool = True
    """RMSNorm of queries and keys per head."""
    gate: Literal["none", "sigmoid"] = "none"
    """Activation of the output gate."""

    def on(self, backend: Backend) -> "SoftmaxConfig":
        # fla's softmax attention is not among its operators for which there is a use here.
        return super().on("auto" if backend == "fla" else backend)

    def build(self, place: Place) -> "Softmax":
        return Softmax(self, place)

    def check_length(self, seq_len: int, where: str) -> None:
        if self.window > seq_len:
            raise InputError(
                f"{where}.window = {self.window} is longer than train.seq_len = {seq_len}; "
                "shorten it, or set 0 to see everything"
            )

    def verbs(self) -> frozenset[str]:
        return frozenset({"halo" if self.window else "stream"})

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        if self.num_kv_heads < 0 or self.num_heads % (self.num_kv_heads or 1):
            raise InputError(
                f"{where}.num_kv_heads = {self.num_kv_heads} does not divide "
                f"num_heads = {self.num_heads}"
            )
        if self.backend == "fla":
            raise InputError(f"{where}.backend = 'fla': is for linear layers; leave it out")
        if self.window < 0:
            raise InputError(f"{where}.window = {self.window}: must be 0 (no window) or positive")
        if not 0 <= self.rope_fraction <= 1:
            raise InputError(f"{where}.rope_fraction = {self.rope_fraction}: must be in 0..1")
        if self.rope_base <= 0:
            raise InputError(f"{where}.rope_base = {self.rope_base}: must be positive")

    def refusal(self, transports: Transports) -> str:
        group, key_heads = transports.heads, self.num_kv_heads or self.num_heads
        reason = super().refusal(transports)
        if reason or key_heads % group == 0 or group % key_heads == 0:
            return reason
        return (
            f"num_kv_heads = {key_heads} is neither a multiple nor a divisor of "
            f"parallel.heads = {group}: change one of them"
        )


class SoftmaxParts(NamedTuple):
    """Rotated queries and keys, values, and the raw output gate."""

    q_BTHK: Tensor
    k_BTJK: Tensor
    v_BTJV: Tensor
    gate_BTHV: Tensor | None


class Softmax(Mixer):
    """See the module's docstring."""

    def __init__(self, config: SoftmaxConfig, place: Place):
        super().__init__()
        self.config, self.num_heads = config, config.num_heads
        H, K = config.num_heads, config.size_of_head(place.width)
        J = config.num_kv_heads or H
        self.num_kv_heads, self.size = J, K
        self.query = nn.Linear(place.width, H * K, bias=False)
        self.key = nn.Linear(place.width, J * K, bias=False)
        self.value = nn.Linear(place.width, J * K, bias=False)
        self.query_norm = RMSNorm(K) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(K) if config.qk_norm else nn.Identity()
        self.gate = nn.Linear(place.width, H * K, bias=False) if config.gate != "none" else None
        self.project_out = nn.Linear(H * K, place.width, bias=False)

    def project(self, x_BTD: Tensor, view: SequenceView) -> SoftmaxParts:
        q_BTHK = self.query_norm(split_heads(self.query(x_BTD), self.num_heads))
        k_BTJK = self.key_norm(split_heads(self.key(x_BTD), self.num_kv_heads))
        v_BTJV = split_heads(self.value(x_BTD), self.num_kv_heads)
        q_BTHK, k_BTJK = self._rotate(q_BTHK, view), self._rotate(k_BTJK, view)
        gate = None if self.gate is None else split_heads(self.gate(x_BTD), self.num_heads)
        return SoftmaxParts(q_BTHK.type_as(v_BTJV), k_BTJK.type_as(v_BTJV), v_BTJV, gate)

    def _rotate(self, x_BTHK: Tensor, view: SequenceView) -> Tensor:
        config = self.config
        return rotate(x_BTHK, view.positions_BT, config.rope_base, config.rope_fraction)

    def core(self, projected: SoftmaxParts, view: SequenceView) -> Tensor:
        return view.softmax_attention(*projected[:3], self.config.window, self.config.computes_with)

    def core_reference(self, projected: SoftmaxParts, view: LocalView) -> Tensor:
        q, k, v = (one_row(x) for x in projected[:3])
        y = softmax_attention_reference(q, k, v, self.config.window, cu_seqlens=view.cu_seqlens)
        return y.view(*projected.q_BTHK.shape[:3], -1)

    def advance(
        self, projected: SoftmaxParts, memory: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        keys, values = projected.k_BTJK, projected.v_BTJV
        if memory is not None:
            keys, values = torch.cat((memory[0], keys), 1), torch.cat((memory[1], values), 1)
        window = self.config.window
        y_BTHV = softmax_attention_after(projected.q_BTHK, keys, values, window, self.size**-0.5)
        forgotten = max(0, keys.shape[1] - (window - 1)) if window else 0
        return y_BTHV, (keys[:, forgotten:], values[:, forgotten:])

    def read(self, y_BTHV: Tensor, projected: SoftmaxParts) -> Tensor:
        gate = projected.gate_BTHV
        return y_BTHV if gate is None else y_BTHV * gate.sigmoid()

    def output(self, y_BTHV: Tensor) -> Tensor:
        return self.project_out(y_BTHV.flatten(2))

    def core_flops(self, contexts_M: Tensor) -> int:
        seen_M = contexts_M.clamp(max=self.config.window) if self.config.window else contexts_M
        return 4 * self.num_heads * self.size * int(seen_M.sum())

    def expected_traffic(self, share: Share) -> Expected:
        sizes = Sizes(self.num_heads, self.num_kv_heads, self.size, self.size)
        return softmax_traffic(share, sizes, self.config.window)
