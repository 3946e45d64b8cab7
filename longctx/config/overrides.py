"""Command line overrides of a decoded config."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NoReturn, get_args, get_origin

import tyro

from longctx.config.decoding import EXPECTED, Config, decode, decode_value
from longctx.config.fields import leaves, to_dict
from longctx.config.names import suggest
from longctx.config.registry import Registered
from longctx.errors import InputError

_TRUTH = {"true": True, "True": True, "false": False, "False": False}


def apply_overrides(config: Config, argv: Sequence[str], prog: str) -> Config:
    """The config with `--table.key value` options applied; `--help` lists them and exits.

    A list takes any number of words. A `kind` cannot be changed: it decides which options exist.
    """
    if "--help" in argv or "-h" in argv:
        _print_help(config, prog)
    table = to_dict(config)
    annotations = {name: annotation for name, annotation, _ in leaves(config, type(config), "")}
    for name, words in _split_options(argv):
        if name not in annotations:
            nearest = suggest(f"--{name}", (f"--{known}" for known in annotations))
            raise InputError(f"--{name} is not a known option{nearest} (all: {prog} --help)")
        if annotations[name] is Registered:
            raise InputError(f"--{name}: a kind is chosen in the config file, not by an option")
        value = _parse(annotations[name], words, f"--{name}")
        decode_value(annotations[name], value, f"--{name}")
        _assign(table, name, value)
    return decode(type(config), table, file="command line")


def _print_help(config: object, prog: str) -> NoReturn:
    markers = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    cli = partial(tyro.cli, prog=prog, config=markers, use_underscores=True)
    cli(type(config), default=config, args=["--help"])
    raise AssertionError("tyro exits after printing help")


def _split_options(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    options: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            options.append((name, [value] if equals else []))
        elif options:
            options[-1][1].append(word)
        else:
            raise InputError(f"{word!r}: expected an option such as --table.key value")
    return options


def _parse(annotation: Any, words: list[str], option: str) -> Any:
    """The TOML value that words on a command line stand for; the decoder judges it."""
    if get_origin(annotation) is tuple:
        return [_parse_word(get_args(annotation)[0], word) for word in words]
    if len(words) != 1:
        raise InputError(f"{option} takes one value, not {len(words)}")
    return _parse_word(annotation, words[0])


def _parse_word(annotation: Any, word: str) -> Any:
    if get_origin(annotation) is Literal:
        return {str(choice): choice for choice in get_args(annotation)}.get(word, word)
    if annotation is bool:
        return _TRUTH.get(word, word)
    try:
        return annotation(word) if annotation in EXPECTED else word
    except ValueError:
        return word


def _assign(table: dict[str, Any], name: str, value: Any) -> None:
    *parents, last = name.split(".")
    node: Any = table
    for key in parents:
        node = node[int(key)] if isinstance(node, list) else node[key]
    node[last] = value
