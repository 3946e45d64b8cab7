"""`longctx data tokenize`: text to a folder of tokens, on all cores, resumable at any moment."""

import errno
import hashlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from longctx.data.options import PathOptions
from longctx.data.pieces import Batch, Totals
from longctx.data.stores import id_type
from longctx.data.texts import Part, Text, TextSource, open_texts, residue
from longctx.data.tokenizer import Tokenizer, open_tokenizer
from longctx.data.unfinished import Plan, Unfinished
from longctx.data.workers import cores, in_order
from longctx.errors import InputError, OutsideError

UNIT_BYTES = 2**20
"""Text that a process takes at a time, unless one part has more."""
BATCH_BYTES = 2**19
"""Text that a tokenizer is given at a time, unless one document has more."""


@dataclass(frozen=True)
class TokenizeConfig(PathOptions):
    """Options of `longctx data tokenize`."""

    output: str = ""
    """Folder that gets the tokens; one that an interrupted run of the same command left is
    completed."""
    tokenizer: str = ""
    """A tokenizer.json, a SentencePiece .model, a folder with one of them, or bytes; empty means
    bytes."""
    format: Literal["tokens", "megatron"] = "tokens"
    """tokens writes longctx's own folder; megatron writes tokens.bin and tokens.idx as
    megatron-core does."""
    workers: int = 0
    """Processes that tokenize; 0 means one for each core. The result does not depend on it."""
    shard_tokens: int = 2**28
    """Tokens from which a file is complete and the next one starts."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise InputError(f"--workers = {self.workers}: must be 1 or more, or 0 for all cores")
        if self.shard_tokens < 1:
            raise InputError(f"--shard_tokens = {self.shard_tokens}: must be at least 1")


@dataclass(frozen=True)
class Tokenized:
    """What a run of the command did."""

    totals: Totals
    """Of the whole folder."""
    new: Totals
    """Of what this run tokenized."""
    seconds: float
    workers: int


def tokenize(path: str, config: TokenizeConfig, show: bool = False) -> Tokenized:
    """Tokenizes the text at a path, or what an interrupted run has left of it.

    The files are the same, byte for byte, whatever the number of workers and however often a run
    was killed on the way. `show` draws a progress bar.
    """
    if not config.output:
        raise InputError("longctx data tokenize needs --output FOLDER")
    if config.tokenizer.startswith("ids:"):
        raise InputError(f"--tokenizer {config.tokenizer}: stands for no text; name a file")
    if config.format == "megatron" and not _has_megatron():
        raise InputError("--format megatron needs pip install 'longctx[megatron]'")
    tokenizer = open_tokenizer(config.tokenizer)
    source = open_texts(config.source(path))
    plan = _plan(path, config, source, tokenizer)
    output = Path(config.output).expanduser()
    _check_outside(output, source)
    try:
        with closing(Unfinished(output, plan)) as folder:
            return _complete(folder, source, tokenizer, config.workers or cores(), show)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise OutsideError(
            f"--output {config.output}: cannot be written ({error.strerror}); "
            f"{'free some space' if is_full else 'mend that'} and run the same command again"
        ) from error


def _complete(
    folder: Unfinished, source: TextSource, tokenizer: Tokenizer, workers: int, show: bool
) -> Tokenized:
    started, new = time.perf_counter(), Totals()
    if folder.is_finished:
        return Tokenized(folder.totals, new, 0.0, workers)
    units = units_of(source.parts)

    def work(unit: int) -> Totals:
        return folder.write_piece(unit, _batches(source, tokenizer, units[unit]))

    begun = {unit: folder.done(unit) for unit in range(folder.next_unit, len(units))}
    missing = [unit for unit, totals in begun.items() if totals is None]
    results = in_order(work, missing, workers)
    with closing(results), _Bar([_size(unit) for unit in units], show) as bar:
        bar.advance(range(folder.next_unit))
        for unit, totals in begun.items():
            if totals is None:
                _, totals = next(results)
                new = new.plus(totals)
            folder.add(unit, totals)
            bar.advance([unit])
    folder.finish(tokenizer)
    return Tokenized(folder.totals, new, time.perf_counter() - started, workers)


def _check_outside(output: Path, source: TextSource) -> None:
    """InputError if the tokens would be among the texts when the command is given again."""
    path = Path(source.source.path).expanduser()
    if source.source.path and path.is_dir() and output.resolve().is_relative_to(path.resolve()):
        raise InputError(
            f"--output {output}: lies in {path}, of which all files are read; choose a folder "
            "beside it, or name the texts with a glob"
        )


def _has_megatron() -> bool:
    try:
        return find_spec("megatron.core") is not None
    except ModuleNotFoundError:
        return False


def units_of(parts: Sequence[Part]) -> list[list[Part]]:
    """Parts of a source, put together where they are small."""
    units: list[list[Part]] = [[]]
    for part in parts:
        if _size(units[-1]) >= UNIT_BYTES:
            units.append([])
        units[-1].append(part)
    return units


def _size(parts: Sequence[Part]) -> int:
    return sum(part.size for part in parts)


def _plan(path: str, config: TokenizeConfig, source: TextSource, tokenizer: Tokenizer) -> Plan:
    digest = hashlib.sha256()
    for part in source.parts:
        digest.update(f"{part.name}\n{part.size}\n".encode(errors="surrogateescape"))
    return Plan(
        tokenizer=tokenizer.fingerprint,
        tokenizer_name=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        dtype=np.dtype(id_type(tokenizer.vocab_size)).name,
        path=path,
        column=config.column,
        texts=digest.hexdigest(),
        shard_tokens=config.shard_tokens,
        format=config.format,
    )


def _batches(source: TextSource, tokenizer: Tokenizer, parts: Sequence[Part]) -> Iterator[Batch]:
    texts: list[Text] = []
    size, skipped = 0, source.skipped
    for text in chain.from_iterable(map(source.read, parts)):
        texts.append(text)
        size += len(text.content)
        if size >= BATCH_BYTES:
            yield _batch(tokenizer, texts, source.skipped - skipped)
            texts, size, skipped = [], 0, source.skipped
    yield _batch(tokenizer, texts, source.skipped - skipped)


def _batch(tokenizer: Tokenizer, texts: list[Text], skipped: int) -> Batch:
    contents = [text.content for text in texts]
    residues = [residue(text.name) for text in texts]
    ids = tokenizer.encode_batch(contents) if contents else []
    return Batch(ids, residues, sum(map(len, contents)), skipped)


class _Bar:
    """How much of the text is done."""

    def __init__(self, sizes: list[int], show: bool) -> None:
        self._sizes = sizes
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(file=sys.stdout), disable=not show)
        self._task = self._progress.add_task("text", total=sum(sizes))

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self._progress.stop()

    def advance(self, units: Iterable[int]) -> None:
        """These units are done."""
        self._progress.advance(self._task, sum(self._sizes[unit] for unit in units))
