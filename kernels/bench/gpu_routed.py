"""Routed heads in the GPU bench: queries of the heads that a token chooses, beside all of them."""

from collections.abc import Iterator
from functools import partial

import torch
from gpu_items import OURS, Item, Items, random_values
from gpu_problems import Tensors
from longctx_kernels.routed_attention import routed_attention
from torch import Tensor

SHARES = (0.25, 0.5, 0.75, 0.9)
"""Of heads that a token chooses; the item `causal T` of its length computes all of them."""


def routed_groups(shape: tuple[int, int, int], device: torch.device) -> Iterator[Items]:
    """An item of each share, at T, H, D."""
    makers = tuple(
        (routed_name(shape[0], share), partial(_item, shape, share, device)) for share in SHARES
    )
    yield Items("Routed heads", "lifetime", makers)


def routed_name(length: int, share: float) -> str:
    """Of an item, as in the report."""
    return f"routed {share:.0%} T{length}"


def _item(shape: tuple[int, int, int], share: float, device: torch.device) -> Item:
    T, H, D = shape
    inputs = {name: random_values(1, T, H, D, device=device) for name in "qkv"}
    chosen_1TH = torch.rand(1, T, H, device=device) < share
    positions_1T = torch.arange(T, device=device)[None]
    ends_1T = torch.full_like(positions_1T, T)

    def ours(x: Tensors, chosen: Tensor = chosen_1TH, backend: str = "auto") -> Tensor:
        operands = x["q"], x["k"], x["v"]
        return routed_attention(operands, chosen, positions_1T, ends_1T, backend=backend)

    def reference(x: Tensors, heads: list[int]) -> Tensor:
        return ours(x, chosen_1TH[..., heads], "torch")

    return Item("lifetime", routed_name(T, share), inputs, {OURS: ours}, reference)
