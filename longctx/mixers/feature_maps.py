"""Feature maps of linear attention: what queries and keys become before they are multiplied.

A map sees one token at a time, so every map is causal and none changes how states travel. Learned
parts are separate for queries and keys. Squares, exponentials and positions are computed in at
least fp32. `MAPS` is the table that names are looked up in.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx.mixers.parts import unit


class Heads(NamedTuple):
    """What a map is made for: heads, the size of a query or key, and options of single maps."""

    num_heads: int
    size: int
    nu: int = 3
    longest: int = 0


class FeatureMap(nn.Module, ABC):
    """Maps queries or keys `[B, T, H, K]` to `[B, T, H, size]`."""

    size: int

    @abstractmethod
    def forward(self, x_BTHK: Tensor, positions_BT: Tensor) -> Tensor:
        """Features of tokens at these positions of their documents."""


class Pointwise(FeatureMap):
    """A function without parameters that keeps the size."""

    def __init__(self, heads: Heads, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.size, self.function = heads.size, function

    def forward(self, x_BTHK: Tensor, positions_BT: Tensor) -> Tensor:
        return self.function(x_BTHK)


class PerHead(nn.Linear):
    """A square matrix for each head, the identity at first: `[B, T, H, K]` to the same."""

    def __init__(self, heads: Heads, bias: bool):
        self.num_heads = heads.num_heads
        super().__init__(heads.size, heads.num_heads * heads.size, bias=bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.copy_(self._identity())
        if self.bias is not None:
            self.bias.zero_()

    def initial(self, name: str, generator: torch.Generator) -> Tensor | None:
        """The identity; a bias stays zero."""
        return self._identity() if name == "weight" else None

    def _identity(self) -> Tensor:
        identity_KK = torch.eye(self.in_features, device=self.weight.device)
        return identity_KK.repeat(self.num_heads, 1)

    def forward(self, x_BTHK: Tensor) -> Tensor:
        """Each head by its own matrix."""
        by_head = (self.num_heads, self.in_features)
        y_BTHK = torch.einsum("bthk,hjk->bthj", x_BTHK, self.weight.view(*by_head, -1))
        return y_BTHK if self.bias is None else y_BTHK + self.bias.view(by_head)


class Hedgehog(FeatureMap):
    """`softmax([W x, -W x])`: Hedgehog, arXiv 2402.04347.

    One softmax over all 2 K features, W per head and the identity at first. LoLCATs takes two
    softmaxes of K features instead.
    """

    def __init__(self, heads: Heads):
        super().__init__()
        self.size, self.matrix = 2 * heads.size, PerHead(heads, bias=False)

    def forward(self, x_BTHK: Tensor, positions_BT: Tensor) -> Tensor:
        y_BTHK = wide(self.matrix(x_BTHK))
        return torch.cat((y_BTHK, -y_BTHK), -1).softmax(-1)


class T2R(FeatureMap):
    """`relu(W x + b)`: T2R, arXiv 2103.13076. W per head and square; plain relu at first (ours)."""

    def __init__(self, heads: Heads):
        super().__init__()
        self.size, self.matrix = heads.size, PerHead(heads, bias=True)

    def forward(self, x_BTHK: Tensor, positions_BT: Tensor) -> Tensor:
        return self.matrix(x_BTHK).relu()


class Based(FeatureMap):
    """`[1, x / d^(1/4), x_i^2 / sqrt(2 d), x_i x_j / sqrt(d)]`, i < j: Based, arXiv 2402.18668.

    The exponential's Taylor series to second order: q.k becomes `1 + s + s^2 / 2` with
    `s = q.k / sqrt(d)`.
    """

    def __init__(self, heads: Heads):
        super().__init__()
        self.size, self.scale = 1 + heads.size + pairs(heads.size), heads.size**-0.25

    def forward(self, x_BTHK: Tensor, positions_BT: Tensor) -> Tensor:
        return _taylor(wide(x_BTHK) * self.scale)


class Rebased(FeatureMap):
    """`[y_i^2 / sqrt(d), sqrt(2 / d) y_i y_j]`, i < j, of `y = LayerNorm(x)`: arXiv 2402.10644.

    q.k becomes `(q.k)^2 / d` of normalised ones. Gain and shift are shared by the heads.
    """

    def __init__(self, heads: Heads):
        super().__init__()
        self.size, self.scale = pairs(heads.size), heads.size**-0.25
        self.gain = nn.Parameter(torch.ones(heads.size))
        self.shift = nn.Parameter(torch.zeros(heads.size))

    def forward(self, x_BTHK: Tensor, positions_BT: Tensor) -> Tensor:
        x_BTHK = wide(x_BTHK)
        normed_BTHK = F.layer_norm(x_BTHK, x_BTHK.shape[-1:]) * self.gain + self.shift
        return _squares(normed_BTHK * self.scale)


class DPFP(FeatureMap):
    """`r * roll(r, n)` for n = 1 .. nu, of `r = relu([x, -x])`: DPFP, arXiv 2102.11174.

    Without the paper's division by the features' sum.
    """

    def __init__(self, heads: Heads):
        super().__init__()
        self.size, self.nu = 2 * heads.size * heads.nu, heads.nu

    def forward(self, x_BTHK: Tensor, positions_BT: Tensor) -> Tensor:
        x_BTHK = wide(x_BTHK)
        r = torch.cat((x_BTHK, -x_BTHK), -1).relu()
        return torch.cat([r * r.roll(n, -1) for n in range(1, self.nu + 1)], -1)


class Cosformer(FeatureMap):
    """`[relu(x) cos a, relu(x) sin a]`, `a = pi i / (2 M)`: cosFormer, arXiv 2202.08791.

    q.k becomes `relu(q).relu(k) cos(pi (i - j) / (2 M))`, never negative while documents are not
    longer than M. Positions count from the start of a document.
    """

    def __init__(self, heads: Heads):
        super().__init__()
        self.size, self.step = 2 * heads.size, math.pi / 2 / max(1, heads.longest)

    def forward(self, x_BTHK: Tensor, positions_BT: Tensor) -> Tensor:
        angle_BT11 = positions_BT[..., None, None].double() * self.step
        return _turned(x_BTHK.relu(), angle_BT11.cos(), angle_BT11.sin())


class Fast(FeatureMap):
    """Based's series of `c x / |x|`: q.k becomes `1 + s + s^2 / 2`, FAST, arXiv 2402.07901.

    The paper divides by the largest norm of the sequence, which the first tokens cannot know. The
    causal form is ours: each token by its own norm, with a learned scale c per head.
    """

    def __init__(self, heads: Heads):
        super().__init__()
        self.size = 1 + heads.size + pairs(heads.size)
        self.scale = nn.Parameter(torch.ones(heads.num_heads))

    def forward(self, x_BTHK: Tensor, positions_BT: Tensor) -> Tensor:
        return _taylor(unit(wide(x_BTHK)) * self.scale[:, None])


class Lrpe(nn.Module):
    """`[x cos(t theta), x sin(t theta)]` of queries and keys: LRPE-d, arXiv 2307.14995.

    Channel c of q.k is multiplied by `cos((i - j) theta_c)`. Theta is learned, per head and
    channel, and starts as in the released code: `10000^(-2 c / d)`, c counted over all d channels.
    """

    def __init__(self, num_heads: int, size: int):
        super().__init__()
        channels = num_heads * size
        self.by_head = (num_heads, size)
        self.theta = nn.Parameter(10000.0 ** (-2 * torch.arange(channels) / channels))

    def forward(
        self, q_BTHK: Tensor, k_BTHK: Tensor, positions_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both, twice as large, for tokens at these positions of their documents."""
        theta_HK = self.theta.double().view(self.by_head)
        angle_BTHK = positions_BT[..., None, None] * theta_HK
        cos, sin = angle_BTHK.cos(), angle_BTHK.sin()
        return _turned(q_BTHK, cos, sin), _turned(k_BTHK, cos, sin)


def wide(x: Tensor) -> Tensor:
    """In at least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pairs(size: int) -> int:
    """Products of two of so many features, squares among them."""
    return size * (size + 1) // 2


def _squares(x: Tensor) -> Tensor:
    """Features whose q.k is `(q.k)^2`: squares, and products of distinct ones by distance."""
    size = x.shape[-1]
    products = [x[..., :-step] * x[..., step:] for step in range(1, size)]
    return torch.cat((x.square(), 2**0.5 * torch.cat(products, -1)), -1)


def _taylor(x: Tensor) -> Tensor:
    """Features whose q.k is `1 + q.k + (q.k)^2 / 2`."""
    return torch.cat((torch.ones_like(x[..., :1]), x, _squares(x) * 0.5**0.5), -1)


def _turned(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x_BTHK = wide(x_BTHK)
    return torch.cat((x_BTHK * cos.to(x_BTHK.dtype), x_BTHK * sin.to(x_BTHK.dtype)), -1)


class Entry(NamedTuple):
    """How to make a map, and what a config must know of it."""

    make: Callable[[Heads], FeatureMap]
    is_positive: bool
    """Whether q.k is never negative, as a denominator needs it."""
    sized_by: str = "head_dim"
    """The field to change if there are too many features; `feature_dim` is then that of q and k."""
    needs_longest: bool = False
    """Whether it depends on positions, up to `longest`."""


def _same(x: Tensor) -> Tensor:
    return x


def _elu1(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def _pointwise(function: Callable[[Tensor], Tensor], is_positive: bool) -> Entry:
    return Entry(partial(Pointwise, function=function), is_positive)


MAPS: dict[str, Entry] = {
    "identity": _pointwise(_same, False),
    "silu": _pointwise(F.silu, False),
    "unit": _pointwise(partial(F.normalize, dim=-1), False),
    "relu": _pointwise(F.relu, True),
    "elu1": _pointwise(_elu1, True),
    "sigmoid": _pointwise(torch.sigmoid, True),
    "softmax": _pointwise(partial(torch.softmax, dim=-1), True),
    "hedgehog": Entry(Hedgehog, True),
    "t2r": Entry(T2R, True),
    "based": Entry(Based, True, sized_by="feature_dim"),
    "rebased": Entry(Rebased, True, sized_by="feature_dim"),
    "dpfp": Entry(DPFP, True, sized_by="nu"),
    "cosformer": Entry(Cosformer, True, needs_longest=True),
    "fast": Entry(Fast, True, sized_by="feature_dim"),
}
