"""Titans (arXiv 2501.00663) with a linear memory: gradient steps with momentum and forgetting.

The memory M answers M^T k for a key. A token's loss `|M^T k - v|^2 / 2` has the gradient
`k (M^T k - v)^T`, and `P_t = eta_t P_{t-1} - theta_t grad`, `M_t = (1 - alpha_t) M_{t-1} + P_t`
(equations 8 to 14), read as `M_t^T q_t`. Gradients are taken at every token, not at the start of a
chunk as the paper's code may, so that this is one affine recurrence of [M; P] and exact under every
split. alpha, theta and eta are numbers per head and token.

With a `window` it is the paper's MAG (section 4.2): beside the memory, softmax attention to the
window and to `persistent` learned keys and values, the answer of the one gating that of the other.
The paper feeds persistent tokens to the memory as well; here they are seen by attention alone.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from longctx_kernels.delta_attention import delta_attention, delta_attention_reference
from longctx_kernels.softmax_attention import softmax_attention_after, softmax_attention_reference
from torch import Tensor, nn

from longctx.errors import InputError
from longctx.mixers.base import Backend, HeadsConfig, Mixer, Place, RMSNorm, split_heads
from longctx.mixers.parts import GatedNorm, ShortConvolution, log_sigmoid, rotate, unit
from longctx.sequence.expected import (
    Expected,
    Gate,
    Share,
    Sizes,
    combined,
    delta_traffic,
    softmax_traffic,
)
from longctx.sequence.local import LocalView
from longctx.sequence.sharded import Transports
from longctx.sequence.view import Persistent, SequenceView, one_row


@dataclass(frozen=True)
class TitansConfig(HeadsConfig, kind="titans"):
    """A linear memory with momentum, by itself or gated by attention to a window."""

    convolution: int = 4
    """Taps of the short convolution of the memory's queries, keys and values; 0 has none."""
    window: int = 0
    """Keys that attention beside the memory sees, its own included; 0 has no attention."""
    persistent: int = 0
    """Learned keys and values that every query of the window sees."""
    rope_base: float = 10000.0
    """Base of the rotary frequencies of attention."""

    def build(self, place: Place) -> "Titans":
        return Titans(self, place)

    def on(self, backend: Backend) -> "TitansConfig":
        # No kernels but ours know momentum, and these are in PyTorch.
        return super().on("auto" if backend in ("triton", "fla") else backend)

    def verbs(self) -> frozenset[str]:
        return frozenset({"prefix", "halo"} if self.convolution or self.window else {"prefix"})

    def check_length(self, seq_len: int, where: str) -> None:
        self.check_window(self.window, seq_len, where)

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        if self.backend in ("triton", "fla"):
            raise InputError(
                f"{where}.backend = {self.backend!r}: a memory with momentum has no such kernels; "
                "choose auto or torch"
            )
        if self.convolution not in (0, *range(2, 9)):
            raise InputError(f"{where}.convolution = {self.convolution}: must be 0 or 2..8 taps")
        for name in ("window", "persistent"):
            if getattr(self, name) < 0:
                raise InputError(f"{where}.{name} = {getattr(self, name)}: must not be negative")
        if self.persistent and not self.window:
            raise InputError(
                f"{where}.persistent = {self.persistent}: needs attention to see them; set window"
            )
        if self.rope_base <= 0:
            raise InputError(f"{where}.rope_base = {self.rope_base}: must be positive")

    def refusal(self, transports: Transports) -> str:
        if transports.prefix == "ulysses" or self.window:
            return super().refusal(transports)
        return ""


class TitansParts(NamedTuple):
    """Scaled unit queries, unit keys and values of the memory, its step size and log gates, what
    attention sees, and the raw output gate where there is no attention."""

    q_BTHK: Tensor
    k_BTHK: Tensor
    v_BTHK: Tensor
    step_BTH: Tensor
    log_keep_BTH: Tensor
    log_momentum_BTH: Tensor
    seen: tuple[Tensor, Tensor, Tensor] | None
    gate_BTHK: Tensor | None


class Window(nn.Module):
    """Queries, keys and values of attention to a window, and its persistent keys."""

    def __init__(self, config: TitansConfig, width: int, key_dim: int):
        super().__init__()
        self.config, H = config, config.num_heads
        self.query = nn.Linear(width, H * key_dim, bias=False)
        self.key = nn.Linear(width, H * key_dim, bias=False)
        self.value = nn.Linear(width, H * key_dim, bias=False)
        self.query_norm, self.key_norm = RMSNorm(key_dim), RMSNorm(key_dim)
        self.norm = GatedNorm(key_dim, "sigmoid")
        if config.persistent:
            self.persistent_key = nn.Parameter(torch.zeros(config.persistent, H, key_dim))
            self.persistent_value = nn.Parameter(torch.zeros(config.persistent, H, key_dim))

    def forward(self, x_BTD: Tensor, view: SequenceView) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v with positions."""
        H, base = self.config.num_heads, self.config.rope_base
        v_BTHK = split_heads(self.value(x_BTD), H)
        q_BTHK = self.query_norm(split_heads(self.query(x_BTD), H))
        k_BTHK = self.key_norm(split_heads(self.key(x_BTD), H))
        q, k = (rotate(x, view.positions_BT, base).type_as(v_BTHK) for x in (q_BTHK, k_BTHK))
        return q, k, v_BTHK

    @property
    def persistent(self) -> Persistent | None:
        """Keys and values that every query sees."""
        if not self.config.persistent:
            return None
        return Persistent(self.persistent_key, self.persistent_value)


class Titans(Mixer):
    """See the module's docstring."""

    def __init__(self, config: TitansConfig, place: Place):
        super().__init__()
        self.config, self.num_heads = config, config.num_heads
        width, H, K = place.width, config.num_heads, config.size_of_head(place.width)
        self.key_dim = K
        self.query = nn.Linear(width, H * K, bias=False)
        self.key = nn.Linear(width, H * K, bias=False)
        self.value = nn.Linear(width, H * K, bias=False)
        self.gates = nn.Linear(width, 3 * H, bias=False)
        self.keep_bias = nn.Parameter(torch.full((H,), 4.0))  # forgets 2 % a token at first
        self.convolve = (
            ShortConvolution(3 * H * K, config.convolution) if config.convolution else None
        )
        self.norm = GatedNorm(K)
        self.attention = Window(config, width, K) if config.window else None
        self.gate = None if config.window else nn.Linear(width, H * K, bias=False)
        self.project_out = nn.Linear(H * K, width, bias=False)

    def stretches(self) -> dict[str, tuple[int, ...]]:
        channels = self.num_heads * self.key_dim
        return {"gates.weight": 3 * (self.num_heads,), "convolve.weight": 3 * (channels,)}

    def project(self, x_BTD: Tensor, view: SequenceView) -> TitansParts:
        H, K = self.num_heads, self.key_dim
        mixed = torch.cat((self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)), -1)
        if self.convolve is None:
            mixed = F.silu(mixed)
        else:
            mixed = self.convolve(mixed, view, self.config.computes_with)
        q, k, v = (split_heads(x, H) for x in mixed.chunk(3, -1))
        gates = self.gates(x_BTD)
        step, keep, momentum = gates.to(torch.promote_types(gates.dtype, torch.float32)).chunk(
            3, -1
        )
        return TitansParts(
            unit(q) * K**-0.5,
            unit(k),
            v,
            step.sigmoid(),
            log_sigmoid(keep + self.keep_bias),
            log_sigmoid(momentum),
            None if self.attention is None else self.attention(x_BTD, view),
            None if self.gate is None else split_heads(self.gate(x_BTD), H),
        )

    def core(self, projected: TitansParts, view: SequenceView) -> Tensor:
        gates = projected.log_keep_BTH, projected.log_momentum_BTH
        backend = self.config.computes_with
        y_BTHK = view.delta_attention(projected[:4], *gates, backend)
        if self.attention is None:
            return y_BTHK
        seen, persistent = projected.seen, self.attention.persistent
        assert seen is not None
        near = view.softmax_attention(*seen, self.config.window, backend, persistent)
        return torch.cat((y_BTHK, near), -1)

    def core_reference(self, projected: TitansParts, view: LocalView) -> Tensor:
        q, k, v, step, keep, momentum = (one_row(x) for x in projected[:6])
        y, _ = delta_attention_reference(
            q, k, v, step, g=keep, momentum=momentum, scale=1.0, cu_seqlens=view.cu_seqlens
        )
        y_BTHK = y.view_as(projected.v_BTHK)
        if self.attention is None:
            return y_BTHK
        assert projected.seen is not None
        q, k, v = (x.flatten(0, 1) for x in projected.seen)
        if self.attention.persistent is not None:
            k, v = self.attention.persistent.before(k, v)
        near = softmax_attention_reference(
            q[None],
            k[None],
            v[None],
            self.config.window,
            cu_seqlens=view.cu_seqlens,
            persistent=self.config.persistent,
        )
        return torch.cat((y_BTHK, near.view_as(y_BTHK)), -1)

    def advance(
        self, projected: TitansParts, memory: tuple[Tensor | None, tuple[Tensor, ...]] | None
    ) -> tuple[Tensor, tuple[Tensor | None, tuple[Tensor, ...]]]:
        state, before = memory or (None, ())
        q, k, v, step, keep, momentum = projected[:6]
        y_BTHK, state = delta_attention(
            q,
            k,
            v,
            step,
            g=keep,
            momentum=momentum,
            scale=1.0,
            initial_state=state,
            output_final_state=True,
        )
        if self.attention is None:
            return y_BTHK, (state, ())
        assert projected.seen is not None
        q, *keys = projected.seen
        k, v = (torch.cat((a, b), 1) for a, b in zip(before or [x[:, :0] for x in keys], keys))
        kept = tuple(x[:, max(0, x.shape[1] - self.config.window + 1) :] for x in (k, v))
        if self.attention.persistent is not None:
            shown = (x.to(k.dtype).expand(len(k), *x.shape) for x in self.attention.persistent)
            k, v = (torch.cat((a, b), 1) for a, b in zip(shown, (k, v)))
        window, scale = self.config.window, self.key_dim**-0.5
        near = softmax_attention_after(q, k, v, window, scale, self.config.persistent)
        return torch.cat((y_BTHK, near), -1), (state, kept)

    def read(self, y_BTHV: Tensor, projected: TitansParts) -> Tensor:
        backend = self.config.computes_with
        if self.attention is None:
            return self.norm(y_BTHV, projected.gate_BTHK, backend)
        memory, near = y_BTHV.split(self.key_dim, -1)
        return self.attention.norm(near, self.norm(memory, None, backend), backend)

    def output(self, y_BTHV: Tensor) -> Tensor:
        return self.project_out(y_BTHV.flatten(2))

    def core_flops(self, contexts_M: Tensor) -> int:
        H, K = self.num_heads, self.key_dim
        flops = 6 * H * K * K * contexts_M.numel()
        if self.attention is None:
            return flops
        seen_M = contexts_M.clamp(max=self.config.window) + self.config.persistent
        return flops + 4 * H * K * int(seen_M.sum())

    def expected_traffic(self, share: Share) -> Expected:
        sizes = Sizes(self.num_heads, self.num_heads, self.key_dim, self.key_dim)
        gates = Gate(3, share.widths.state)
        parts = [delta_traffic(share, sizes, gates, 2 * self.key_dim)]
        if self.convolve is not None:
            parts.append(self.convolve.expected_traffic(share))
        if self.attention is not None:
            parts.append(softmax_traffic(share, sizes, self.config.window))
        return combined(parts)
