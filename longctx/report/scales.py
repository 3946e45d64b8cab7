"""Axes: where a number lies on them, where their ticks are, and how numbers are written."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Unit = Literal["number", "bytes", "percent", "seconds"]
SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
BINARY = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
STEPS = (1, 2, 2.5, 5, 10)
MOST_DECADES_WITH_PARTS = 2
FEWEST_DIGITS, MOST_DIGITS = 3, 10


def written(value: float, unit: Unit = "number", digits: int = FEWEST_DIGITS) -> str:
    """A number for people, with three digits or so."""
    if unit == "percent":
        return f"{100 * value:.{digits}g} %"
    if unit == "bytes":
        size, name = next((s for s in BINARY if abs(value) >= s[0]), (1, "B"))
        return f"{value / size:.{digits + 1}g} {name}"
    if unit == "seconds":
        return f"{_digits(value, digits)} s" if value < 120 else f"{value / 60:,.1f} min"
    size, name = next((s for s in SI if abs(value) >= s[0]), (1, ""))
    return f"{_digits(value / size, digits)}{name}"


def told_apart(values: Sequence[float], unit: Unit = "number") -> list[str]:
    """Numbers of an axis, with as many digits as tell them apart."""
    found: list[str] = []
    for digits in range(FEWEST_DIGITS, MOST_DIGITS):
        found = [written(value, unit, digits) for value in values]
        if len(set(found)) == len(found):
            break
    return found


def _digits(value: float, digits: int) -> str:
    is_whole = digits == FEWEST_DIGITS and 1000 <= abs(value) < 1e5
    return f"{value:.0f}" if is_whole else f"{value:.{digits}g}"


@dataclass(frozen=True)
class Scale:
    """From numbers `low` to `high` to places `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False
    unit: Unit = "number"

    def place(self, value: float) -> float:
        """Where a number lies."""
        low, high = self._mapped(self.low), self._mapped(self.high)
        share = (self._mapped(value) - low) / (high - low)
        return self.start + share * (self.stop - self.start)

    def _mapped(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.log else value

    def ticks(self, most: int) -> list[float]:
        """Round numbers on it, about `most` of them."""
        if not self.log:
            return self._even_ticks(most)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        parts = (1, 2, 5) if last - first <= MOST_DECADES_WITH_PARTS else (1,)
        every = max(1, -(-(last - first) // most))
        found = [part * 10.0**k for k in range(first, last + 1, every) for part in parts]
        inside = [tick for tick in found if self.low <= tick <= self.high]
        return inside if len(inside) > 1 else self._even_ticks(most)

    def _even_ticks(self, most: int) -> list[float]:
        rough = (self.high - self.low) / most
        if self.unit == "bytes" and rough >= 1:
            size, steps = 1 << int(math.log2(rough)), (1, 2)
        else:
            size, steps = 10.0 ** math.floor(math.log10(rough)), STEPS
        step = next(s * size for s in steps if s * size >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(n * step, 12) for n in range(first, last + 1)]


def bounds(values: Sequence[float], log: bool, to_zero: bool = False) -> tuple[float, float]:
    """Least and largest number of an axis that shows these, and 0 if wanted and near."""
    low, high = min(values), max(values)
    if log:
        low, high = (low, high) if high > low else (low / 2, high * 2)
        room = (high / low) ** 0.05
        return low / room, high * room
    if high == low:
        return (0.0, 1.2 * high) if high > 0 else (low - 1.0, high + 1.0)
    room = 0.05 * (high - low)
    return 0.0 if to_zero and 0 <= low < 0.5 * high else low - room, high + room
