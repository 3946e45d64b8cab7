"""The best size for an amount of compute: minima of loss over size at equal FLOPs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longctx.report.curves import Series
from longctx.study.laws import COVERED, NORMAL, Refusal, resampled, student

FEWEST_SIZES = 3
BUDGETS = 5
FEWEST_TO_GROW = 3
"""Minima that the growth of the best size is fitted through."""


@dataclass(frozen=True)
class Minimum:
    """The best size for a budget of FLOPs, from a parabola over the logarithm of size."""

    budget: float
    sizes: np.ndarray
    losses: np.ndarray
    parabola: np.ndarray
    """Of the loss over log size, the highest power first."""
    best: float | None
    """None if it lies beyond the sizes."""
    bottoms_B: np.ndarray
    """Logarithms of the best sizes of resamples, NaN where one has none; empty without spare
    sizes."""
    note: str = ""

    @property
    def range(self) -> tuple[float, float] | None:
        """Where COVERED of resamples have it."""
        ends = _ends(self.bottoms_B)
        if ends is None or self.best is None:
            return None
        middle, wide = np.log(self.best), student(len(self.sizes) - 3) / NORMAL
        low, high = np.exp(middle + wide * (ends - middle))
        return float(min(low, self.best)), float(max(high, self.best))

    def at(self, sizes: np.ndarray) -> np.ndarray:
        """Losses of the parabola."""
        return np.polyval(self.parabola, np.log(sizes))


@dataclass(frozen=True)
class Minima:
    """Minima of several budgets, and how the best size grows: size ~ compute ** exponent."""

    minima: tuple[Minimum, ...]
    exponent: float | None
    range: tuple[float, float] | None = None
    """Of the exponent, in COVERED of resamples."""
    note: str = ""


def fit_minima(curves: Sequence[tuple[float, Series]]) -> Minima | Refusal:
    """From sizes and their losses over FLOPs; the lower of several curves of a size counts."""
    sizes = sorted({size for size, _ in curves})
    if len(sizes) < FEWEST_SIZES:
        return Refusal(f"needs {FEWEST_SIZES} sizes, has {len(sizes)}")
    spans = [(series.x[0], series.x[-1]) for _, series in curves if len(series.x) > 1]
    budgets = _budgets(spans)
    found = [point for budget in budgets if (point := _minimum(budget, sizes, curves))]
    if not found:
        return Refusal(f"no amount of compute was reached by {FEWEST_SIZES} sizes")
    known = [m for m in found if m.best]
    if len(known) < FEWEST_TO_GROW:
        note = f"no growth: {len(known)} of {len(found)} budgets have their minimum between sizes"
        return Minima(tuple(found), None, note=note)
    compute, best = (np.log([getattr(m, name) for m in known]) for name in ("budget", "best"))
    ends = None
    if all(len(m.bottoms_B) for m in known):
        ends = _ends(np.polyfit(compute, np.stack([m.bottoms_B for m in known]), 1)[0])
    exponent = float(np.polyfit(compute, best, 1)[0])
    return Minima(
        tuple(found), exponent, None if ends is None else (float(ends[0]), float(ends[1]))
    )


def _budgets(spans: Sequence[tuple[float, float]]) -> np.ndarray:
    """Evenly spread over what most curves share, in logarithms."""
    if not spans:
        return np.zeros(0)
    low = sorted(start for start, _ in spans)[min(FEWEST_SIZES, len(spans)) - 1]
    high = sorted(stop for _, stop in spans)[-min(FEWEST_SIZES, len(spans))]
    return np.geomspace(low, high, BUDGETS + 1)[1:] if 0 < low < high else np.zeros(0)


def _minimum(
    budget: float, sizes: Sequence[float], curves: Sequence[tuple[float, Series]]
) -> Minimum | None:
    reached = {}
    for size in sizes:
        losses = [
            float(np.interp(np.log(budget), np.log(series.x), series.y))
            for own, series in curves
            if own == size and len(series.x) > 1 and series.x[0] <= budget <= series.x[-1] * 1.001
        ]
        if losses:
            reached[size] = min(losses)
    if len(reached) < FEWEST_SIZES:
        return None
    x, y = np.array(list(reached)), np.array(list(reached.values()))
    parabola = np.polyfit(np.log(x), y, 2)
    best, note = _bottom(parabola, x)
    bottoms_B = np.zeros(0)
    if best and len(x) > FEWEST_SIZES:
        bottoms_B = _bottoms(np.log(x), y, parabola)
        if _ends(bottoms_B) is None:
            note = "no range: too many resamples have no minimum"
    elif best:
        note = "no range: three sizes leave nothing to spare"
    return Minimum(budget, x, y, parabola, best, bottoms_B, note)


def _bottom(parabola: np.ndarray, sizes: np.ndarray) -> tuple[float | None, str]:
    curvature, slope, _ = parabola
    if curvature > 0 and sizes[0] <= np.exp(-slope / (2 * curvature)) <= sizes[-1]:
        return float(np.exp(-slope / (2 * curvature))), ""
    middle = 0.5 * (np.log(sizes[0]) + np.log(sizes[-1]))
    way = "larger" if 2 * curvature * middle + slope < 0 else "smaller"
    return None, f"no minimum between these sizes: {way} ones would be better"


def _bottoms(x: np.ndarray, y: np.ndarray, parabola: np.ndarray) -> np.ndarray:
    """Best sizes of resamples, but none that is far beyond the sizes."""
    values_BN = resampled(np.polyval(parabola, x), y, len(parabola))
    curvature_B, slope_B, _ = np.polyfit(x, values_BN.T, 2)
    bottoms_B = -slope_B / np.where(curvature_B > 0, 2 * curvature_B, np.nan)
    return np.clip(bottoms_B, 2 * x[0] - x[-1], 2 * x[-1] - x[0])


def _ends(values_B: np.ndarray) -> np.ndarray | None:
    """The ends of the middle COVERED of values, if at least so many are known."""
    known_B = values_B[np.isfinite(values_B)]
    if not len(values_B) or len(known_B) < COVERED * len(values_B):
        return None
    return np.quantile(known_B, ((1 - COVERED) / 2, (1 + COVERED) / 2))
