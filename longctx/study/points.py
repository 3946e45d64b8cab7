"""The finished cells of a study as points: which line each belongs to, and what was measured."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from longctx.report.curves import Series
from longctx.report.reading import Run, as_number, read_runs
from longctx.study.axes import KINDS, kind_of
from longctx.study.results import Results, Row
from longctx.train.run_directory import CONFIG_FILE

SAME_TASK = tuple(kind for kind in KINDS if kind != "length")
"""Kinds of axes whose values do not change what a model is asked for."""
SETTLING = 2
"""First steps of a run, which are not timed."""


@dataclass(frozen=True)
class Point:
    """A finished cell and its run."""

    row: Row
    run: Run

    def figure(self, name: str) -> float | None:
        """A number of its summary."""
        return as_number(self.row.summary.get(name))

    @property
    def loss(self) -> float | None:
        """Loss on held-out data at the end."""
        return self.figure("val_loss")

    @property
    def length(self) -> float | None:
        """Tokens of a sequence."""
        return as_number(self.row.config.get("train.seq_len"))

    @property
    def rate(self) -> float | None:
        """Peak learning rate."""
        return as_number(self.row.config.get("optim.lr"))

    @property
    def step_seconds(self) -> float | None:
        """The median time of a step."""
        return self._median("seconds")

    @property
    def token_seconds(self) -> float | None:
        """The median time of a token."""
        speed = self._median("tokens_per_second")
        return 1 / speed if speed else None

    @property
    def peak_memory(self) -> float | None:
        """The most memory of any step, in bytes, of the first process."""
        series = self.run.series.get("peak_memory_bytes")
        return float(series.y.max()) if series else None

    def losses_over(self, name: str) -> Series | None:
        """Held-out losses over another figure of the same steps."""
        losses, other = self.run.series.get("val_loss"), self.run.series.get(name)
        if losses is None or other is None:
            return None
        found = losses.at(other)
        return found if len(found.x) else None

    def _median(self, name: str) -> float | None:
        series = self.run.series.get(name)
        if series is None:
            return None
        kept = series.y[SETTLING:] if len(series.y) > SETTLING else series.y
        return float(np.median(kept))


@dataclass(frozen=True)
class Points:
    """All finished cells of a study, and the best ones of its sweep."""

    results: Results
    all: tuple[Point, ...]
    best: tuple[Point, ...]
    """All, if nothing was swept."""
    unread: tuple[str, ...]
    """Finished cells whose folders hold no run any more."""

    def lines(self, points: Sequence[Point], *varying: str) -> dict[str, list[Point]]:
        """Points by what they are called along the axes, but for those of these kinds and the
        swept ones; in the order of the study file."""
        axes = self._axes(varying)
        found: dict[str, list[Point]] = {}
        for point in points:
            name = ", ".join(_told(axis, point.row.values[axis]) for axis in axes)
            found.setdefault(name or self.results.name, []).append(point)
        return found

    def groups(self, points: Sequence[Point]) -> dict[str, list[Point]]:
        """Points by `study.group`, or else by the axes that tell models or tasks apart."""
        return self.lines(points, *SAME_TASK)

    def _axes(self, varying: Sequence[str]) -> list[str]:
        group = self.results.group
        if group and varying == SAME_TASK:
            return [group]
        return [
            axis
            for axis in self.results.axes
            if kind_of(axis) not in varying
            and axis not in self.results.over
            and len({json.dumps(row.values[axis]) for row in self.results.rows}) > 1
        ]


def read_points(results: Results) -> Points:
    """Reads the runs of finished cells."""
    done = [row for row in results.rows if row.status == "done"]
    there = [row for row in done if (row.run_dir / CONFIG_FILE).is_file()]
    runs = read_runs([str(row.run_dir) for row in there]) if there else []
    found = tuple(Point(row, run) for row, run in zip(there, runs))
    best = tuple(point for point in found if point.row.is_best) if results.over else found
    unread = tuple(row.name for row in done if row not in there)
    return Points(results, found, best, unread)


def known(
    points: Sequence[Point], x: Callable[[Point], float | None], y: Callable[[Point], float | None]
) -> list[tuple[float, float, Point]]:
    """The points of which both numbers are known and positive, in order of the first."""
    found = [(a, b, p) for p in points if (a := x(p)) and (b := y(p)) and a > 0 and b > 0]
    return sorted(found, key=lambda each: each[0])


def _told(axis: str, value: Any) -> str:
    """A value as it is called; numbers with the name of their field."""
    if isinstance(value, str):
        return value
    return f"{axis.rpartition('.')[2]} {value if isinstance(value, int) else json.dumps(value)}"
