"""What a page says of runs in words: figures, configs, environments, warnings."""

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from longctx.report.charts import colour
from longctx.report.reading import Run, as_number
from longctx.report.scales import Unit, written

NONE = '<span class="none">&ndash;</span>'
ALWAYS_DIFFERENT = ("run.name", "run.dir")
MOST_WARNINGS = 100
LONGEST = 400
"""Letters of a line or a value that a page shows."""
Figure = tuple[str, Callable[[Run], float | None], Unit, Callable | None]


def _summed(name: str) -> Callable[[Run], float | None]:
    """A figure of the summary, or the last of the metrics while there is none."""

    def find(run: Run) -> float | None:
        value = as_number(run.summary.get(name))
        return run.last(name) if value is None else value

    return find


def _steps(run: Run) -> float | None:
    ends = [float(series.x[-1]) for series in run.series.values()]
    return max(ends, default=None)


def _seconds(run: Run) -> float | None:
    series = run.series.get("seconds")
    return float(series.y.sum()) if series else None


def _peak(run: Run) -> float | None:
    series = run.series.get("peak_memory_bytes")
    return float(series.y.max()) if series else None


FIGURES: tuple[Figure, ...] = (
    ("steps", _steps, "number", None),
    ("tokens", _summed("tokens"), "number", None),
    ("held-out loss", _summed("val_loss"), "number", min),
    ("accuracy", _summed("val_accuracy"), "percent", max),
    ("tokens/s, median", lambda run: run.median("tokens_per_second"), "number", max),
    ("MFU, median", lambda run: run.median("mfu"), "percent", max),
    ("peak memory", _peak, "bytes", None),
    ("time of steps", _seconds, "seconds", None),
    ("skipped", _summed("skipped"), "number", None),
    ("parameters", _summed("parameters"), "number", None),
)
"""Name, value, unit, and which of several values is the best."""
CARD = ("held-out loss", "accuracy", "tokens/s, median", "MFU, median", "peak memory")


def cards(runs: Sequence[Run]) -> str:
    """A card for each run, with its most important figures."""
    by_name = {name: (find, unit) for name, find, unit, _ in FIGURES}
    parts = []
    for number, run in enumerate(runs):
        cells = [(name, _number(*(by_name[name]), run)) for name in CARD]
        (title, value), *others = cells
        rest = "".join(f"<div><dt>{name}</dt><dd>{x}</dd></div>" for name, x in others)
        parts.append(
            f'<article class="card tile {colour(number)}"><h3>{escape(run.name)}</h3>'
            f'<p class="big">{value}<small> {title}</small></p><dl>{rest}</dl></article>'
        )
    return f'<div class="tiles">{"".join(parts)}</div>'


def _number(find: Callable[[Run], float | None], unit: Unit, run: Run) -> str:
    value = find(run)
    if value is None:
        return NONE
    if unit == "number" and 0 < abs(value) < 100 and value != int(value):
        return f"{value:.4f}"
    return written(value, unit)


def runs_table(runs: Sequence[Run]) -> str:
    """All figures and the most important facts; the best of several runs stands out."""
    rows = []
    for name, find, unit, choose in FIGURES:
        known = [value for run in runs if (value := find(run)) is not None]
        best = choose(known) if choose and len(known) > 1 else None
        cells = [(_number(find, unit, run), best is not None and find(run) == best) for run in runs]
        drawn = "".join(f"<td{' class=best' if is_best else ''}>{x}</td>" for x, is_best in cells)
        rows.append(f"<tr><th>{name}</th>{drawn}</tr>")
    for name, fact in FACTS.items():
        drawn = "".join(f"<td>{_text(fact(run))}</td>" for run in runs)
        rows.append(f"<tr><th>{name}</th>{drawn}</tr>")
    return _table(runs, rows)


def _device(run: Run) -> Any:
    names = run.environment.get("devices") or []
    if run.summary.get("device") == "cuda" and isinstance(names, list) and names:
        return names[0]
    return run.environment.get("cpu") or run.summary.get("device")


def _commit(run: Run) -> str:
    git = run.environment.get("git")
    if not isinstance(git, dict) or not git.get("commit"):
        return ""
    return str(git["commit"])[:10] + (" + changes" if git.get("dirty") else "")


FACTS: Mapping[str, Callable[[Run], Any]] = {
    "device": _device,
    "processes": lambda run: run.summary.get("processes"),
    "precision": lambda run: run.summary.get("precision"),
    "longctx": lambda run: run.environment.get("longctx"),
    "torch": lambda run: run.environment.get("torch"),
    "commit": _commit,
    "started": lambda run: str(run.environment.get("time", "")).replace("+00:00", "Z"),
}


def differences(runs: Sequence[Run]) -> str:
    """Fields of configs in which runs differ, and all of each."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    differing = [
        name
        for name in names
        if name not in ALWAYS_DIFFERENT
        and len({json.dumps(run.config.get(name, "<absent>"), default=str) for run in runs}) > 1
    ]
    whole = "".join(
        f'<details><summary>Config of <span class="key {colour(n)}">{escape(run.name)}</span>'
        f"</summary><pre>{escape(run.config_text)}</pre></details>"
        for n, run in enumerate(runs)
    )
    if len(runs) == 1:
        return whole
    if not differing:
        return f"<p>The configs are equal.</p>{whole}"
    return _by_run(runs, {name: [r.config.get(name) for r in runs] for name in differing}) + whole


def environments(runs: Sequence[Run]) -> str:
    """What the runs ran on; rows in which they differ stand out."""
    flat = [flattened(run.environment) for run in runs]
    names = dict.fromkeys(name for each in flat for name in each)
    if not names:
        return ""
    table = _by_run(runs, {name: [each.get(name) for each in flat] for name in names})
    return f"<details><summary>Environment</summary>{table}</details>"


def flattened(table: Mapping[str, Any]) -> dict[str, Any]:
    """Values of nested tables by dotted name; lists as text."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            found |= {f"{key}.{inner}": x for inner, x in flattened(value).items()}
        else:
            found[key] = " ".join(map(str, value)) if isinstance(value, list) else value
    return found


def _by_run(runs: Sequence[Run], values: Mapping[str, Sequence[Any]]) -> str:
    rows = []
    for name, of_runs in values.items():
        differs = len(runs) > 1 and len(set(map(str, of_runs))) > 1
        cells = "".join(f"<td>{_text(value)}</td>" for value in of_runs)
        rows.append(f"<tr{' class=differs' if differs else ''}><th>{_text(name)}</th>{cells}</tr>")
    return _table(runs, rows)


def warnings(runs: Sequence[Run]) -> str:
    """The last warnings of each run's log, and what the page could not read of it."""
    parts = []
    for number, run in enumerate(runs):
        lines = [*(f"note: {note}" for note in run.notes), *run.warnings[-MOST_WARNINGS:]]
        if len(run.warnings) > MOST_WARNINGS:
            lines.append(f"... and {len(run.warnings) - MOST_WARNINGS} earlier warnings")
        if not lines:
            continue
        items = "".join(f"<li>{_text(line)}</li>" for line in lines)
        key = f'<h3 class="key {colour(number)}">{escape(run.name)}</h3>'
        parts.append(f'{key}<ul class="log">{items}</ul>')
    return "".join(parts) or "<p>None.</p>"


def _table(runs: Sequence[Run], rows: Sequence[str]) -> str:
    """Rows below the names of runs."""
    names = (f'<th class="key {colour(n)}">{escape(run.name)}</th>' for n, run in enumerate(runs))
    head = f"<th></th>{''.join(names)}"
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _text(value: Any) -> str:
    if value is None or value == "":
        return NONE
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return escape(text if len(text) <= LONGEST else text[:LONGEST] + " ...")
