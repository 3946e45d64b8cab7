"""What an item of the GPU bench is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from gpu_checks import DTYPES
from gpu_problems import Tensors
from longctx_kernels.launch import is_interpreted
from torch import Tensor

OURS = "longctx"
# Triton's interpreter computes bf16 wrongly.
PRECISION = "fp16" if is_interpreted() else "bf16"


@dataclass(frozen=True)
class Item:
    """Inputs, and functions of them that compute the same, by who computes."""

    op: str
    name: str
    inputs: Tensors
    runs: Mapping[str, Callable[[Tensors], Tensor]]
    reference: Callable[[Tensors, list[int]], Tensor]
    """The fp64 output of some heads of the first row, given only their inputs."""
    is_by_head: bool = True
    """Whether heads and rows can be taken apart; if not, all of them are compared."""

    def part(self, x: Tensor, heads: list[int]) -> Tensor:
        """What is compared."""
        return x[:1, :, heads] if self.is_by_head else x


@dataclass(frozen=True)
class Items:
    """Makers of items, so that only one item's inputs are in memory."""

    title: str
    op: str
    makers: tuple[tuple[str, Callable[[], Item]], ...]


def random_values(*shape: int, device: torch.device) -> Tensor:
    """Normal values in the dtype that is timed."""
    return torch.randn(shape, device=device).to(DTYPES[PRECISION])
