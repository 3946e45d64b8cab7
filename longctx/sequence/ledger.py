"""Counts what crosses between ranks: calls and bytes received, by layer, verb and direction."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from longctx.sequence.ranges import Ranges

OUTSIDE_LAYERS = -1
"""Stands for a layer in labels of what no layer asks for."""


class Label(NamedTuple):
    """Who asks for an exchange."""

    layer: int
    verb: str
    backward: bool = False

    def reversed(self) -> "Label":
        """The label of the matching exchange in the backward pass."""
        return self._replace(backward=True)

    def __str__(self) -> str:
        if self.layer == OUTSIDE_LAYERS:
            return self.verb
        direction = "backward" if self.backward else "forward"
        return f"{self.verb} of layer {self.layer} ({direction})"


class Traffic(NamedTuple):
    """Calls, and bytes that arrived from other ranks."""

    calls: int
    received: int


@dataclass
class Ledger:
    """One rank's record."""

    calls: Counter[Label] = field(default_factory=Counter)
    received: Counter[Label] = field(default_factory=Counter)
    waiting: Label | None = None
    """The exchange that this rank waits in now."""
    ranges: Ranges = field(default_factory=Ranges)
    """What this rank does, for profiles."""

    def record(self, label: Label, received: int) -> None:
        """Adds one call."""
        self.calls[label] += 1
        self.received[label] += received

    def traffic(self) -> dict[Label, Traffic]:
        """What was recorded, label by label."""
        return {label: Traffic(n, self.received[label]) for label, n in self.calls.items()}

    def total(self) -> Traffic:
        """Everything together."""
        return Traffic(self.calls.total(), self.received.total())

    def clear(self) -> None:
        """Forgets everything."""
        self.calls.clear()
        self.received.clear()
