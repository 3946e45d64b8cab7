"""What a study file says: a config, and axes whose every combination is a cell of the study.

The file is a config like any other (it may extend one) with a table `[study]`, in which
`[study.variants.AXIS.NAME]` is a piece of config that goes over the rest under that name,
`[study.grid]` lists values of single fields, `optim.lr = [1e-3, 3e-3]`, and `[[study.cells]]` is a
list of pieces that are one axis together.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal

from longctx.config import apply_overrides, decode, find_config, flatten, load_table, merge, to_toml
from longctx.config.names import suggest
from longctx.errors import InputError
from longctx.launch.slurm import SlurmConfig
from longctx.study.axes import Axis, Choice, Table, leaves, read_axes
from longctx.study.results import CONFIG_FIELDS, FILES
from longctx.train.prepare import settle_mesh
from longctx.train.settings import Settings

LONGEST_NAME = 120
"""Bytes of the name of a cell."""


@dataclass(frozen=True)
class BestConfig:
    """The `[study.best]` table: axes that are swept, of whose values only the best counts."""

    over: tuple[str, ...] = ()
    """Axes that are swept, such as optim.lr: for each combination of the others, one of their
    values is best, by the mean over seeds."""
    by: Literal["val_loss", "val_accuracy"] = "val_loss"
    """The figure by which a cell is best: the smallest loss or the largest accuracy."""


@dataclass(frozen=True)
class StudyConfig:
    """The `[study]` table, but for its axes."""

    name: str = "study"
    """Name of the study."""
    dir: str = ""
    """Folder of the results and of a run directory a cell; empty means runs/<name>."""
    workers: int = 1
    """Processes that train at a time, each with one thread and a GPU, as far as there are any. A
    cell takes parallel.dp x sp x tp of them; one that needs more runs alone."""
    retry_failed: bool = False
    """Try cells again that failed twice; else they are left as they are."""
    plot: Literal["val_accuracy", "val_loss"] = "val_accuracy"
    """What the picture shows over the first axis, with a line for each value of the second."""
    group: str = ""
    """Axis whose values are the lines and colours of the report; empty chooses one."""
    best: BestConfig = field(default_factory=BestConfig)
    """A sweep, such as one of learning rates."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    """Jobs of --submit: options of longctx launch slurm. nodes is the most that a cell gets, array
    the most cells at a time, with 0 for all."""

    def __post_init__(self) -> None:
        if not self.name.isprintable() or "/" in self.name or self.name[:1] in ("", "."):
            raise InputError(f"study.name = {self.name!r}: must be a plain file name")
        if self.workers < 1:
            raise InputError(f"study.workers = {self.workers}: must be at least 1")

    @property
    def path(self) -> Path:
        """The folder of the study."""
        return Path(self.dir or f"runs/{self.name}")


@dataclass(frozen=True)
class Options:
    """What the command line of `longctx study` may change."""

    study: StudyConfig = field(default_factory=StudyConfig)
    """The `[study]` table of the file."""


@dataclass(frozen=True)
class Cell:
    """One run of a study; `values` says by axis what is its own."""

    name: str
    values: dict[str, Any]
    settings: Settings
    config: dict[str, Any]
    """What tables tell of its settings, by dotted name; None where there is no such field."""

    @property
    def processes(self) -> int:
        """Processes that train it."""
        parallel = self.settings.parallel
        return (parallel.dp or 1) * parallel.sp * parallel.tp


@dataclass(frozen=True)
class Study:
    """A study file, resolved."""

    config: StudyConfig
    axes: tuple[str, ...]
    cells: tuple[Cell, ...]


def load_study(name: str | Path, argv: Sequence[str] = ()) -> Study:
    """Reads a study file, or the packaged one of that name, and checks every cell, so that nothing
    starts if one is a mistake."""
    path = find_config(name, "study")
    table = load_table(path)
    own = table.pop("study", None)
    if not isinstance(own, dict):
        raise InputError(f"{path}: has no table [study]; longctx train runs a plain config")
    try:
        axes = read_axes(own)
        options = decode(Options, {"study": own})
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    config = apply_overrides(options, argv, "longctx study").study
    try:
        _check_axes(config, axes)
        pairs = itertools.product(*(axis.items() for axis in axes.values()))
        cells = [_cell(config, table, dict(zip(axes, chosen))) for chosen in pairs]
        _check_apart(cells)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return Study(config, tuple(axes), tuple(cells))


def _cell(config: StudyConfig, base: Table, chosen: dict[str, tuple[str, Choice]]) -> Cell:
    """The cell of these choices, which stand by axis with what they are called."""
    name = _shorten("-".join(called for called, _ in chosen.values()))
    if name in FILES or not name.isprintable():
        raise InputError(
            f"cell {name!r}: cannot be the name of a folder here; rename a variant or a value"
        )
    # Pieces first, so that a field beside a kind is kept in whatever order they come.
    own = reduce(merge, (choice.piece for _, choice in chosen.values()), Table())
    table = merge(merge({"log": {"group": config.name, "job_type": "cell"}}, base), own)
    table = merge(table, {"run": {"name": name, "dir": str(config.path / name)}})
    settings = decode(Settings, table, file=f"cell {name}")
    resolved, set_here = flatten(settings), dict(leaves(own))
    fields = (*CONFIG_FIELDS, *set_here)
    values = {axis: choice.value for axis, (_, choice) in chosen.items()}
    cell = Cell(name, values, settings, {n: resolved.get(n, set_here.get(n)) for n in fields})
    try:
        settle_mesh(settings, cell.processes)
    except InputError as error:
        raise InputError(
            f"cell {name}, on {cell.processes} processes (parallel.dp x sp x tp): {error}"
        ) from None
    return cell


def _shorten(name: str) -> str:
    """A name that a file system takes: the end of a long one becomes a number made of the whole."""
    encoded = name.encode()
    if len(encoded) <= LONGEST_NAME:
        return name
    start = encoded[:LONGEST_NAME].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(encoded).hexdigest()[:8]}"


def _check_axes(config: StudyConfig, axes: dict[str, Axis]) -> None:
    for field_name, named in (("best.over", config.best.over), ("group", (config.group,))):
        for axis in filter(None, named):
            if axis not in axes:
                raise InputError(
                    f"study.{field_name}: {axis!r} is no axis of the study{suggest(axis, axes)} "
                    f"(axes: {', '.join(axes)})"
                )


def _check_apart(cells: Sequence[Cell]) -> None:
    """InputError if two cells have a name, or all fields, in common."""
    counts = Counter(cell.name for cell in cells)
    if twice := next((name for name, count in counts.items() if count > 1), None):
        raise InputError(f"two cells have the name {twice}; rename a variant or a value")
    runs: dict[str, str] = {}
    for cell in cells:
        fields = to_toml(replace(cell.settings, run=replace(cell.settings.run, name="_", dir="")))
        if twin := runs.get(fields):
            raise InputError(
                f"cells {twin} and {cell.name} are the same run; leave out one of them"
            )
        runs[fields] = cell.name
