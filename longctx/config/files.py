"""TOML files: reading with `extends`, and writing a resolved config."""

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longctx.config.fields import to_dict
from longctx.config.names import join
from longctx.config.packaged import packaged
from longctx.errors import InputError


def load_table(path: str | Path) -> dict[str, Any]:
    """The table in a TOML file, merged over the file it names with `extends`."""
    return _load(Path(path), ())


def _load(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in (child.resolve() for child in children):
        chain = " -> ".join(map(str, (*children, path)))
        raise InputError(f"{children[0]}: extends forms a cycle: {chain}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        origin = f" (named by extends in {children[-1]})" if children else ""
        raise InputError(f"{path}: {error.strerror}{origin}") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None
    parent = table.pop("extends", None)
    if parent is None:
        return table
    if not isinstance(parent, str):
        raise InputError(f"{path}: extends = {parent!r}: expected a file name")
    return merge(_load(_find(parent, path), (*children, path)), table)


def _find(parent: str, child: Path) -> Path:
    """A file that is named from where the child is, or one that comes with longctx."""
    beside = child.parent / parent
    return beside if beside.is_file() else packaged(parent) or beside


def merge(parent: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    """The tables of `parent` with those of `child` over them; another `kind` replaces a table."""
    kinds = parent.get("kind"), child.get("kind")
    if all(isinstance(kind, str) for kind in kinds) and kinds[0] != kinds[1]:
        return child
    both_tables = {
        key: merge(parent[key], value)
        for key, value in child.items()
        if isinstance(value, dict) and isinstance(parent.get(key), dict)
    }
    return parent | child | both_tables


def to_toml(config: object) -> str:
    """The config as a TOML file that holds every field and decodes to an equal config."""
    return "\n\n".join(_toml_tables(to_dict(config), "")) + "\n"


def _toml_tables(table: dict[str, Any], path: str) -> Iterator[str]:
    values = [f"{k} = {_toml_value(v)}" for k, v in table.items() if not isinstance(v, dict)]
    if values or not table:
        yield "\n".join([f"[{path}]", *values] if path else values)
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _toml_tables(value, join(path, key))


def _toml_value(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{k} = {_toml_value(v)}' for k, v in value.items())} }}"
    return repr(value)
