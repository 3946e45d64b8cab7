"""What a step of training adds up over its micro-batches and, in one message, over processes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from longctx.parallel import Mesh


class Sums:
    """Tensors of any shape by name."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Adds to each name."""
        for name, term in terms.items():
            self._sums[name] = self._sums.get(name, 0) + term.detach()

    def over_processes(self, mesh: Mesh) -> dict[str, Tensor]:
        """Sums over all processes, in fp64 and equal on each of them."""
        flat = torch.cat([x.to(mesh.device, torch.float64).flatten() for x in self._values()])
        return dict(zip(self._sums, shaped(mesh.sum(flat, "metrics"), self._values())))

    def _values(self) -> list[Tensor]:
        return list(self._sums.values())


def on_host(figures: Mapping[str, Tensor]) -> dict[str, Any]:
    """Numbers and lists of numbers, brought over in one copy."""
    if not figures:
        return {}
    values = list(figures.values())
    flat = torch.cat([x.to(torch.float64).flatten() for x in values]).cpu()
    return {name: x.tolist() for name, x in zip(figures, shaped(flat, values))}


def shaped(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Parts of `flat` in the shapes of these."""
    return [x.view(y.shape) for x, y in zip(flat.split([y.numel() for y in like]), like)]
