"""Boxes of a study's page: a chart, the fits in it, its numbers as CSV, and what made it."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any
from urllib.parse import quote

from longctx.report.charts import Chart, draw, framed, keys

Cells = Sequence[Any]
"""A row of a table."""


@dataclass(frozen=True)
class Table:
    """A heading, and rows below it."""

    heading: Cells
    rows: Sequence[Cells]

    def html(self) -> str:
        """The table, in a box that scrolls."""
        head = "".join(f"<th>{escape(str(name))}</th>" for name in self.heading)
        body = "".join(
            f"<tr>{''.join(f'<td>{escape(shown(cell))}</td>' for cell in row)}</tr>"
            for row in self.rows
        )
        return (
            f'<div class="scroll"><table class="numbers"><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )

    def csv(self) -> str:
        """The same for other programs, with all digits."""
        lines = io.StringIO()
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(self.heading)
        writer.writerows(self.rows)
        return lines.getvalue()


@dataclass(frozen=True)
class Plot:
    """What a box shows; without a chart just its notes."""

    title: str
    note: str
    chart: Chart | None
    names: Sequence[str]
    """What the colours mean, in their order."""
    numbers: Table
    fits: Table | None = None
    notes: Sequence[str] = field(default_factory=tuple)
    """What is missing, and why."""

    def html(self, command: str) -> str:
        """The box; `command` is what made its numbers."""
        drawn = draw(self.chart) if self.chart else ""
        if self.fits and self.fits.rows:
            drawn += self.fits.html()
        if self.notes:
            notes = "".join(f"<li>{escape(note)}</li>" for note in self.notes)
            drawn += f'<ul class="log">{notes}</ul>'
        drawn += f"<details><summary>Command and numbers</summary><pre>{escape(command)}</pre>"
        drawn += f"{download(self.title, self.numbers)}{self.numbers.html()}"
        if self.fits and self.fits.rows:
            drawn += download(f"{self.title} fits", self.fits)
        drawn += "</details>"
        legend = keys(self.names) if len(self.names) > 1 else ""
        wide = "wide" if self.chart and self.chart.wide else ""
        return framed(self.title, self.note, drawn, legend, wide)


def by_reason(reasons: Sequence[tuple[str, str]]) -> list[str]:
    """Notes on lines, those that say the same in one."""
    found: dict[str, list[str]] = {}
    for name, reason in reasons:
        found.setdefault(reason, []).append(name)
    return [f"{', '.join(names)}: {reason}" for reason, names in found.items()]


def download(title: str, table: Table) -> str:
    """A link to a table that needs no other file."""
    name = "-".join(title.lower().replace(",", " ").replace("/", " ").split()) + ".csv"
    data = quote(table.csv())
    return (
        f'<p><a class="file" download="{escape(name)}" href="data:text/csv;charset=utf-8,{data}">'
        f"{escape(name)}</a></p>"
    )


def shown(cell: Any) -> str:
    """A number with four digits, nothing for what is not known."""
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return str(cell)


def span(ends: tuple[float, float] | None) -> str:
    """Both ends of a range."""
    return f"{ends[0]:.3g} to {ends[1]:.3g}" if ends else ""
