"""Charts as inline SVG: curves of several runs over one axis."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from itertools import count
from typing import Literal

import numpy as np

from longctx.report.curves import Series, thinned
from longctx.report.scales import Scale, Unit, bounds, told_apart

MOST_DOTS = 200
COLOURS = 8
"""Runs beyond these repeat colours with broken lines."""
WIDE, NARROW = (1120, 380), (550, 260)
MOST_POINTS = (600, 1000)
"""Of a curve in a narrow and in a wide chart, which have about half as many pixels a row."""
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 10, 44
_numbers = count()


@dataclass(frozen=True)
class Curve:
    """A line, or points, of one run."""

    run: int
    name: str
    series: Series
    style: Literal["line", "faint", "points", "dashed", "dots"] = "line"
    labels: Sequence[str] = ()
    """What each of its dots is called; empty for the curve's name."""


@dataclass(frozen=True)
class Band:
    """What lies between two numbers at each x, in the colour of a run."""

    run: int
    x: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Chart:
    """Curves with a common title and axes."""

    title: str
    curves: Sequence[Curve]
    unit: Unit = "number"
    x_title: str = "step"
    log_x: bool = False
    log_y: bool = False
    wide: bool = False
    to_zero: bool = False
    """Whether the axis begins at 0 if that is near."""
    marks: Sequence[tuple[int, Series]] = field(default_factory=tuple)
    """Places of a run along the axis that something happened at."""
    bands: Sequence[Band] = ()
    """Drawn behind the curves."""
    whole_x: bool = True
    """Whether x are whole numbers, such as steps."""

    def ends_of_y(self) -> tuple[float, float]:
        """The least and the largest number of its curves, and of its bands if near: a band that
        knows nothing does not squeeze the curves."""
        low, high = self._ends([curve.series.y for curve in self.curves])
        if not self.bands:
            return low, high
        room = (high - low) or 0.1 * abs(high)
        lowest, highest = self._ends([y for band in self.bands for y in (band.low, band.high)])
        return min(low, max(lowest, low - room)), max(high, min(highest, high + room))

    @staticmethod
    def _ends(values: Sequence[np.ndarray]) -> tuple[float, float]:
        return float(min(v.min() for v in values)), float(max(v.max() for v in values))

    def positive(self) -> "Chart":
        """Without what a logarithmic axis cannot show."""
        kept = [replace(c, series=_positive(c.series, self)) for c in self.curves]
        return replace(self, curves=[curve for curve in kept if len(curve.series.x)])


def colour(run: int) -> str:
    """The class that gives a run its colour."""
    return f"run run-{run % COLOURS}" + (" again" if run >= COLOURS else "")


def draw(chart: Chart) -> str:
    """The chart as an `svg` element."""
    chart = chart.positive()
    if not chart.curves:
        return '<p class="empty">nothing to show</p>'
    width, height = WIDE if chart.wide else NARROW
    ends = [x for c in chart.curves for x in (c.series.x[0], c.series.x[-1])]
    x = Scale(*_ends_of_x(ends, chart), LEFT, width - RIGHT, chart.log_x)
    low_y, high_y = bounds(chart.ends_of_y(), chart.log_y, chart.to_zero)
    y = Scale(low_y, high_y, height - BOTTOM, TOP, chart.log_y, chart.unit)
    clip = f"clip-{next(_numbers)}"
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(chart.title)}" data-unit="{chart.unit}" '
        f'data-x-title="{escape(chart.x_title)}" data-whole="{int(chart.whole_x)}" '
        f"{_data('x', x)} {_data('y', y)}>",
        f'<clipPath id="{clip}"><rect x="{LEFT - 4}" y="{TOP - 4}" '
        f'width="{width - LEFT - RIGHT + 8}" height="{height - TOP - BOTTOM + 8}"/></clipPath>',
        *_axes(chart, x, y),
        f'<g clip-path="url(#{clip})">',
        *(_mark(run, series, x, height - BOTTOM) for run, series in chart.marks),
        *(_band(band, x, y) for band in chart.bands),
        *(_curve(curve, x, y) for curve in chart.curves),
        "</g>",
        f'<line class="cross" y1="{TOP}" y2="{height - BOTTOM}" x1="-9" x2="-9"/></svg>',
    ]
    return "".join(parts)


def framed(title: str, note: str, drawn: str, legend: str, width: str = "") -> str:
    """A box with a title, what is drawn, and what its colours mean."""
    told = f" <small>{escape(note)}</small>" if note else ""
    return (
        f'<figure class="card {width}"><figcaption><h3>{escape(title)}{told}</h3>'
        f'<div class="legend">{legend}</div></figcaption>{drawn}</figure>'
    )


def keys(names: Sequence[str]) -> str:
    """What the colours mean."""
    return "".join(
        f'<span class="key {colour(n)}">{escape(name)}</span>' for n, name in enumerate(names)
    )


def _ends_of_x(ends: Sequence[float], chart: Chart) -> tuple[float, float]:
    low, high = float(min(ends)), float(max(ends))
    if chart.whole_x:
        return low, max(high, low + 1)
    return (low, high) if high > low else (low / 2, high * 2)


def _positive(series: Series, chart: Chart) -> Series:
    kept = (series.x > 0) | (not chart.log_x)
    kept &= (series.y > 0) | (not chart.log_y)
    return Series(series.x[kept], series.y[kept])


def _data(name: str, scale: Scale) -> str:
    values = (scale.low, scale.high, scale.start, scale.stop, int(scale.log))
    return f'data-{name}="{",".join(f"{value:.12g}" for value in values)}"'


def _axes(chart: Chart, x: Scale, y: Scale) -> list[str]:
    bottom, parts = y.start, ['<g class="axes">']
    ticks = y.ticks(5)
    for tick, label in zip(ticks, told_apart(ticks, chart.unit)):
        at = f"{y.place(tick):.1f}"
        parts.append(f'<line class="grid" x1="{x.start:g}" x2="{x.stop:g}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{x.start - 8:g}" y="{at}" dy=".32em" class="y">{label}</text>')
    ticks = x.ticks(10 if chart.wide else 6)
    ticks = [tick for tick in ticks if not chart.whole_x or tick == int(tick)]
    reached = -math.inf
    if not chart.log_x and ticks and x.place(ticks[0]) - x.start > 20:
        ticks.insert(0, x.low)
    for tick, label in zip(ticks, told_apart(ticks)):
        at = x.place(tick)
        parts.append(
            f'<line class="tick" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
        )
        if at - reached < 38:
            continue
        reached = at
        parts.append(f'<text x="{at:.1f}" y="{bottom + 17:g}" class="x">{label}</text>')
    middle = (x.start + x.stop) / 2
    title = escape(chart.x_title) + (" (log)" if chart.log_x else "")
    parts.append(f'<text x="{middle:g}" y="{bottom + 36:g}" class="x title">{title}</text>')
    parts.append(
        f'<line class="base" x1="{x.start:g}" x2="{x.stop:g}" y1="{bottom}" y2="{bottom}"/>'
    )
    return [*parts, "</g>"]


def _band(band: Band, x: Scale, y: Scale) -> str:
    high, low = (np.clip(values, y.low, y.high) for values in (band.high, band.low))
    there = [(x.place(float(a)), y.place(float(b))) for a, b in zip(band.x, high)]
    back = [(x.place(float(a)), y.place(float(b))) for a, b in zip(band.x, low)]
    path = "M" + " ".join(f"{a:.1f},{b:.2f}" for a, b in [*there, *reversed(back)])
    return f'<path class="{colour(band.run)} band" d="{path}Z"/>'


def _curve(curve: Curve, x: Scale, y: Scale) -> str:
    series = thinned(curve.series, MOST_POINTS[x.stop > NARROW[0]], x.log)
    points = [(x.place(float(a)), y.place(float(b))) for a, b in zip(series.x, series.y)]
    classes = f'class="{colour(curve.run)} {curve.style}"'
    name = escape(curve.name)
    path = "M" + " ".join(f"{a:.1f},{b:.2f}" for a, b in points)
    drawn = f'<path {classes} data-name="{name}" d="{path}"><title>{name}</title></path>'
    dotted = curve.style in ("points", "dots") and len(points) <= MOST_DOTS
    if dotted or len(points) == 1:
        labels = curve.labels if len(curve.labels) == len(points) else [""] * len(points)
        dots = "".join(_dot(a, b, label) for (a, b), label in zip(points, labels))
        drawn += f'<g class="{colour(curve.run)} dots">{dots}</g>'
    return drawn


def _dot(x: float, y: float, label: str) -> str:
    told = f"><title>{escape(label)}</title></circle>" if label else "/>"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.8"{told}'


def _mark(run: int, series: Series, x: Scale, bottom: float) -> str:
    """Small lines at the bottom."""
    places = sorted({round(x.place(float(at)), 1) for at in series.x if at >= x.low})
    lines = "".join(f"M{at:g},{bottom:g}v-9" for at in places)
    return f'<path class="{colour(run)} marks" d="{lines}"/>' if lines else ""
