"""What a study file says: a config, and axes whose every combination is a cell of the study.

The file is a config like any other (it may extend one) with a table `[study]`, in which
`[study.variants.AXIS.NAME]` is a piece of config that goes over the rest under that name, and
`[study.grid]` lists values of single fields: `optim.lr = [1e-3, 3e-3]`.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from longctx.config import apply_overrides, decode, load_table, merge
from longctx.errors import InputError
from longctx.train.settings import Settings

Table = dict[str, Any]
Axis = dict[str, Table]
"""Pieces of config by what they are called in the names of cells."""


AXES = ("variants", "grid")


@dataclass(frozen=True)
class StudyConfig:
    """The `[study]` table, but for its axes in `[study.variants]` and `[study.grid]`."""

    name: str = "study"
    """Name of the study."""
    dir: str = ""
    """Folder of the results and of a run directory a cell; empty means runs/<name>."""
    workers: int = 1
    """Cells that are trained at a time, each by a process with one thread."""
    plot: Literal["val_accuracy", "val_loss"] = "val_accuracy"
    """What the picture shows over the first axis, with a line for each value of the second."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
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


@dataclass(frozen=True)
class Cell:
    """One run of a study; `values` says by axis what is its own."""

    name: str
    values: dict[str, str]
    settings: Settings


@dataclass(frozen=True)
class Study:
    """A study file, resolved."""

    config: StudyConfig
    axes: tuple[str, ...]
    cells: tuple[Cell, ...]


def load_study(path: str | Path, argv: Sequence[str] = ()) -> Study:
    """Reads a study file and checks every cell, so that nothing starts if one is a mistake."""
    table = load_table(path)
    own = table.pop("study", None)
    if not isinstance(own, dict):
        raise InputError(f"{path}: has no table [study]; longctx train runs a plain config")
    try:
        axes = _axes(*(_table(own.pop(name, {}), f"study.{name}") for name in AXES))
        options = decode(Options, {"study": own})
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    config = apply_overrides(options, argv, "longctx study").study
    cells = [
        _cell(config, table, axes, names, str(path)) for names in itertools.product(*axes.values())
    ]
    names = [cell.name for cell in cells]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{path}: two cells have the name {twice}; rename a variant or a value")
    return Study(config, tuple(axes), tuple(cells))


def _cell(
    config: StudyConfig, base: Table, axes: dict[str, Axis], names: tuple[str, ...], file: str
) -> Cell:
    name, table = "-".join(names), merge({"log": {"group": config.name, "job_type": "cell"}}, base)
    for axis, value in zip(axes.values(), names, strict=True):
        table = merge(table, axis[value])
    table = merge(table, {"run": {"name": name, "dir": str(config.path / name)}})
    settings = decode(Settings, table, file=f"{file}, cell {name}")
    return Cell(name, dict(zip(axes, names, strict=True)), settings)


def _axes(variants: Table, grid: Table) -> dict[str, Axis]:
    """All axes in the order of the file, each with at least one value, no field set by two."""
    axes: dict[str, Axis] = {}
    for name, axis in variants.items():
        where = f"study.variants.{name}"
        axes[name] = {
            value: _table(piece, f"{where}.{value}") for value, piece in _table(axis, where).items()
        }
    for name, values in _leaves(grid, ""):
        if not isinstance(values, list):
            raise InputError(f"study.grid.{name} = {values!r}: expected a list of values")
        labels = [f"{name.rpartition('.')[2]}{value}" for value in values]
        if len(set(labels)) < len(labels):
            raise InputError(f"study.grid.{name} = {values}: holds a value twice")
        axes[name] = {label: _nested(name, value) for label, value in zip(labels, values)}
    empty = [name for name, axis in axes.items() if not axis]
    if empty or not axes:
        raise InputError(
            f"the study is empty{f': axis {empty[0]} has no value' if empty else ''}; "
            "give [study.variants.AXIS.NAME] tables or lists in [study.grid]"
        )
    _check_fields(axes)
    return axes


def _check_fields(axes: dict[str, Axis]) -> None:
    owners: dict[str, str] = {"run.name": "the study", "run.dir": "the study"}
    for name, axis in axes.items():
        fields = {key for piece in axis.values() for key, _ in _leaves(piece, "")}
        for key in sorted(fields):
            if key in owners:
                raise InputError(f"{key} is set by {owners[key]} and by axis {name}; choose one")
        owners |= dict.fromkeys(fields, f"axis {name}")


def _table(value: Any, where: str) -> Table:
    if not isinstance(value, dict):
        raise InputError(f"{where} = {value!r}: expected a table")
    return value


def _leaves(table: Table, path: str) -> Iterator[tuple[str, Any]]:
    """Every value in nested tables, by dotted name."""
    for key, value in table.items():
        name = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            yield from _leaves(value, name)
        else:
            yield name, value


def _nested(name: str, value: Any) -> Table:
    """The tables in which the field of this dotted name has this value."""
    first, _, rest = name.partition(".")
    return {first: _nested(rest, value) if rest else value}
