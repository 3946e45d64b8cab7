"""Figures of what a study cost: time over length and over processes, and memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from longctx.report.charts import Chart, Curve
from longctx.report.curves import Series
from longctx.report.scales import Unit
from longctx.study.cards import Plot, Table, by_reason
from longctx.study.laws import Refusal
from longctx.study.points import Point, Points, known
from longctx.study.times import BY_LENGTH, BY_PROCESSES, fit_time, shares

ALONG = 60
LEAST_R2 = 0.5
"""Of fits that say something."""
Figure = Callable[[Point], float | None]


@dataclass(frozen=True)
class Kind:
    """A figure over another, with what is fitted to it."""

    title: str
    note: str
    x: Figure
    y: Figure
    x_name: str
    y_name: str
    unit: Unit
    apart: tuple[str, ...]
    """Kinds of axes whose values share a line."""
    terms: tuple[str, ...] = ()


LENGTH = Kind(
    "Time of a token over length",
    "median over steps; line: a + b n + c n^2",
    lambda p: p.length,
    lambda p: p.token_seconds,
    "tokens of a sequence",
    "seconds a token",
    "seconds",
    ("length", "seed", "rate", "tokens", "batch"),
    BY_LENGTH,
)
PROCESSES = Kind(
    "Time of a step over processes",
    "median over steps; line: fixed + work / P + exchange (P - 1)",
    lambda p: float(p.row.processes),
    lambda p: p.step_seconds,
    "processes",
    "seconds a step",
    "seconds",
    ("processes", "seed", "rate", "tokens"),
    BY_PROCESSES,
)
MEMORY_BY_LENGTH = Kind(
    "Peak memory over length",
    "of the first process",
    lambda p: p.length,
    lambda p: p.peak_memory,
    "tokens of a sequence",
    "bytes",
    "bytes",
    ("length", "seed", "rate", "tokens", "batch"),
)
MEMORY_BY_SIZE = Kind(
    "Peak memory over size",
    "of the first process",
    lambda p: p.figure("parameters"),
    lambda p: p.peak_memory,
    "parameters",
    "bytes",
    "bytes",
    ("size", "seed", "rate", "tokens"),
)
KINDS = (LENGTH, PROCESSES, MEMORY_BY_LENGTH, MEMORY_BY_SIZE)


def cost_plots(points: Points) -> list[Plot]:
    """A figure for each of KINDS whose x differs between points of a line."""
    return [plot for kind in KINDS if (plot := _plot(points, kind))]


def _plot(points: Points, kind: Kind) -> Plot | None:
    curves, rows, fits, notes, names = [], [], [], [], []
    differs = False
    for name, line in points.lines(points.all, *kind.apart).items():
        found = known(line, kind.x, kind.y)
        if not found:
            continue
        x, y = (np.array([each[k] for each in found]) for k in range(2))
        differs |= len(np.unique(x)) > 1
        number, labels = len(names), [p.row.name for *_, p in found]
        names.append(name)
        fit = fit_time(x, y, kind.terms) if kind.terms else None
        style = "dots" if fit and not isinstance(fit, Refusal) else "points"
        curves.append(Curve(number, name, Series(x, y), style, labels))
        rows += [[name, p.row.name, a, b] for a, b, p in found]
        if isinstance(fit, Refusal):
            notes.append((name, f"no fit: {fit.reason}"))
        elif fit:
            along = np.geomspace(x[0], x[-1], ALONG)
            curves.append(Curve(number, f"{name}, fit", Series(along, fit.at(along))))
            parts = [fit.terms.get(term) for term in kind.terms]
            share = _told(shares(fit, float(x[-1])))
            fits.append([name, *parts, share, fit.points, fit.r2, f"{100 * fit.largest:.2g} %"])
            if fit.r2 < LEAST_R2:
                notes.append((name, "the fit says little: R2 is below a half"))
            if fit.left_out:
                notes.append((name, f"too few values for {' and '.join(fit.left_out)}"))
    if not differs:
        return None
    chart = Chart(kind.title, curves, kind.unit, kind.x_name, log_x=True, log_y=_is_wide(curves))
    heading = ["line", *kind.terms, "shares at the largest", "points", "R2", "largest residual"]
    numbers = Table(["line", "cell", kind.x_name, kind.y_name], rows)
    table = Table(heading, fits) if fits else None
    return Plot(kind.title, kind.note, chart, names, numbers, table, by_reason(notes))


def _is_wide(curves: Sequence[Curve]) -> bool:
    values = np.concatenate([curve.series.y for curve in curves])
    return bool(values.max() > 10 * values.min())


def _told(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in parts.items())
