"""Softmax attention: full or windowed, shared key heads, QK-norm, full, partial or no RoPE."""

from dataclasses import dataclass

import torch
from longctx_kernels.softmax_attention import (
    softmax_attention_after,
    softmax_attention_reference,
)
from torch import Tensor

from longctx.errors import InputError
from longctx.mixers.attention import Attention, AttentionConfig, AttentionParts
from longctx.mixers.base import Place
from longctx.sequence.expected import Expected, Share, softmax_traffic
from longctx.sequence.local import LocalView
from longctx.sequence.sharded import Transports
from longctx.sequence.view import SequenceView, one_row


@dataclass(frozen=True)
class SoftmaxConfig(AttentionConfig, kind="softmax"):
    """Causal softmax attention."""

    window: int = 0
    """Keys a query sees, its own included; 0 sees the whole document."""

    def build(self, place: Place) -> "Softmax":
        return Softmax(self, place)

    def check_length(self, seq_len: int, where: str) -> None:
        self.check_window(self.window, seq_len, where)

    def verbs(self) -> frozenset[str]:
        return frozenset({"halo" if self.window else "stream"})

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        if self.window < 0:
            raise InputError(f"{where}.window = {self.window}: must be 0 (no window) or positive")

    def refusal(self, transports: Transports) -> str:
        group, key_heads = transports.heads, self.key_heads
        reason = super().refusal(transports)
        if reason or key_heads % group == 0 or group % key_heads == 0:
            return reason
        return (
            f"num_kv_heads = {key_heads} is neither a multiple nor a divisor of "
            f"parallel.heads = {group}: change one of them"
        )


class Softmax(Attention):
    """See the module's docstring."""

    config: SoftmaxConfig

    def core(self, projected: AttentionParts, view: SequenceView) -> Tensor:
        return view.softmax_attention(*projected[:3], self.config.window, self.config.computes_with)

    def core_reference(self, projected: AttentionParts, view: LocalView) -> Tensor:
        q, k, v = (one_row(x) for x in projected[:3])
        y = softmax_attention_reference(q, k, v, self.config.window, cu_seqlens=view.cu_seqlens)
        return y.view(*projected.q_BTHK.shape[:3], -1)

    def advance(
        self, projected: AttentionParts, memory: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        keys, values = projected.k_BTJK, projected.v_BTJV
        if memory is not None:
            keys, values = torch.cat((memory[0], keys), 1), torch.cat((memory[1], values), 1)
        window = self.config.window
        y_BTHV = softmax_attention_after(projected.q_BTHK, keys, values, window, self.size**-0.5)
        forgotten = max(0, keys.shape[1] - (window - 1)) if window else 0
        return y_BTHV, (keys[:, forgotten:], values[:, forgotten:])

    def core_flops(self, contexts_M: Tensor) -> int:
        seen_M = contexts_M.clamp(max=self.config.window) if self.config.window else contexts_M
        return 4 * self.num_heads * self.size * int(seen_M.sum())

    def expected_traffic(self, share: Share) -> Expected:
        return softmax_traffic(share, self.sizes, self.config.window)
