"""Where the data come from: files become documents, documents are held out by name."""

import glob
import hashlib
import math
import os
import re
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from longctx.data.tokenizer import NUM_BYTES, ByteTokenizer
from longctx.errors import InputError, OutsideError

Split = Literal["train", "validation"]

MAX_EMBEDDED_BYTES = 2_000_000
FOREIGN_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
GLOB_CHARACTERS = "*?["


@dataclass(frozen=True)
class DataConfig:
    """The `[data]` table."""

    path: str = ""
    """Text file, folder or glob, one document a file; empty uses the Python standard library's
    sources."""
    validation_percent: int = 5
    """Share of the files, or of a task's sequences, held out, chosen by a hash of the relative name
    or the tokens; 1 to 50."""
    document_reset: bool = True
    """State, attention and positions restart at each document; false treats a packed sequence as
    one document."""
    task: Literal["", "mqar", "needle", "selective_copying"] = ""
    """Generate sequences instead of reading text: mqar asks for values of keys told first, needle
    at the end for values of keys hidden anywhere, selective_copying for letters between noise. Each
    sequence is one document; only answers count in the loss."""
    pairs: int = 8
    """Keys, with a value each, that a sequence of mqar or needle tells."""
    answers: int = 8
    """Answers that a sequence of a task asks for: different keys, or letters to copy."""
    vocabulary: int = 64
    """Different tokens of a task: half keys and half values, a third each of keys, values and hay,
    or noise, marker and letters."""
    skip_steps: tuple[str, ...] = ()
    """Steps whose batches are not trained on, such as 120-140; their numbers and learning rates
    pass."""

    def __post_init__(self) -> None:
        if not 1 <= self.validation_percent <= 50:
            raise InputError(
                f"data.validation_percent = {self.validation_percent}: choose 1 to 50 percent"
            )
        for text in self.skip_steps:
            _range_of_steps(text)
        if self.task:
            self._check_task()

    def skips(self, step: int) -> bool:
        """Whether the batch of a step, which counts from 1, is not trained on."""
        return any(step in _range_of_steps(text) for text in self.skip_steps)

    def _check_task(self) -> None:
        task, pairs, answers = self.task, self.pairs, self.answers
        if self.path:
            raise InputError(
                f"data.path = {self.path!r} and data.task = {task!r}: a task generates its own "
                "data; leave one of them empty"
            )
        if answers < 1:
            raise InputError(f"data.answers = {answers}: must be at least 1")
        if task != "selective_copying" and answers > pairs:
            raise InputError(
                f"data.answers = {answers} asks for more keys than data.pairs = {pairs}; "
                "lower answers or raise pairs"
            )
        least = {"mqar": 2 * pairs + 2, "needle": 3 * pairs, "selective_copying": 4}[task]
        if self.vocabulary < least:
            raise InputError(
                f"data.vocabulary = {self.vocabulary}: {task} needs at least {least}"
                + (f" for data.pairs = {pairs}" if least != 4 else "")
            )

    def check_length(self, seq_len: int) -> None:
        """Raises InputError if sequences are too short for the task."""
        is_copying = self.task == "selective_copying"
        told = self.answers if is_copying else 2 * self.pairs
        if self.task and told + self.answers > seq_len:
            pairs = "" if is_copying else f"data.pairs = {self.pairs} and "
            raise InputError(
                f"train.seq_len = {seq_len} is too short for {pairs}data.answers = "
                f"{self.answers}: {self.task} needs {told + self.answers} tokens"
            )


def _range_of_steps(text: str) -> range:
    found = re.fullmatch(r"([1-9][0-9]*)(?:-([1-9][0-9]*))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if first > last:
        raise InputError(
            f"data.skip_steps: {text!r} is neither a step nor a range such as 120-140 (on the "
            "command line: --data.skip_steps 120-140 200)"
        )
    return range(first, last + 1)


@dataclass(frozen=True)
class Document:
    """One non-empty file; `name` is its posix path relative to the corpus, the same anywhere."""

    name: str
    path: Path
    size: int


@dataclass(frozen=True)
class DocumentTokens:
    """Documents end to end: document d is `tokens[offsets[d]:offsets[d + 1]]`."""

    tokens: npt.NDArray[np.uint16]
    offsets: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Corpus:
    """The documents of a source, in the order of their names, and what is held out.

    A file is held out if the sha256 of its name, modulo 100, is below `validation_percent`. If
    that leaves validation (train) empty, the file with the smallest (largest) residue moves
    there. A corpus of one file is cut by position: its last `validation_percent` of bytes, at
    least one, are the validation document.
    """

    documents: tuple[Document, ...]
    validation_percent: int

    def load(self, split: Split) -> DocumentTokens:
        """Read and tokenize one split; all of it is held in memory, two bytes a token."""
        if len(self.documents) == 1:
            texts = [self._cut(_read(self.documents[0]), split)]
        else:
            texts = [_read(document) for document in self.select(split)]
        tokenizer = ByteTokenizer()
        pieces = [tokenizer.encode(text) for text in texts]
        offsets = np.zeros(len(pieces) + 1, dtype=np.int64)
        np.cumsum([len(piece) for piece in pieces], out=offsets[1:])
        return DocumentTokens(np.concatenate(pieces), offsets)

    def select(self, split: Split) -> tuple[Document, ...]:
        """The documents of one split of a corpus of several files."""
        order = sorted(self.documents, key=lambda document: (_residue(document), document.name))
        held_out = sum(_residue(document) < self.validation_percent for document in order)
        held_out = min(max(held_out, 1), len(order) - 1)
        chosen = order[:held_out] if split == "validation" else order[held_out:]
        return tuple(sorted(chosen, key=lambda document: document.name))

    def fingerprint(self) -> str:
        """sha256 over all names, sizes and contents; it changes if the data do."""
        digest = hashlib.sha256()
        for document in self.documents:
            text = _read(document)
            digest.update(os.fsencode(document.name) + b"\0" + len(text).to_bytes(8, "little"))
            digest.update(text)
        return digest.hexdigest()

    def _cut(self, text: bytes, split: Split) -> bytes:
        held_out = max(1, len(text) * self.validation_percent // 100)
        return text[-held_out:] if split == "validation" else text[:-held_out]


def open_corpus(config: DataConfig) -> Corpus:
    """Find the documents of `[data]`; reads names and sizes only."""
    found = _user_files(config.path) if config.path else _embedded_files()
    documents = tuple(
        Document(name, path, size) for name, path in sorted(found.items()) if (size := _size(path))
    )
    if sum(document.size for document in documents) < 2:
        raise InputError(f"data.path = {config.path!r}: needs 2 bytes of text; choose other files")
    return Corpus(documents, config.validation_percent)


def unigram_entropy(tokens: npt.NDArray[np.uint16]) -> float:
    """Entropy in nats of the distribution of single bytes; the document marks do not count.

    A model whose loss is not below it has learnt nothing from context.
    """
    counts = np.bincount(tokens, minlength=NUM_BYTES)[:NUM_BYTES]
    shares = counts[counts > 0] / counts.sum()
    return math.fsum(-shares * np.log(shares))


def _embedded_files() -> dict[str, Path]:
    base = Path(sysconfig.get_paths()["stdlib"])
    found = _named((path for path in base.rglob("*.py") if os.path.isfile(path)), base)
    return {
        name: path
        for name, path in found.items()
        if FOREIGN_FOLDERS.isdisjoint(name.split("/"))
        and os.access(path, os.R_OK)
        and _size(path) <= MAX_EMBEDDED_BYTES
    }


def _user_files(pattern: str) -> dict[str, Path]:
    """Files by name, relative to the folder or to the part of a glob before its first wildcard.

    Hidden files and folders are left out, as a glob does.
    """
    path = Path(pattern).expanduser()
    if os.path.isfile(path):
        return {path.name: path}
    if os.path.isdir(path):
        found = _named((file for file in path.rglob("*") if os.path.isfile(file)), path)
        return {name: file for name, file in found.items() if not _is_hidden(name)}
    matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
    if not matches:
        raise InputError(
            f"data.path = {pattern!r}: no such file, folder or glob match; "
            "leave it empty for the embedded source"
        )
    return _named((match for match in matches if os.path.isfile(match)), _fixed_folder(path))


def _fixed_folder(pattern: Path) -> Path:
    while any(character in str(pattern) for character in GLOB_CHARACTERS):
        pattern = pattern.parent
    return pattern


def _named(files: Iterable[Path], base: Path) -> dict[str, Path]:
    return {file.relative_to(base).as_posix(): file for file in files}


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _residue(document: Document) -> int:
    digest = hashlib.sha256(os.fsencode(document.name)).digest()
    return int.from_bytes(digest[:8], "big") % 100


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise OutsideError(f"{path}: cannot be read ({error.strerror}); check the disk") from error


def _read(document: Document) -> bytes:
    try:
        return document.path.read_bytes()
    except OSError as error:
        raise OutsideError(
            f"{document.path}: cannot be read ({error.strerror}); check its permissions"
        ) from error
