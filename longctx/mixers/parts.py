"""Parts that several mixers are made of."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from longctx_kernels.decay_attention import by_kind, decay_attention, decay_attention_reference
from longctx_kernels.norm_gate import norm_gate
from longctx_kernels.short_convolution import short_convolution
from torch import Tensor, nn

from longctx.mixers.base import Mixer, RMSNorm, StateConfig
from longctx.sequence.expected import Expected, Gate, Share, Sizes, decay_traffic, halo_traffic
from longctx.sequence.local import LocalView
from longctx.sequence.view import SequenceView, one_row


class ShortConvolution(nn.Module):
    """A causal filter of `width` taps for each channel, then SiLU; it ends where documents do.

    Tokens left of a cut come as a halo.
    """

    def __init__(self, channels: int, width: int = 4, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)

    def initial(self, name: str, generator: torch.Generator) -> Tensor | None:
        """Weights uniform within 1 / sqrt(width)."""
        if name != "weight":
            return None
        chance = torch.rand(self.weight.shape, generator=generator)
        return (2 * chance - 1) * self.weight.shape[1] ** -0.5

    def forward(self, x_BTC: Tensor, view: SequenceView, backend: str = "auto") -> Tensor:
        """Filtered `x`."""
        left = self.weight.shape[1] - 1
        parts, start = [], 0
        for wide in view.halo(x_BTC, left):
            stop = start + wide.shape[1] - left
            part = short_convolution(
                wide[:, left:],
                self.weight,
                self.bias,
                before_BWC=wide[:, :left],
                age_BT=view.positions_BT[:, start:stop],
                activation="silu",
                backend="torch" if backend == "fla" else backend,
            )
            parts.append(part)
            start = stop
        return torch.cat(parts, 1)

    def expected_traffic(self, share: Share) -> Expected:
        """What one rank exchanges for it."""
        channels, width = self.weight.shape
        return halo_traffic(share, width - 1, channels)


class GatedNorm(RMSNorm):
    """RMSNorm of each head's output, times an activation of a gate, if there is one."""

    def __init__(
        self, size: int, activation: Literal["silu", "sigmoid"] = "silu", eps: float = 1e-6
    ):
        super().__init__(size, eps)
        self.activation = activation

    def forward(
        self, y_BTHV: Tensor, gate_BTHV: Tensor | None = None, backend: str = "auto"
    ) -> Tensor:
        """Normalised and gated `y`."""
        if self.mean_over_parts is not None:
            assert gate_BTHV is None, "what is normalised over all heads has no gate"
            return super().forward(y_BTHV)
        return norm_gate(
            y_BTHV,
            gate_BTHV,
            self.weight,
            eps=self.eps,
            activation="none" if gate_BTHV is None else self.activation,
            backend="torch" if backend == "fla" else backend,
        )


class SelectiveDecay(nn.Module):
    """The log decay `-exp(log_rate) softplus(x + bias)`, a rate for each head.

    It starts as published: rates uniform in `rates`, steps log-uniform in 0.001..0.1.
    """

    def __init__(self, num_heads: int, channels: int = 1, rates: tuple[float, float] = (0.01, 16)):
        super().__init__()
        self.log_rate = nn.Parameter(torch.zeros(num_heads))
        self.bias = nn.Parameter(torch.zeros(num_heads * channels))
        self.rates = rates

    def initial(self, name: str, generator: torch.Generator) -> Tensor:
        """First values of either parameter."""
        shape = self.log_rate.shape if name == "log_rate" else self.bias.shape
        chance = torch.rand(shape, generator=generator)
        if name == "log_rate":
            low, high = self.rates
            return (low + (high - low) * chance).log()
        step = (math.log(1e-3) + math.log(100) * chance).exp()
        return step + (-torch.expm1(-step)).log()  # softplus gives back the step

    def forward(self, x_BTM: Tensor) -> Tensor:
        """`[B, T, H]`, or `[B, T, H, K]` if there are channels, in at least fp32."""
        step_BTM = self.steps(x_BTM)
        rate_H = self.log_rate.to(step_BTM.dtype).exp()
        if self.bias.numel() == rate_H.numel():
            return -rate_H * step_BTM
        return -rate_H[:, None] * step_BTM.unflatten(-1, (rate_H.numel(), -1))

    def steps(self, x_BTM: Tensor) -> Tensor:
        """`softplus(x + bias)` alone, in at least fp32."""
        wide = torch.promote_types(x_BTM.dtype, torch.float32)
        return F.softplus(x_BTM.to(wide) + self.bias.to(wide))

    def bounded(self, x_BTM: Tensor, lowest: float) -> Tensor:
        """`lowest * sigmoid(exp(log_rate) (x + bias))` instead: never below `lowest`."""
        wide = torch.promote_types(x_BTM.dtype, torch.float32)
        shifted = (x_BTM.to(wide) + self.bias.to(wide)).unflatten(-1, (self.log_rate.numel(), -1))
        return lowest * (self.log_rate.to(wide).exp()[:, None] * shifted).sigmoid()


class LowRank(nn.Module):
    """A linear map through few dimensions."""

    def __init__(self, width: int, rank: int, out: int, bias: bool = False):
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, out, bias=bias)
        if bias:
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Each token on its own."""
        return self.up(self.down(x))


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`x` scaled to length 1, as delta rules need their keys."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def log_sigmoid(x: Tensor) -> Tensor:
    """In at least fp32, as log decays are."""
    return F.logsigmoid(x.to(torch.promote_types(x.dtype, torch.float32)))


class TokenShift(nn.Module):
    """Each channel's mean of a token and the one before it, which a document's first token lacks.

    `x_t + mix (x_{t-1} - x_t)` as in RWKV; the token left of a cut comes as a halo.
    """

    def __init__(self, width: int):
        super().__init__()
        self.mix = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x_BTD: Tensor, view: SequenceView) -> Tensor:
        """Mixed `x`."""
        device = x_BTD.device.type
        if torch.is_autocast_enabled(device):
            # As projections would do with it: what travels is as narrow as other activations.
            x_BTD = x_BTD.to(torch.get_autocast_dtype(device))
        before_BTD = torch.cat([wide[:, :-1] for wide in view.halo(x_BTD, 1)], 1)
        before_BTD = before_BTD.where(view.positions_BT[..., None] > 0, 0)
        return (x_BTD + self.mix * (before_BTD - x_BTD)).to(x_BTD.dtype)

    def expected_traffic(self, share: Share) -> Expected:
        """What one rank exchanges for it."""
        return halo_traffic(share, 1, len(self.mix))


class DecayMixer(Mixer):
    """Its core; `project` gives tensors that begin with q, k, v and the log decay.

    q holds the scale; the log decay is `[B, T, H]` or `[B, T, H, K]`, at least fp32, at most 0.
    """

    def __init__(self, config: StateConfig, key_dim: int, value_dim: int, gate_size: int):
        super().__init__()
        self.computes_with, self.num_heads = config.computes_with, config.num_heads
        self.key_dim, self.value_dim, self.gate_size = key_dim, value_dim, gate_size

    def core(self, projected: Any, view: SequenceView) -> Tensor:
        q_BTHK, k_BTHK, v_BTHV, log_decay = projected[:4]
        return view.decay_attention(q_BTHK, k_BTHK, v_BTHV, log_decay, self.computes_with)

    def core_reference(self, projected: Any, view: LocalView) -> Tensor:
        q, k, v, log_decay = (one_row(x) for x in projected[:4])
        g, _, gk = by_kind(log_decay)
        y, _ = decay_attention_reference(q, k, v, g=g, gk=gk, scale=1.0, cu_seqlens=view.cu_seqlens)
        return y.view_as(projected[2])

    def advance(self, projected: Any, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        q_BTHK, k_BTHK, v_BTHV, log_decay = projected[:4]
        g, _, gk = by_kind(log_decay)
        return decay_attention(
            q_BTHK,
            k_BTHK,
            v_BTHV,
            g=g,
            gk=gk,
            scale=1.0,
            initial_state=memory,
            output_final_state=True,
        )

    def core_flops(self, contexts_M: Tensor) -> int:
        return 4 * self.num_heads * self.key_dim * self.value_dim * contexts_M.numel()

    def expected_traffic(self, share: Share) -> Expected:
        sizes = Sizes(self.num_heads, self.num_heads, self.key_dim, self.value_dim)
        return decay_traffic(share, sizes, Gate(self.gate_size, share.widths.state))


def rotate(x_BTHK: Tensor, positions_BT: Tensor, base: float, fraction: float = 1.0) -> Tensor:
    """Rotary position embedding of the first `fraction` of each head, in at least fp32."""
    half = int(x_BTHK.shape[-1] * fraction) // 2
    if half == 0:
        return x_BTHK
    dtype = torch.promote_types(x_BTHK.dtype, torch.float32)
    exponent = torch.arange(half, device=x_BTHK.device, dtype=torch.float64) / half
    angle = positions_BT[..., None].to(torch.float64) * base**-exponent
    cos, sin = angle.cos().to(dtype)[:, :, None], angle.sin().to(dtype)[:, :, None]
    left, right, rest = x_BTHK.to(dtype).split((half, half, x_BTHK.shape[-1] - 2 * half), -1)
    turned = (left * cos - right * sin, left * sin + right * cos, rest)
    return torch.cat(turned, -1).to(x_BTHK.dtype)
