"""Which charts a page has: curves of what runs measured, step by step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape

import numpy as np

from longctx.report.charts import Chart, Curve, colour, draw, framed, keys
from longctx.report.curves import Series, reach_of, smoothed
from longctx.report.heat import draw_heat
from longctx.report.reading import Run
from longctx.report.scales import Unit
from longctx.train.evaluate import bin_start

LOSS, VALIDATION, BY_POSITION = "loss", "val_loss", "val_loss_by_position"
FEWEST_FOR_LOG = 30
"""How many times as large as the least the largest value is where an axis becomes logarithmic."""
FEWEST_TO_SMOOTH = 20
MOST_ROUTERS = 12
"""Lists of routers that a page shows of a run."""
EARLIER = 4
ROUTER = "router/"
LEFT_OUT = {"load_min", "gate_min", "share_kept_min", "share_global_min"}
"""Figures that the heat maps show as well."""


@dataclass(frozen=True)
class Panel:
    """A metric that has a chart of its own."""

    name: str
    title: str
    unit: Unit = "number"
    smooth: bool = False
    """Whether single steps are faint, behind their mean."""
    note: str = ""


PANELS = (
    Panel("val_accuracy", "Accuracy on held-out data", "percent"),
    Panel("grad_norm", "Gradient norm", smooth=True, note="before clipping"),
    Panel("lr", "Learning rate"),
    Panel("update_norm", "Norm of the update", smooth=True),
    Panel("tokens_per_second", "Throughput", smooth=True, note="tokens per second"),
    Panel("mfu", "Model FLOPs utilisation", "percent", smooth=True),
    Panel("seconds", "Time of a step", "seconds", smooth=True),
    Panel("data_share", "Data wait", "percent", smooth=True, note="share of a step's time"),
    Panel("peak_memory_bytes", "Peak memory", "bytes", note="of the first process"),
    Panel("exchange_bytes", "Exchanged", "bytes", note="received by the first process in a step"),
    Panel("exchange_calls", "Exchanges", note="calls of the first process in a step"),
    Panel("skipped", "Skipped steps", note="in all, since the first step"),
)
SHOWN = {LOSS, VALIDATION, "tokens", "data_seconds", *(panel.name for panel in PANELS)}


def derive(run: Run) -> None:
    """Adds what follows from metrics."""
    if "data_seconds" in run.series and "seconds" in run.series:
        run.series["data_share"] = run.series["data_seconds"].over(run.series["seconds"])


def loss_figure(runs: Sequence[Run]) -> str:
    """Training and validation loss, over steps or tokens as the reader chooses."""
    curves = [*_curves(runs, LOSS, smooth=True), *_validation(runs)]
    marks = [(n, series) for n, run in enumerate(runs) if (series := _bad_steps(run)) is not None]
    chart = Chart("Loss", curves, x_title="step", wide=True, marks=marks)
    over_tokens = [
        replace(curve, series=curve.series.at(runs[curve.run].series["tokens"]))
        for curve in curves
        if "tokens" in runs[curve.run].series
    ]
    ways = {
        "step": chart,
        "step, log": replace(chart, log_x=True),
        "tokens": Chart("Loss", over_tokens, x_title="tokens", wide=True),
        "tokens, log": Chart("Loss", over_tokens, x_title="tokens", wide=True, log_x=True),
    }
    if not curves:
        return ""
    note = "nats a label; thin: each step, thick: its mean, dots: held-out data"
    note += "; lines at the bottom: skipped steps" if marks else ""
    choices = "".join(
        f'<input type="radio" name="way" id="way-{n}"{" checked" if n == 0 else ""}>'
        f'<label for="way-{n}">{escape(way)}</label>'
        for n, way in enumerate(ways)
    )
    drawn = "".join(f'<div class="way">{draw(way)}</div>' for way in ways.values())
    return framed("Loss", note, f'<div class="ways">{choices}{drawn}</div>', _legend(runs), "wide")


def metric_figures(runs: Sequence[Run]) -> list[str]:
    """A figure for each of PANELS that any run has."""
    return [figure for panel in PANELS if (figure := _metric(runs, panel))]


def other_figures(runs: Sequence[Run]) -> list[str]:
    """Figures of metrics that no panel and no router has."""
    names = sorted({name for run in runs for name in run.series} - SHOWN)
    kept = [name for name in names if not name.startswith(ROUTER)]
    return [_metric(runs, Panel(name, name, smooth=True)) for name in kept]


def position_figure(runs: Sequence[Run]) -> str:
    """The last held-out loss by position; of a single run, earlier ones as well."""
    curves: list[Curve] = []
    for number, run in enumerate(runs):
        steps, lists = run.lists.get(BY_POSITION, (np.array([]), []))
        if not lists:
            continue
        if len(runs) == 1:
            earlier = np.unique(np.linspace(0, len(lists) - 1, EARLIER + 1).astype(int))[:-1]
            curves += [
                Curve(number, f"step {steps[n]:g}", _by_position(lists[n]), "faint")
                for n in earlier
            ]
        curves.append(Curve(number, f"{run.name}, step {steps[-1]:g}", _by_position(lists[-1])))
    kept = [curve for curve in curves if len(curve.series.x)]
    if not kept:
        return ""
    dotted = [replace(curve, style="points") if curve.style == "line" else curve for curve in kept]
    chart = Chart("Loss by position", dotted, x_title="tokens before, in the document", log_x=True)
    return framed("Loss by position", "nats a label, held-out data", draw(chart), _legend(runs))


def router_figures(runs: Sequence[Run]) -> list[str]:
    """Heat maps of what routers give each head, and curves of their other figures."""
    names = {name for run in runs for name in run.lists if name.startswith(ROUTER)}
    figures = [
        figure for name in _some(sorted(names, key=_by_number)) for figure in _heat(runs, name)
    ]
    scalars = {name for run in runs for name in run.series if name.startswith(ROUTER)}
    for kind in sorted({name.rpartition("/")[2] for name in scalars} - LEFT_OUT):
        if curves := [curve for n, run in enumerate(runs) for curve in _routers(n, run, kind)]:
            title = f"Router {kind.replace('_', ' ')}"
            note = "thin: each router, thick: their mean"
            figures.append(framed(title, note, draw(Chart(title, curves)), _legend(runs)))
    return figures


def _heat(runs: Sequence[Run], name: str) -> Iterator[str]:
    """The same list of each run that has it, in the same colours."""
    found = [(number, run, run.lists[name]) for number, run in enumerate(runs) if name in run.lists]
    known = [x for *_, (_, lists) in found for each in lists for x in each if x is not None]
    limits = min(known, default=0.0), max(known, default=1.0)
    title = name.removeprefix(ROUTER).replace("/", ", ")
    for number, run, (steps, lists) in found:
        drawn = draw_heat(f"{run.name}: {title}", steps, lists, limits)
        key = f'<span class="key {colour(number)}">{escape(run.name)}</span>'
        yield framed(f"Router {title}", "row: head or part", drawn, key)


def _routers(number: int, run: Run, kind: str) -> Iterator[Curve]:
    """One figure of all routers of a run."""
    found = [n for n in run.series if n.startswith(ROUTER) and n.rpartition("/")[2] == kind]
    for name in _some(sorted(found, key=_by_number)):
        router = name.removeprefix(ROUTER).rpartition("/")[0]
        yield Curve(number, f"{run.name}, router {router}", smoothed(run.series[name]), "faint")
    if found:
        x, place = np.unique(np.concatenate([run.series[n].x for n in found]), return_inverse=True)
        y = np.bincount(place, np.concatenate([run.series[n].y for n in found]))
        mean = Series(x, y / np.bincount(place))
        yield Curve(number, f"{run.name}, mean", smoothed(mean))


def _some(names: Sequence[str]) -> list[str]:
    """At most MOST_ROUTERS of them, evenly spread."""
    if len(names) <= MOST_ROUTERS:
        return list(names)
    return [names[n] for n in np.linspace(0, len(names) - 1, MOST_ROUTERS).astype(int)]


def _by_number(name: str) -> list[tuple[bool, int, str]]:
    """Sorts layer 10 behind layer 9."""
    parts = name.replace("/", ".").split(".")
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def _metric(runs: Sequence[Run], panel: Panel) -> str:
    curves = list(_curves(runs, panel.name, panel.smooth))
    if not any(curve.series.y.any() for curve in curves):
        return ""
    values = np.concatenate([curve.series.y for curve in curves])
    log = bool(values.min() > 0 and values.max() > FEWEST_FOR_LOG * np.median(values))
    note = panel.note + (" (log)" if log else "")
    chart = Chart(panel.title, curves, panel.unit, log_y=log, to_zero=True)
    return framed(panel.title, note, draw(chart), _legend(runs))


def _curves(runs: Sequence[Run], name: str, smooth: bool) -> Iterator[Curve]:
    for number, run in enumerate(runs):
        series = run.series.get(name)
        if series is None:
            continue
        if smooth and len(series.x) >= FEWEST_TO_SMOOTH:
            yield Curve(number, f"{run.name}, each step", series, "faint")
            mean = f"{run.name}, mean of {2 * reach_of(len(series.x)) + 1}"
            yield Curve(number, mean, smoothed(series))
        else:
            yield Curve(number, run.name, series, "points" if len(series.x) < 40 else "line")


def _validation(runs: Sequence[Run]) -> Iterator[Curve]:
    for number, run in enumerate(runs):
        if series := run.series.get(VALIDATION):
            yield Curve(number, f"{run.name}, held-out", series, "points")


def _bad_steps(run: Run) -> Series | None:
    """Steps at which the number of skipped ones rose."""
    skipped = run.series.get("skipped")
    if skipped is None or not skipped.y.any():
        return None
    rose = np.flatnonzero(np.diff(skipped.y, prepend=0.0) > 0)
    return Series(skipped.x[rose], skipped.y[rose])


def _by_position(values: Sequence[float | None]) -> Series:
    found = [(bin_start(n) or 1, mean) for n, mean in enumerate(values) if mean is not None]
    return Series(np.array([x for x, _ in found], float), np.array([y for _, y in found], float))


def _legend(runs: Sequence[Run]) -> str:
    return keys([run.name for run in runs]) if len(runs) > 1 else ""
