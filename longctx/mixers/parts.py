"""Parts that several mixers are made of."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from longctx_kernels.norm_gate import norm_gate
from longctx_kernels.short_convolution import short_convolution
from torch import Tensor, nn

from longctx.sequence.expected import Expected, Share, halo_traffic
from longctx.sequence.view import SequenceView


class ShortConvolution(nn.Module):
    """A causal filter of `width` taps for each channel, then SiLU; it ends where documents do.

    Tokens left of a cut come as a halo.
    """

    def __init__(self, channels: int, width: int = 4, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

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


class GatedNorm(nn.Module):
    """RMSNorm of each head's output, times an activation of a gate, if there is one."""

    def __init__(
        self, size: int, activation: Literal["silu", "sigmoid"] = "silu", eps: float = 1e-6
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.activation, self.eps = activation, eps

    def forward(self, y_BTHV: Tensor, gate_BTHV: Tensor | None, backend: str = "auto") -> Tensor:
        """Normalised and gated `y`."""
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
        wide = torch.promote_types(x_BTM.dtype, torch.float32)
        step_BTM = F.softplus(x_BTM.to(wide) + self.bias.to(wide))
        rate_H = self.log_rate.to(wide).exp()
        if self.bias.numel() == rate_H.numel():
            return -rate_H * step_BTM
        return -rate_H[:, None] * step_BTM.unflatten(-1, (rate_H.numel(), -1))

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
