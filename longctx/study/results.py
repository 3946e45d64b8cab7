"""What became of a study: `study.json`, and the same as the tables `study.csv` and `study.parquet`.

A row is a cell. `study.json` is what `read_results` reads; the tables are for other programs.
"""

import csv
import functools
import io
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longctx.errors import InputError, OutsideError
from longctx.files import write_whole

RECORD_FILE, CSV_FILE, PARQUET_FILE = "study.json", "study.csv", "study.parquet"
PAGE, PICTURE, JOBS_FILE = "study.html", "study.png", "jobs.json"
FILES = (RECORD_FILE, CSV_FILE, PARQUET_FILE, PAGE, PICTURE, JOBS_FILE)
"""In the folder of a study, beside its cells: results, and which jobs of SLURM train them."""
LARGEST_INTEGER = 2**63 - 1
"""Of what parquet holds; a column with larger ones is one of floats."""
SUMMARY_FIGURES = (
    "val_accuracy",
    "val_loss",
    "parameters",
    "non_embedding_parameters",
    "tokens",
    "flops",
    "seconds",
    "tokens_per_second",
    "cache_bytes_per_token",
)
"""Figures of a run's summary that are columns of the tables; empty where a run has none."""
CONFIG_FIELDS = (
    "train.seq_len",
    "train.batch_size",
    "train.steps",
    "optim.lr",
    "model.width",
    "model.depth",
    "model.pattern",
)
"""Fields that every row tells, beside those in which the cells differ."""
OWN_COLUMNS = ("cell", "status", "attempts", "is_best", "processes", "run_dir", "error")
COLUMNS = frozenset((*OWN_COLUMNS, *SUMMARY_FIGURES))
"""Names of columns, which no axis may have."""


@dataclass(frozen=True)
class Row:
    """What became of a cell."""

    name: str
    values: dict[str, Any]
    """By axis: the value of a field, or what a piece of config is called."""
    status: str
    """done, failed, interrupted, running (by a process or in a queue) or not run."""
    attempts: int
    """Attempts that failed, and the one that did not."""
    error: str
    """How the last attempt that failed ended, and the last thing it said; empty if none failed."""
    is_best: bool
    """Best along `Results.over` at its values of the other axes but seeds, once all are over."""
    processes: int
    """Processes that train it."""
    config: dict[str, Any]
    """By dotted name: CONFIG_FIELDS and what axes set, as resolved; None where there is none."""
    summary: dict[str, Any]
    """The run's summary.json; empty unless it is done."""
    run_dir: Path

    @property
    def seconds(self) -> float | None:
        """Seconds of training."""
        return self.summary.get("seconds")

    @property
    def parameters(self) -> int | None:
        """Weights of the model."""
        return self.summary.get("parameters")

    @property
    def tokens(self) -> int | None:
        """Tokens it was trained on."""
        return self.summary.get("tokens")

    @property
    def flops(self) -> float | None:
        """FLOPs of its training."""
        return self.summary.get("flops")


@dataclass(frozen=True)
class Results:
    """A study and what became of its cells."""

    name: str
    command: str
    """The command line that trained it or gathered its results."""
    axes: tuple[str, ...]
    rows: tuple[Row, ...]
    over: tuple[str, ...] = ()
    """Axes that are swept, of whose values only the best counts."""
    by: str = "val_loss"
    """The figure by which it is the best."""
    plot: str = "val_accuracy"
    """`study.plot` of the study file."""
    group: str = ""
    """`study.group` of the study file."""


def read_results(folder: str | Path) -> Results:
    """The results of the study in a folder."""
    folder = Path(folder)
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        rows = [Row(**row, run_dir=folder / row["name"]) for row in record.pop("rows")]
        for name in ("axes", "over"):
            record[name] = tuple(record[name])
        return Results(**record, rows=tuple(rows))
    except FileNotFoundError:
        raise InputError(f"{folder}: holds no {RECORD_FILE}, so no study was run here") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{folder / RECORD_FILE}: is damaged ({error}); "
            "longctx study FILE --collect makes it anew"
        ) from None
    except OSError as error:
        raise OutsideError(f"{folder / RECORD_FILE}: cannot read: {error.strerror}") from None


def write_results(results: Results, folder: Path) -> None:
    """Writes the record and both tables, each at once or not at all."""
    record = asdict(results)
    for row in record["rows"]:
        del row["run_dir"]
    columns = table(results)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=1)
        write_whole(folder / RECORD_FILE, text.encode(), synced=False)
        write_whole(folder / CSV_FILE, _csv(columns).encode(errors="replace"), synced=False)
        _write_parquet(columns, folder / PARQUET_FILE)
    except OSError as error:
        raise OutsideError(f"{folder}: cannot write the results: {error.strerror}") from error


def table(results: Results) -> dict[str, list[Any]]:
    """The columns of the tables, by name, with an item a cell; None is an empty one."""
    rows = results.rows
    columns: dict[str, list[Any]] = {"cell": [row.name for row in rows]}
    columns |= {axis: [row.values[axis] for row in rows] for axis in results.axes}
    for name in ("status", "attempts", "is_best", "processes"):
        columns[name] = [getattr(row, name) for row in rows]
    columns |= {name: [row.summary.get(name) for row in rows] for name in SUMMARY_FIGURES}
    fields = dict.fromkeys(name for row in rows for name in row.config)
    columns |= {n: [row.config.get(n) for row in rows] for n in fields if n not in columns}
    columns["run_dir"] = [str(row.run_dir) for row in rows]
    return columns | {"error": [row.error for row in rows]}


def _csv(columns: dict[str, list[Any]]) -> str:
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*([_cell(item) for item in items] for items in columns.values())))
    return lines.getvalue()


def _cell(item: Any) -> Any:
    """An item as CSV has it; lists and truth values as JSON and TOML spell them."""
    return json.dumps(item) if isinstance(item, bool | list | dict) else item


def _write_parquet(columns: dict[str, list[Any]], file: Path) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        _warn_of_no_parquet()
        return
    arrays = {name: pyarrow.array(_of_one_type(items)) for name, items in columns.items()}
    content = pyarrow.table(arrays)
    write_whole(file, lambda sink: parquet.write_table(content, sink), synced=False)


def _of_one_type(items: list[Any]) -> list[Any]:
    """The items of a column, as JSON if they are neither numbers, nor texts, nor truth values."""
    kinds = {type(item) for item in items} - {type(None)}
    if kinds <= {int, float}:
        is_whole = float not in kinds and all(abs(n or 0) <= LARGEST_INTEGER for n in items)
        return [item if item is None or is_whole else float(item) for item in items]
    if kinds == {str}:
        return [item and item.encode(errors="replace").decode() for item in items]
    if kinds == {bool}:
        return items
    return [item if item is None else json.dumps(item) for item in items]


@functools.cache
def _warn_of_no_parquet() -> None:
    """Says it once, however often results are written."""
    sys.stderr.write("warning: no study.parquet, because pyarrow is not installed\n")
