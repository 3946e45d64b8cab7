"""The norm of an update, from a sample: for Adam it rises some steps before the loss does."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SAMPLES = 4096
"""Elements looked at in a parameter, or up to twice as many."""


class UpdateNorm:
    """Estimates the norm of an update from the same few elements of each parameter.

    This process counts a share of each parameter's squares.
    """

    def __init__(self, parameters: Sequence[Tensor], shares: Sequence[float]) -> None:
        own = [(p.detach(), share) for p, share in zip(parameters, shares) if p.numel()]
        self._picks = [_pick(parameter) for parameter, _ in own]
        self._weights = torch.cat(
            [
                x.new_full((len(x),), share * numel / len(x))
                for (x, numel), (_, share) in zip(self._picks, own)
            ]
        )
        self._before = self._sample()

    def before(self) -> None:
        """Remembers what the update will change."""
        self._before = self._sample()

    def squared(self) -> Tensor:
        """Square of the norm of what changed since; parts of a parameter add up."""
        change = self._sample() - self._before
        return (change * change * self._weights).sum()

    def _sample(self) -> Tensor:
        return torch.cat([x for x, _ in self._picks])


def _pick(parameter: Tensor) -> tuple[Tensor, int]:
    """A view of evenly spaced elements that visits all columns, and how many there are."""
    flat = parameter.view(-1)
    stride, columns = max(1, flat.numel() // SAMPLES), parameter.shape[-1] if parameter.dim() else 1
    while math.gcd(stride, columns) > 1:
        stride += 1
    return flat[::stride], flat.numel()
