"""The results of a study: `study.csv`, a row a cell, and `study.png`."""

import csv
import io
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longctx.errors import OutsideError
from longctx.study.design import Study

FIGURES = (
    "val_accuracy",
    "val_loss",
    "parameters",
    "tokens",
    "seconds",
    "tokens_per_second",
    "cache_bytes_per_token",
)
LABELS = {"val_accuracy": "accuracy on held-out data", "val_loss": "loss on held-out data (nats)"}


@dataclass(frozen=True)
class Result:
    """What became of a cell: done, failed, interrupted or not run; done ones have a summary."""

    status: str
    summary: dict[str, Any]


def write_results(study: Study, results: Mapping[str, Result], draw: bool = True) -> None:
    """Writes the table, and the picture as well if wanted, into the folder of the study."""
    folder = study.config.path
    lines = io.StringIO()
    table = csv.writer(lines, lineterminator="\n")
    table.writerow(["cell", *study.axes, "status", *FIGURES])
    for cell in study.cells:
        result = results[cell.name]
        figures = [result.summary.get(name, "") for name in FIGURES]
        table.writerow([cell.name, *cell.values.values(), result.status, *figures])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / ".partial-study.csv"
        partial.write_text(lines.getvalue())
        partial.replace(folder / "study.csv")
        if draw:
            _draw(study, results)
    except OSError as error:
        raise OutsideError(f"{folder}: cannot write the results: {error.strerror}") from error


def _draw(study: Study, results: Mapping[str, Result]) -> None:
    """Means over all axes but two, with bars from the least to the largest value."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        sys.stderr.write("warning: no study.png, because matplotlib is not installed\n")
        return
    groups = _groups(study, results)
    places = list(dict.fromkeys(cell.values[study.axes[0]] for cell in study.cells))
    figure = Figure(figsize=(10, 6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
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
        style = {"marker": "os^DvPX"[number % 7], "color": f"C{number % 10}", "linewidth": 0.8}
        axes.errorbar(x, means, reach, capsize=3, label=name, **style)
    axes.set_xticks(range(len(places)), places)
    axes.set(xlabel=study.axes[0], ylabel=LABELS[study.config.plot], title=study.config.name)
    axes.grid(alpha=0.25)
    if groups:
        figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(study.config.path / "study.png")


def _groups(study: Study, results: Mapping[str, Result]) -> dict[str, dict[str, list[float]]]:
    """Figures by the value of the second axis, and then by that of the first."""
    groups: dict[str, dict[str, list[float]]] = {}
    first, *others = study.axes
    for cell in study.cells:
        figure = results[cell.name].summary.get(study.config.plot)
        if figure is not None:
            line = cell.values[others[0]] if others else study.config.name
            groups.setdefault(line, {}).setdefault(cell.values[first], []).append(figure)
    return groups
