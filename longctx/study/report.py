"""What a study learnt, for people: `study.html`, and its main charts as `study.png`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longctx.errors import OutsideError
from longctx.files import write_whole
from longctx.report.charts import Chart
from longctx.report.reading import as_number
from longctx.report.scales import bounds
from longctx.study.page import Plots, make_plots, render
from longctx.study.points import read_points
from longctx.study.results import PAGE, PICTURE, Results

LABELS = {"val_accuracy": "accuracy on held-out data", "val_loss": "loss on held-out data (nats)"}
MARKS = "os^DvPX"


def write_report(results: Results, folder: Path) -> None:
    """Writes the page and the picture into the folder of the study."""
    points = read_points(results)
    plots = make_plots(points)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / PAGE, render(points, plots).encode(), synced=False)
        _draw(results, plots, folder / PICTURE)
    except OSError as error:
        raise OutsideError(f"{folder}: cannot write the results: {error.strerror}") from error


def _draw(results: Results, plots: Plots, file: Path) -> None:
    """The charts that have fits; of a study without any, means over the first axis."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        sys.stderr.write(f"warning: no {PICTURE}, because matplotlib is not installed\n")
        return
    charts = [p for p in (plots.scaling[0], *plots.costs) if p.chart and p.fits and p.fits.rows]
    figure = Figure(figsize=(10, 6 * max(1, len(charts))), dpi=100, layout="constrained")
    figure.suptitle(results.name)
    if charts:
        for place, plot in zip(figure.subplots(len(charts), squeeze=False)[:, 0], charts):
            _chart(place, plot.chart, plot.names, str(plot.numbers.heading[-1]))
    else:
        _means(figure.add_subplot(), results)
    figure.savefig(file)


def _chart(axes: Any, chart: Chart, names: Sequence[str], y_name: str) -> None:
    """A chart of the page, as matplotlib draws it."""
    for band in chart.bands:
        axes.fill_between(band.x, band.low, band.high, color=f"C{band.run % 10}", alpha=0.14)
    for curve in chart.curves:
        style = {"color": f"C{curve.run % 10}", "linewidth": 1.2}
        if curve.style in ("dots", "points"):
            style |= {"marker": MARKS[curve.run % len(MARKS)], "label": names[curve.run]}
        if curve.style == "dots":
            style["linestyle"] = "none"
        axes.plot(curve.series.x, curve.series.y, **style)
    axes.set(xlabel=chart.x_title, ylabel=y_name, title=chart.title)
    axes.set_xscale("log" if chart.log_x else "linear")
    axes.set_yscale("log" if chart.log_y else "linear")
    axes.set_ylim(*bounds(chart.ends_of_y(), chart.log_y))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def _means(axes: Any, results: Results) -> None:
    """Means over all axes but two, with bars from the least to the largest value."""
    groups = _groups(results)
    places = list(dict.fromkeys(str(row.values[results.axes[0]]) for row in results.rows))
    for number, (name, points) in enumerate(groups.items()):
        shown = [place for place in places if place in points]
        # Lines that lie on each other are set apart a little.
        shift = 0.5 * ((number + 0.5) / len(groups) - 0.5)
        means = [sum(points[place]) / len(points[place]) for place in shown]
        reach = [
            [mean - min(points[place]) for place, mean in zip(shown, means)],
            [max(points[place]) - mean for place, mean in zip(shown, means)],
        ]
        x = [places.index(place) + shift for place in shown]
        style = {"marker": MARKS[number % len(MARKS)], "color": f"C{number % 10}"}
        axes.errorbar(x, means, reach, capsize=3, label=name, linewidth=0.8, **style)
    axes.set_xticks(range(len(places)), places)
    axes.set(xlabel=results.axes[0], ylabel=LABELS[results.plot])
    axes.grid(alpha=0.25)
    if groups:
        axes.figure.legend(loc="outside right upper", frameon=False)


def _groups(results: Results) -> dict[str, dict[str, list[float]]]:
    """Figures by the value of the second axis, and then by that of the first."""
    groups: dict[str, dict[str, list[float]]] = {}
    first, *others = results.axes
    for row in results.rows:
        figure = as_number(row.summary.get(results.plot))
        if figure is not None:
            line = str(row.values[others[0]]) if others else results.name
            groups.setdefault(line, {}).setdefault(str(row.values[first]), []).append(figure)
    return groups
