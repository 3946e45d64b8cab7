"""Parts that several mixers are made of."""

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
