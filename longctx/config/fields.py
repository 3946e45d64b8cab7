"""The fields of a config: as nested tables, by dotted name, and compared."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from fnmatch import fnmatchcase
from typing import Any, get_args, get_type_hints

from longctx.config.names import join
from longctx.config.registry import Registered


def to_dict(config: object) -> dict[str, Any]:
    """The config as nested tables and lists, `kind` first, as `decode` reads it."""
    table: dict[str, Any] = _encode(config)
    return table


def _encode(value: Any) -> Any:
    if is_dataclass(value):
        table: dict[str, Any] = {"kind": value.kind} if isinstance(value, Registered) else {}
        return table | {field.name: _encode(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    return value


def leaves(value: Any, annotation: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Each field as (dotted name, type, value); the type of a `kind` is `Registered`."""
    if is_dataclass(value):
        if isinstance(value, Registered):
            yield join(path, "kind"), Registered, value.kind
        annotations = get_type_hints(type(value))
        for field in fields(value):
            inner = getattr(value, field.name)
            yield from leaves(inner, annotations[field.name], join(path, field.name))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, get_args(annotation)[1], join(path, key))
    elif isinstance(value, tuple) and any(is_dataclass(item) for item in value):
        for index, item in enumerate(value):
            yield from leaves(item, get_args(annotation)[0], join(path, str(index)))
    else:
        yield path, annotation, value


def flatten(config: object) -> dict[str, Any]:
    """Every field, and every `kind`, by dotted name."""
    return {name: value for name, _, value in leaves(config, type(config), "")}


def first_difference(
    before: object, after: object, names: Sequence[str], excluded: Sequence[str] = ()
) -> str | None:
    """The first field, with both values, in which two configs differ, or None.

    `names` and `excluded` hold dotted names of fields or whole tables, where `*` matches any text.
    """
    old, new = flatten(before), flatten(after)
    for name in old | new:
        if not _covers(names, name) or _covers(excluded, name):
            continue
        if name not in old or name not in new or old[name] != new[name]:
            shown = [repr(side[name]) if name in side else "absent" for side in (old, new)]
            return f"{name}: {shown[0]} -> {shown[1]}"
    return None


def _covers(patterns: Sequence[str], name: str) -> bool:
    return any(fnmatchcase(name, p) or fnmatchcase(name, f"{p}.*") for p in patterns)
