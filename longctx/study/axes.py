"""The axes of a study: what a study file varies, each value with its piece of config."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from longctx.errors import InputError
from longctx.study.results import COLUMNS

Table = dict[str, Any]
TABLES = ("cells", "variants", "grid")
"""Tables of `[study]` that hold axes, in the order of the axes."""
KINDS = {
    "size": {"width", "depth", "size", "sizes", "scale", "parameters"},
    "rate": {"lr", "learning_rate", "rate"},
    "seed": {"seed", "seeds"},
    "length": {"seq_len", "length", "lengths", "context"},
    "tokens": {"steps", "stop_after", "tokens", "duration"},
    "batch": {"batch_size", "micro_batch", "batch"},
    "processes": {"dp", "sp", "tp", "processes", "ranks"},
}
"""What axes are about by the last part of their names; others tell models or tasks apart."""
LONGEST_LABEL = 40
PLAIN = re.compile(r"[\w.+-]+", re.ASCII)
"""Texts that stay as they are in the name of a folder; others become a number made of them."""


@dataclass(frozen=True)
class Choice:
    """A value of an axis, and what it sets."""

    value: Any
    piece: Table


Axis = dict[str, Choice]
"""Choices by what they are called in the names of cells."""


def read_axes(own: Table) -> dict[str, Axis]:
    """Takes the axes out of a `[study]` table: each has a value, and no field is set by two."""
    cells, variants, grid = (own.pop(name, None) for name in TABLES)
    axes: dict[str, Axis] = {} if cells is None else {"cells": _cells(cells)}
    for name, axis in _table(variants or {}, "study.variants").items():
        where = f"study.variants.{name}"
        pieces = _table(axis, where).items()
        _add(axes, name, {key: Choice(key, _table(p, f"{where}.{key}")) for key, p in pieces})
    for name, values in leaves(_table(grid or {}, "study.grid")):
        if not isinstance(values, list):
            raise InputError(f"study.grid.{name} = {values!r}: expected a list of values")
        labels = [label(name, value) for value in values]
        if len(set(labels)) < len(labels):
            raise InputError(f"study.grid.{name} = {values}: holds a value twice")
        _add(axes, name, {key: Choice(v, _nested(name, v)) for key, v in zip(labels, values)})
    empty = [name for name, axis in axes.items() if not axis]
    if empty or not axes:
        raise InputError(
            f"the study is empty{f': axis {empty[0]} has no value' if empty else ''}; "
            "give [study.variants.AXIS.NAME] tables, lists in [study.grid] or [[study.cells]]"
        )
    _check_fields(axes)
    return axes


def kind_of(axis: str) -> str:
    """What an axis is about, or nothing of KINDS."""
    last = axis.rpartition(".")[2].lower()
    return next((kind for kind, names in KINDS.items() if last in names), "")


def leaves(table: Table, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in nested tables, by dotted name."""
    for key, value in table.items():
        name = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            yield from leaves(value, name)
        else:
            yield name, value


def label(field: str, value: Any) -> str:
    """What a field with this value is called in the name of a folder."""
    items = value if isinstance(value, list) else [value]
    words = [item if isinstance(item, str) else json.dumps(item, default=str) for item in items]
    text = "_".join(words)
    if not all(PLAIN.fullmatch(word) for word in words) or len(text) > LONGEST_LABEL:
        text = hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:8]
    return f"{field.rpartition('.')[2]}{text}"


def _cells(pieces: Any) -> Axis:
    """The axis of `[[study.cells]]`, whose pieces may have a name."""
    if not isinstance(pieces, list) or not all(isinstance(piece, dict) for piece in pieces):
        raise InputError(f"study.cells = {pieces!r}: expected tables, [[study.cells]]")
    axis: Axis = {}
    for number, piece in enumerate(pieces):
        table = dict(piece)
        name = table.pop("name", "-".join(label(*leaf) for leaf in leaves(table)))
        if not isinstance(name, str) or not name:
            raise InputError(f"study.cells.{number} sets nothing: give it a field or a name")
        if name in axis:
            raise InputError(
                f"study.cells.{number}: {name} is the name of another; change its name"
            )
        axis[name] = Choice(name, table)
    return axis


def _add(axes: dict[str, Axis], name: str, axis: Axis) -> None:
    if name in axes:
        raise InputError(f"two axes have the name {name}; change one of them")
    if name in COLUMNS:
        raise InputError(f"axis {name}: a column of the results has this name; choose another")
    axes[name] = axis


def _check_fields(axes: dict[str, Axis]) -> None:
    owners: dict[str, str] = {"run.name": "the study", "run.dir": "the study"}
    for name, axis in axes.items():
        fields = {key for choice in axis.values() for key, _ in leaves(choice.piece)}
        for key in sorted(fields):
            if key in owners:
                raise InputError(f"{key} is set by {owners[key]} and by axis {name}; choose one")
        owners |= dict.fromkeys(fields, f"axis {name}")


def _table(value: Any, where: str) -> Table:
    if not isinstance(value, dict):
        raise InputError(f"{where} = {value!r}: expected a table")
    return value


def _nested(name: str, value: Any) -> Table:
    """The tables in which the field of this dotted name has this value."""
    first, _, rest = name.partition(".")
    return {first: _nested(rest, value) if rest else value}
