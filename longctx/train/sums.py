"""What a step of training adds up over its micro-batches and, in one message, over processes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from longctx.parallel import Mesh


class Sums:
    """Tensors of any shape by name, and flags, of the processes of a mesh."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._sums: dict[str, Tensor] = {}
        self._flags: list[str] = []

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Adds to each name."""
        for name, term in terms.items():
            self._sums[name] = self._sums.get(name, 0) + term.detach()

    def flag(self, name: str, raised: bool) -> None:
        """A name that is above 0 for all if any process raised it."""
        self._sums[name] = torch.tensor(float(raised))
        self._flags.append(name)

    def over_processes(self) -> dict[str, Tensor]:
        """Sums over processes with different tokens, in fp64 and equal on each of them."""
        mesh, values = self._mesh, self._values()
        flat = torch.cat([x.to(mesh.device, torch.float64).flatten() for x in values])
        totals = dict(zip(self._sums, shaped(mesh.sum(flat, "metrics"), values)))
        if mesh.split.tp > 1:
            totals |= {name: mesh.sum_over_all(totals[name], "flag") for name in self._flags}
            if "loss" in totals:  # all must judge a step by the same one, to the last bit
                totals["loss"] = mesh.sum_over_all(totals["loss"], "loss") / mesh.size
        return totals

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
