"""Charts as inline SVG: curves of several runs over one axis."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from itertools import count
from typing import Literal

from longctx.report.curves import Series, thinned
from longctx.report.scales import Scale, Unit, bounds, written

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
    style: Literal["line", "faint", "points", "dashed"] = "line"


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
    low_x, high_x = float(min(ends)), float(max(ends))
    x = Scale(low_x, max(high_x, low_x + 1), LEFT, width - RIGHT, chart.log_x)
    tops = [v for c in chart.curves for v in (float(c.series.y.min()), float(c.series.y.max()))]
    low_y, high_y = bounds(tops, chart.log_y, chart.to_zero)
    y = Scale(low_y, high_y, height - BOTTOM, TOP, chart.log_y, chart.unit)
    clip = f"clip-{next(_numbers)}"
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(chart.title)}" data-unit="{chart.unit}" '
        f'data-x-title="{escape(chart.x_title)}" {_data("x", x)} {_data("y", y)}>',
        f'<clipPath id="{clip}"><rect x="{LEFT - 4}" y="{TOP - 4}" '
        f'width="{width - LEFT - RIGHT + 8}" height="{height - TOP - BOTTOM + 8}"/></clipPath>',
        *_axes(chart, x, y),
        f'<g clip-path="url(#{clip})">',
        *(_mark(run, series, x, height - BOTTOM) for run, series in chart.marks),
        *(_curve(curve, x, y) for curve in chart.curves),
        "</g>",
        f'<line class="cross" y1="{TOP}" y2="{height - BOTTOM}" x1="-9" x2="-9"/></svg>',
    ]
    return "".join(parts)


def _positive(series: Series, chart: Chart) -> Series:
    kept = (series.x > 0) | (not chart.log_x)
    kept &= (series.y > 0) | (not chart.log_y)
    return Series(series.x[kept], series.y[kept])


def _data(name: str, scale: Scale) -> str:
    values = (scale.low, scale.high, scale.start, scale.stop, int(scale.log))
    return f'data-{name}="{",".join(f"{value:.12g}" for value in values)}"'


def _axes(chart: Chart, x: Scale, y: Scale) -> list[str]:
    bottom, parts = y.start, ['<g class="axes">']
    for tick in y.ticks(5):
        at = f"{y.place(tick):.1f}"
        parts.append(f'<line class="grid" x1="{x.start:g}" x2="{x.stop:g}" y1="{at}" y2="{at}"/>')
        label = written(tick, chart.unit)
        parts.append(f'<text x="{x.start - 8:g}" y="{at}" dy=".32em" class="y">{label}</text>')
    ticks = [tick for tick in x.ticks(10 if chart.wide else 6) if tick == int(tick)]
    reached = -math.inf
    if not chart.log_x and ticks and x.place(ticks[0]) - x.start > 20:
        ticks.insert(0, x.low)
    for tick in ticks:
        at = x.place(tick)
        parts.append(
            f'<line class="tick" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
        )
        if at - reached < 38:
            continue
        reached = at
        label = written(tick)
        parts.append(f'<text x="{at:.1f}" y="{bottom + 17:g}" class="x">{label}</text>')
    middle = (x.start + x.stop) / 2
    title = escape(chart.x_title) + (" (log)" if chart.log_x else "")
    parts.append(f'<text x="{middle:g}" y="{bottom + 36:g}" class="x title">{title}</text>')
    parts.append(
        f'<line class="base" x1="{x.start:g}" x2="{x.stop:g}" y1="{bottom}" y2="{bottom}"/>'
    )
    return [*parts, "</g>"]


def _curve(curve: Curve, x: Scale, y: Scale) -> str:
    series = thinned(curve.series, MOST_POINTS[x.stop > NARROW[0]], x.log)
    points = [(x.place(float(a)), y.place(float(b))) for a, b in zip(series.x, series.y)]
    classes = f'class="{colour(curve.run)} {curve.style}"'
    name = escape(curve.name)
    path = "M" + " ".join(f"{a:.1f},{b:.2f}" for a, b in points)
    drawn = f'<path {classes} data-name="{name}" d="{path}"><title>{name}</title></path>'
    if (curve.style == "points" and len(points) <= MOST_DOTS) or len(points) == 1:
        dots = "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.8"/>' for a, b in points)
        drawn += f'<g class="{colour(curve.run)} dots">{dots}</g>'
    return drawn


def _mark(run: int, series: Series, x: Scale, bottom: float) -> str:
    """Small lines at the bottom."""
    places = sorted({round(x.place(float(at)), 1) for at in series.x if at >= x.low})
    lines = "".join(f"M{at:g},{bottom:g}v-9" for at in places)
    return f'<path class="{colour(run)} marks" d="{lines}"/>' if lines else ""
