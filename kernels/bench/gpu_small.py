"""The small kernels in the GPU bench: short convolution, gated norm, selected rows."""

from collections.abc import Iterator
from functools import partial

import torch
from gpu_items import OURS, Item, Items, random_values
from gpu_peers import convolution_peers, index_add, norm_peers
from gpu_problems import Tensors, some_tokens
from longctx_kernels.norm_gate import norm_gate
from longctx_kernels.selected_rows import scatter_rows
from longctx_kernels.short_convolution import short_convolution
from torch import Tensor

SHAPE, TINY_SHAPE = (2, 16384, 16, 128), (2, 48, 2, 16)
"""B, T, H, D: heads side by side are the channels."""

WIDTH, EPS = 4, 1e-6


def small_groups(device: torch.device, tiny: bool) -> Iterator[Items]:
    """An item of each op."""
    shape = TINY_SHAPE if tiny else SHAPE
    ops = ("short convolution", "norm gate", "selected rows")
    makers = (_convolution_item, _norm_item, _selection_item)
    for op, name, make in zip(ops, small_names(shape), makers):
        yield Items(op.capitalize(), op, ((name, partial(make, shape, device)),))


def small_names(shape: tuple[int, ...] = SHAPE) -> tuple[str, str, str]:
    """Of the items, as in the report."""
    return _convolution_name(shape), _norm_name(shape), _selection_name(shape)


def _convolution_name(shape: tuple[int, ...]) -> str:
    B, T, H, D = shape
    return f"convolution B{B} T{T} C{H * D} W{WIDTH}"


def _norm_name(shape: tuple[int, ...]) -> str:
    return "norm " + " ".join(f"{letter}{size}" for letter, size in zip("BTHV", shape))


def _selection_name(shape: tuple[int, ...]) -> str:
    # All heads together select as many tokens as there are.
    _, T, H, D = shape
    return f"selection T{T} H{H} E{T // H} D{H * D}"


def _convolution_item(shape: tuple[int, ...], device: torch.device) -> Item:
    (B, T, H, D), W = shape, WIDTH
    inputs = {"x": random_values(B, T, H * D, device=device)}
    inputs["weight"] = torch.randn(H * D, W, device=device)
    inputs["bias"] = torch.randn(H * D, device=device)

    def ours(x: Tensors, backend: str = "auto") -> Tensor:
        operands = x["x"], x["weight"], x["bias"]
        return short_convolution(*operands, activation="silu", backend=backend)

    runs = {OURS: ours} | convolution_peers(device)
    name = _convolution_name(shape)
    return Item("short convolution", name, inputs, runs, lambda x, _: ours(x, "torch"), False)


def _norm_item(shape: tuple[int, ...], device: torch.device) -> Item:
    inputs = {name: random_values(*shape, device=device) for name in ("x", "gate")}
    inputs["weight"] = torch.randn(shape[-1], device=device)

    def ours(x: Tensors, backend: str = "auto") -> Tensor:
        return norm_gate(x["x"], x["gate"], x["weight"], eps=EPS, backend=backend)

    runs = {OURS: ours} | norm_peers(device, EPS)
    return Item("norm gate", _norm_name(shape), inputs, runs, lambda x, _: ours(x, "torch"), False)


def _selection_item(shape: tuple[int, ...], device: torch.device) -> Item:
    _, T, H, D = shape
    inputs = {"rows": random_values(1, H, T // H, H * D, device=device)}
    inputs["weight"] = torch.rand(1, H, T // H, device=device)
    index_BHE = some_tokens(1, T, H, T // H, device)

    def ours(x: Tensors, backend: str = "auto") -> Tensor:
        return scatter_rows(x["rows"], index_BHE, T, x["weight"], backend=backend)

    runs = {OURS: ours, "torch eager": lambda x: index_add(x, index_BHE, T)}
    name = _selection_name(shape)
    return Item("selected rows", name, inputs, runs, lambda x, _: ours(x, "torch"), False)
