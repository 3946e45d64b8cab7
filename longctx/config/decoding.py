"""Strict decoding of tables into frozen dataclasses."""

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import partial
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from longctx.config.names import join, suggest
from longctx.config.registry import Registered
from longctx.errors import InputError

Config = TypeVar("Config")

EXPECTED = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
_TABLE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def decode(cls: type[Config], table: Mapping[str, Any], path: str = "", file: str = "") -> Config:
    """Build a dataclass from a table, refusing unknown, missing and mistyped fields.

    `path` is the dotted name of the table and `file` its source, both for messages.
    """
    try:
        config: Config = decode_value(cls, table, path)
    except InputError as error:
        raise InputError(f"{file}: {error}" if file else str(error)) from None
    return config


def decode_value(annotation: Any, value: Any, path: str) -> Any:
    """The value as the type of its field asks for it; `path` names the field in messages."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return _decode_choice(arguments, value, path)
    if annotation in EXPECTED:
        return _decode_scalar(annotation, value, path)
    if origin is tuple and arguments[1:] == (...,):
        items = _require(list, annotation, value, path)
        names = (f"{path}.{index}" for index in range(len(items)))
        return tuple(map(partial(decode_value, arguments[0]), items, names))
    if origin is dict and arguments[0] is str:
        return _decode_dict(arguments[1], _require(dict, annotation, value, path), path)
    if isinstance(annotation, type) and issubclass(annotation, Registered):
        return _decode_member(annotation, dict(_require(dict, annotation, value, path)), path)
    if isinstance(annotation, type) and is_dataclass(annotation):
        return _decode_dataclass(annotation, _require(dict, annotation, value, path), path)
    raise TypeError(f"{path}: a config field cannot have type {annotation}")


def _decode_scalar(annotation: type, value: Any, path: str) -> Any:
    if annotation is float and type(value) is int:
        return float(value)
    if type(value) is float and math.isnan(value):
        _refuse(annotation, value, path)
    return _require(annotation, annotation, value, path)


def _decode_choice(choices: tuple[Any, ...], value: Any, path: str) -> Any:
    if any(type(choice) is type(value) and choice == value for choice in choices):
        return value
    listed = ", ".join(map(repr, choices))
    nearest = suggest(str(value), map(str, choices))
    raise InputError(f"{path} = {value!r}: expected one of {listed}{nearest}")


def _decode_dict(annotation: Any, table: dict[str, Any], path: str) -> dict[str, Any]:
    for key in table:
        if not _TABLE_KEY.fullmatch(key):
            raise InputError(f"{path}: key {key!r}: expected letters, digits, _ and - only")
    return {key: decode_value(annotation, value, f"{path}.{key}") for key, value in table.items()}


def _decode_member(family: type[Registered], table: dict[str, Any], path: str) -> Any:
    kinds = family.kinds()
    registered = f"(registered: {', '.join(sorted(kinds))})"
    name = join(path, "kind")
    if "kind" not in table:
        raise InputError(f"{name} is missing {registered}")
    kind = table.pop("kind")
    if not isinstance(kind, str) or kind not in kinds:
        nearest = suggest(str(kind), kinds)
        raise InputError(f"{name} = {kind!r}: not a known kind{nearest} {registered}")
    return _decode_dataclass(kinds[kind], table, path)


def _decode_dataclass(cls: type[Any], table: dict[str, Any], path: str) -> Any:
    annotations = get_type_hints(cls)
    known = {field.name: annotations[field.name] for field in fields(cls)}
    for key in table:
        if key not in known:
            nearest = suggest(join(path, key), (join(path, name) for name in known))
            listed = f"(known: {', '.join(known)})"
            raise InputError(f"{join(path, key)} is not a known field{nearest} {listed}")
    for field in fields(cls):
        required = field.default is MISSING and field.default_factory is MISSING
        if required and field.name not in table:
            expected = _expected(known[field.name])
            raise InputError(f"{join(path, field.name)} is missing: expected {expected}")
    values = {key: decode_value(known[key], value, join(path, key)) for key, value in table.items()}
    return cls(**values)


def _require(wanted: type, annotation: Any, value: Any, path: str) -> Any:
    if type(value) is not wanted:
        _refuse(annotation, value, path)
    return value


def _refuse(annotation: Any, value: Any, path: str) -> NoReturn:
    raise InputError(f"{path} = {value!r}: expected {_expected(annotation)}")


def _expected(annotation: Any) -> str:
    if annotation in EXPECTED:
        return EXPECTED[annotation]
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(map(repr, get_args(annotation)))}"
    if get_origin(annotation) is tuple:
        return f"a list, each item {_expected(get_args(annotation)[0])}"
    return "a table"
