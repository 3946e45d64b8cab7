"""`longctx data`: one function a subcommand."""

import re
import sys
from collections.abc import Callable, Iterable

from longctx.config import apply_overrides
from longctx.errors import InputError

Rows = Iterable[tuple[str, str]]

OPTIONS = {
    'data.bad_rows = "skip"': "--bad_rows skip",
    "data.format": "--read_as",
    "data.path": "PATH",
}
"""What fields of the `[data]` table are called on the command line; others keep their name."""


def tokenize(path: str, argv: list[str]) -> None:
    """PATH --output FOLDER [--tokenizer FILE ...]: text to tokens, on all cores, resumable"""
    from longctx.data.tokenize import TokenizeConfig
    from longctx.data.tokenize import tokenize as run

    config = apply_overrides(TokenizeConfig(), argv, "longctx data tokenize")
    done = run(path, config, show=sys.stdout.isatty())
    totals = done.totals
    _say(
        f"{config.output}: {totals.documents:,} documents, {totals.tokens:,} tokens; "
        f"{totals.skipped:,} rows or files without text left out\n"
    )
    if done.seconds:
        tokens, size = (count / done.seconds for count in (done.new.tokens, done.new.text_bytes))
        sys.stdout.write(
            f"{done.seconds:.1f} s with {done.workers} processes: {tokens:,.0f} tokens/s, "
            f"{size / 1e6:,.1f} MB/s\n"
        )
    else:
        sys.stdout.write("it was complete before\n")


def inspect(path: str, argv: list[str]) -> None:
    """PATH [--documents N ...]: what it is, checked, and how it begins"""
    from longctx.data.inspect import InspectConfig
    from longctx.data.inspect import inspect as look

    _print(look(path, apply_overrides(InspectConfig(), argv, "longctx data inspect")))


def stats(path: str, argv: list[str]) -> None:
    """PATH [--seq_len N ...]: lengths of documents, and padding under each packing"""
    from longctx.data.statistics import StatsConfig
    from longctx.data.statistics import stats as count

    _print(count(path, apply_overrides(StatsConfig(), argv, "longctx data stats")))


def train_tokenizer(path: str, argv: list[str]) -> None:
    """PATH --output FILE.json [--vocab_size N ...]: learn a byte-level BPE tokenizer"""
    from longctx.data.vocabulary import TrainTokenizerConfig
    from longctx.data.vocabulary import train_tokenizer as learn

    config = apply_overrides(TrainTokenizerConfig(), argv, "longctx data train-tokenizer")
    done = learn(path, config)
    _say(f"{config.output}: {done.vocab_size:,} tokens, learnt from {done.text_bytes:,} bytes\n")


SUBCOMMANDS: dict[str, Callable[[str, list[str]], None]] = {
    "tokenize": tokenize,
    "inspect": inspect,
    "stats": stats,
    "train-tokenizer": train_tokenizer,
}


def run(argv: list[str]) -> int:
    """Runs a subcommand; no path means the Python standard library's sources."""
    if not argv or argv[0] in ("--help", "-h"):
        sys.stdout.write(_usage())
        return 0
    name, *options = argv
    if name not in SUBCOMMANDS:
        known = ", ".join(SUBCOMMANDS)
        raise InputError(f"longctx data {name}: no such subcommand; there are {known}")
    path = options.pop(0) if options and not options[0].startswith("-") else ""
    if path and options and not options[0].startswith("-"):
        raise InputError(
            f"longctx data {name} takes one PATH, not {path} and {options[0]}: quote a glob so "
            "that the shell leaves it alone"
        )
    try:
        SUBCOMMANDS[name](path, options)
    except InputError as error:
        raise InputError(_in_words_of_options(str(error))) from error
    return 0


def _in_words_of_options(message: str) -> str:
    for field, option in OPTIONS.items():
        message = message.replace(field, option)
    return re.sub(r"\bdata\.(?=(column|subset|split|tokenizer)\b)", "--", message)


def _print(rows: Rows) -> None:
    """All rows, once all are known: what is refused prints nothing."""
    table = list(rows)
    width = max(len(label) for label, _ in table)
    _say("".join(f"{label:{width}}  {value}\n" for label, value in table))


def _say(text: str) -> None:
    """Prints a text, whatever names are in it that a terminal cannot show."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))


def _usage() -> str:
    lines = ["usage: longctx data COMMAND [PATH] ...", ""]
    lines += [f"  {name:16} {command.__doc__}" for name, command in SUBCOMMANDS.items()]
    lines += ["", "Without PATH it is the Python standard library's sources.", ""]
    return "\n".join([*lines, "longctx data COMMAND --help lists the options of a command", ""])
