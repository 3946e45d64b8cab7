"""A contiguous block of a tensor that may be spread over processes."""

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Box:
    """Where a block lies in the whole tensor `name`, and the block itself."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    tensor: Tensor


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers under the first of their names."""
    tensors: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensors.setdefault(id(tensor), (name, tensor))
    return {name: tensor.detach() for name, tensor in tensors.values()}
