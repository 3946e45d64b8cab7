"""What a run directory holds, as far as a page shows it."""

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from longctx.errors import InputError
from longctx.report.curves import Series
from longctx.train.metrics import LOG_FILE, METRICS_FILE
from longctx.train.redaction import redact
from longctx.train.run_directory import CONFIG_FILE, SUMMARY_FILE

ENVIRONMENT_FILE = "environment.json"
WARNING = "warning:"
MOST_LISTS, MOST_ELEMENTS = 640, 64
LARGEST, LAST_STEP = 1e100, 10**12
"""Beyond these a number or a step is taken for an error."""
Columns = dict[str, np.ndarray | dict[int, list[Any]]]
"""Numbers, NaN where there is none; or lists by their place among the rows."""


@dataclass
class Run:
    """One run, without its secrets; what is broken or missing is told in notes."""

    path: Path
    name: str = ""
    """As the page calls it; different from those of the others."""
    config: dict[str, Any] = field(default_factory=dict)
    """Values by dotted name."""
    config_text: str = ""
    series: dict[str, Series] = field(default_factory=dict)
    """Numbers of metrics over steps."""
    lists: dict[str, tuple[np.ndarray, list[list[float | None]]]] = field(default_factory=dict)
    """Steps, and a list for each, of metrics that are lists; None is no number."""
    summary: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def last(self, name: str) -> float | None:
        """The last number of a metric."""
        series = self.series.get(name)
        return float(series.y[-1]) if series else None

    def median(self, name: str) -> float | None:
        """The median of a metric."""
        series = self.series.get(name)
        return float(np.median(series.y)) if series else None


def read_runs(paths: Sequence[str]) -> list[Run]:
    """The runs in these folders, each once; InputError for a folder that holds none."""
    folders: dict[Path, Path] = {}
    for path in map(Path, paths):
        folders.setdefault(path.resolve(), path)
    runs = [_read(path) for path in folders.values()]
    for run, name in zip(runs, _names(runs)):
        run.name = name
    return runs


def _read(path: Path) -> Run:
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; give the folders of runs, such as runs/tiny")
    if not any((path / file).is_file() for file in (CONFIG_FILE, METRICS_FILE)):
        within = sorted(p.parent.name for p in path.glob(f"*/{CONFIG_FILE}"))
        hint = f"; it has folders of runs: try {path}/*" if within else ""
        raise InputError(f"{path}: holds no run, neither {CONFIG_FILE} nor {METRICS_FILE}{hint}")
    run = Run(path)
    text = _text(run, CONFIG_FILE)
    run.config_text = redact(text)
    try:
        run.config = dict(_flat(redact(tomllib.loads(text))))
    except tomllib.TOMLDecodeError as error:
        run.notes.append(f"{CONFIG_FILE} is broken: {error}")
    run.summary = _table(run, SUMMARY_FILE, "the run has not come to its end")
    run.environment = _table(run, ENVIRONMENT_FILE, "")
    run.warnings = [redact(x) for x in _text(run, LOG_FILE).splitlines() if WARNING in x]
    _read_metrics(run)
    return run


def _names(runs: Sequence[Run]) -> Iterator[str]:
    """Names of runs, with their folders where those alone would not do."""
    names = [str(run.config.get("run.name") or run.path.resolve().name) for run in runs]
    for run, name in zip(runs, names):
        yield name if names.count(name) == 1 else f"{name} ({run.path})"


def _text(run: Run, file: str) -> str:
    """A file that may be missing, whatever bytes it has."""
    try:
        return (run.path / file).read_text(errors="replace")
    except OSError as error:
        run.notes.append(f"{file}: cannot be read: {error.strerror}")
        return ""


def _table(run: Run, file: str, without: str) -> dict[str, Any]:
    if not (run.path / file).exists():
        run.notes.append(f"no {file}" + (f": {without}" if without else ""))
        return {}
    try:
        content = json.loads(_text(run, file))
    except ValueError as error:
        run.notes.append(f"{file} is broken: {error}")
        return {}
    return redact(content) if isinstance(content, dict) else {}


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_metrics(run: Run) -> None:
    path = run.path / METRICS_FILE
    columns = _columns_at_once(path)
    if columns is None:
        columns = _columns_line_by_line(run, path)
    steps = columns.pop("step", None)
    if steps is None or not len(steps):
        run.notes.append(f"no steps in {METRICS_FILE}")
        return
    for name, values in columns.items():
        if isinstance(values, np.ndarray):
            known = np.abs(values) < LARGEST
            if known.any():
                run.series[name] = Series(steps[known], values[known])
        else:
            lists = [[as_number(x) for x in each[:MOST_ELEMENTS]] for each in values.values()]
            run.lists[name] = steps[list(values)], lists


def _columns_at_once(path: Path) -> Columns | None:
    """Columns of a file that is as it should be; None of any other."""
    try:
        import pyarrow as arrow
        from pyarrow.json import read_json
    except ImportError:
        return None
    try:
        table = read_json(path)
    except (arrow.ArrowException, OSError):
        return None
    if "step" not in table.column_names or not arrow.types.is_integer(table["step"].type):
        return None
    steps = table["step"].to_numpy().astype(float)
    if table["step"].null_count or (np.diff(steps) <= 0).any() or (steps > LAST_STEP).any():
        return None
    columns: Columns = {"step": steps}
    for name in table.column_names:
        column = table[name]
        if arrow.types.is_integer(column.type) or arrow.types.is_floating(column.type):
            columns[name] = np.asarray(column.to_numpy(), dtype=float)
        elif arrow.types.is_list(column.type):
            kept = _sample(np.flatnonzero(column.is_valid().to_numpy()))
            columns[name] = dict(zip(kept, column.take(kept).to_pylist()))
    return columns


def _columns_line_by_line(run: Run, path: Path) -> Columns:
    """Columns of the lines that can be read, in order of steps; others are told in notes."""
    rows, broken = [], []
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        step = row.get("step") if isinstance(row, dict) else None
        is_row = type(step) is int and 0 <= step <= LAST_STEP
        (rows if is_row else broken).append(row if is_row else number)
    if broken:
        numbers = ", ".join(map(str, broken[:5])) + (", ..." if len(broken) > 5 else "")
        run.notes.append(f"{METRICS_FILE}: left out {len(broken)} broken lines: {numbers}")
    rows.sort(key=lambda row: row["step"])
    columns: Columns = {}
    for name in sorted(set().union(*rows)):
        values = [row.get(name) for row in rows]
        lists = [n for n, value in enumerate(values) if isinstance(value, list)]
        if lists:
            columns[name] = {n: values[n] for n in _sample(np.array(lists))}
        else:
            columns[name] = np.array([as_number(value) for value in values], dtype=float)
    return columns


def _sample(places: np.ndarray) -> list[int]:
    """At most MOST_LISTS of these, evenly spread, the first and the last among them."""
    if len(places) > MOST_LISTS:
        places = places[np.linspace(0, len(places) - 1, MOST_LISTS).astype(int)]
    return [int(place) for place in places]


def as_number(value: Any) -> float | None:
    """The value if it is a number that can be drawn."""
    return float(value) if isinstance(value, int | float) and abs(value) < LARGEST else None
