"""The page about a study: `study.html`, which needs nothing but itself."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from longctx.report.page import assemble, card, grid
from longctx.report.tables import flattened
from longctx.study.cards import Plot, Table, download, shown
from longctx.study.figures import (
    compute_plot,
    curves_plot,
    equal_compute_plots,
    rate_plots,
    size_and_tokens_plot,
)
from longctx.study.points import Point, Points
from longctx.study.results import Results
from longctx.study.speeds import cost_plots
from longctx.train.redaction import redact

FACTS = (
    "cpu",
    "cores",
    "devices",
    "platform",
    "longctx",
    "python",
    "torch",
    "triton",
    "git.commit",
)
"""Of environment.json, in the summary; the rest is in its own section."""
MOST_VALUES = 4
"""Different values of a fact that are listed."""
STATUSES = ("done", "failed", "interrupted", "running", "not run")


@dataclass(frozen=True)
class Plots:
    """All plots of a study, by section."""

    scaling: Sequence[Plot]
    curves: Plot
    rates: Sequence[Plot]
    costs: Sequence[Plot]


def make_plots(points: Points) -> Plots:
    """What can be drawn of these points, and reasons for what cannot."""
    scaling = [compute_plot(points), size_and_tokens_plot(points), *equal_compute_plots(points)]
    return Plots(scaling, curves_plot(points), rate_plots(points), cost_plots(points))


def render(points: Points, plots: Plots) -> str:
    """The page."""
    results, command = points.results, redact(points.results.command)
    sections = {
        "Study": card(_summary(points)),
        "Scaling": _boxes(plots.scaling, command),
        "Curves": _boxes([plots.curves], command),
        "Learning rates": _boxes(plots.rates, command),
        "Costs": _boxes(plots.costs, command),
        "Cells": card(_cells(results)),
        "Environment": card(_environment(points.all)),
    }
    return assemble(results.name, "study", sections)


def _boxes(plots: Sequence[Plot], command: str) -> str:
    return grid([plot.html(command) for plot in plots])


def _summary(points: Points) -> str:
    results = points.results
    counts = Counter(row.status for row in results.rows)
    told = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
    facts = {"cells": f"{len(results.rows)}: {told}", "axes": ", ".join(results.axes)}
    if results.over:
        best = f"best of {', '.join(results.over)} by {results.by}"
        facts["swept"] = f"{best}, known for {len(points.best)} combinations of the other axes"
    if points.unread:
        facts["left out"] = f"finished, but without their folders: {', '.join(points.unread)}"
    seconds = sum(row.seconds or 0.0 for row in results.rows)
    facts["time of training"] = f"{seconds / 3600:.2f} hours, all cells together"
    facts |= {name: told for name, told in _facts(points.all).items() if told and name in FACTS}
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items()
    )
    return (
        f"<pre>{escape(redact(results.command))}</pre>"
        f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'
        "<p>The command makes this page anew; without --collect it first trains what is not "
        "finished. A single cell: <code>longctx train FOLDER/CELL/config.toml</code>. Bands and "
        "ranges hold 90 % of laws through resampled residuals; they say how sure a law is of the "
        "runs it was fitted to, not of other sizes, data or learning rates.</p>"
    )


def _cells(results: Results) -> str:
    figures = ("val_loss", "val_accuracy", "parameters", "tokens", "flops", "tokens_per_second")
    fields = [
        name
        for name in dict.fromkeys(name for row in results.rows for name in row.config)
        if name not in results.axes
    ]
    swept = bool(results.over)
    heading = ["cell", "status", *(["best"] if swept else []), *results.axes, *figures]
    heading += ["seconds", "processes", "attempts", "last failure"]
    rows, whole = [], []
    for row in results.rows:
        own = [row.name, row.status, *(["best" if row.is_best else ""] if swept else [])]
        own += [row.values[axis] for axis in results.axes]
        own += [row.summary.get(name) for name in figures]
        own += [row.seconds, row.processes, row.attempts, redact(row.error)]
        rows.append(own)
        whole.append([*own, *(row.config.get(name) for name in fields)])
    return Table(heading, rows).html() + download("cells", Table([*heading, *fields], whole))


def _environment(points: Sequence[Point]) -> str:
    facts = _facts(points)
    if not facts:
        return ""
    return Table(["", "runs with each value"], list(facts.items())).html()


def _facts(points: Sequence[Point]) -> dict[str, str]:
    """What runs ran on; where they differ, with the number of runs of each value."""
    tables = [flattened(redact(point.run.environment)) for point in points]
    found = {}
    for name in dict.fromkeys(name for table in tables for name in table):
        counts = Counter(shown(_plain(table.get(name))) for table in tables)
        if len(counts) == 1:
            found[name] = next(iter(counts))
        elif len(counts) <= MOST_VALUES:
            found[name] = "; ".join(f"{value} ({count})" for value, count in counts.items())
        else:
            found[name] = f"{len(counts)} different values"
    return found


def _plain(value: Any) -> Any:
    return str(dict(value)) if isinstance(value, Mapping) else value
