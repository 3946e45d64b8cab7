"""A contiguous block of a tensor that may be spread over processes."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Box:
    """Where a block lies in the whole tensor `name`, and the block itself."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    tensor: Tensor
