"""A feed-forward layer and its norm, some tokens at a time, in both directions."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from longctx_kernels.keeping import is_repeated
from torch import Tensor, nn
from torch.func import functional_call

from longctx.sequence.plan import Plan


class Autocast(NamedTuple):
    """What is in force where something is computed, for computing it once more elsewhere."""

    device: str
    dtype: torch.dtype
    enabled: bool
    cached: bool

    @classmethod
    def of(cls, x: Tensor) -> "Autocast":
        """What is in force now for operations on such tensors."""
        device = x.device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        return cls(device, dtype, enabled, torch.is_autocast_cache_enabled())

    def again(self) -> torch.autocast:
        """The same once more."""
        return torch.autocast(self.device, self.dtype, self.enabled, self.cached)


def tile_count(plan: Plan, most: int) -> int:
    """Tiles of at most so many tokens, as many as the rank with most tokens needs."""
    return -(-plan.rows * max(plan.placement.lengths) // most)


def by_tiles(x_BTD: Tensor, layers: tuple[nn.Module, ...], count: int) -> Tensor:
    """`layers` one after another, token by token, in `count` tiles.

    The backward pass computes each tile once more; gradients of weights are summed over tiles in at
    least fp32 and leave once, so that whoever waits for them is called once.
    """
    weights = [p for layer in layers for p in layer.parameters()]
    return _Tiled.apply(x_BTD, layers, count, *weights)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BTD: Tensor, layers: tuple[nn.Module, ...], count: int, *weights: Tensor
    ) -> Tensor:
        ctx.layers, ctx.count, ctx.autocast = layers, count, Autocast.of(x_BTD)
        ctx.save_for_backward(x_BTD, *weights)
        if is_repeated():
            return x_BTD.new_zeros(()).expand(x_BTD.shape)
        tiles = [_through(layers, weights, _some(x))[: len(x)] for x in _tiles(x_BTD, count)]
        return torch.cat(tiles).view(x_BTD.shape)

    @staticmethod
    def backward(ctx: Any, dout_BTD: Tensor) -> Any:
        x_BTD, *weights = ctx.saved_tensors
        dx_BTD = torch.empty_like(x_BTD, memory_format=torch.contiguous_format)
        asked = [w for w in weights if w.requires_grad]
        sums = [torch.zeros_like(w, dtype=_wide(w)) for w in asked]
        tiles = (_tiles(tensor, ctx.count) for tensor in (x_BTD, dout_BTD, dx_BTD))
        for x, dout, dx in zip(*tiles):
            with torch.enable_grad(), ctx.autocast.again():
                x = _some(x.detach()).requires_grad_()
                out = _through(ctx.layers, weights, x)
            found = torch.autograd.grad(out, (x, *asked), _some(dout))
            dx.copy_(found[0][: len(dx)])
            for total, dw in zip(sums, found[1:]):
                total += dw
        gradients = iter([total.to(w.dtype) for total, w in zip(sums, asked)])
        return dx_BTD, None, None, *(next(gradients) if w.requires_grad else None for w in weights)


def _tiles(x_BTD: Tensor, count: int) -> tuple[Tensor, ...]:
    """Views of tokens, rows end to end; the last may be empty."""
    return x_BTD.flatten(0, 1).tensor_split(count)


def _some(x_MD: Tensor) -> Tensor:
    """The tokens of a tile, or a zero where there is none: all ranks compute as many tiles."""
    return x_MD if len(x_MD) else x_MD.new_zeros(1, x_MD.shape[1])


def _through(layers: tuple[nn.Module, ...], weights: Any, x_MD: Tensor) -> Tensor:
    values: Iterator[Tensor] = iter(weights)
    for layer in layers:
        named = {name: next(values) for name, _ in layer.named_parameters()}
        x_MD = functional_call(layer, named, (x_MD,))
    return x_MD


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
