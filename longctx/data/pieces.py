"""A piece: the tokens of one unit of text, until they are part of a shard.

A file of ids end to end, the index of their documents, numbers, and the sha256 of all that.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from longctx.data.folder import Index, read_index, write_index
from longctx.data.stores import Ids
from longctx.files import write_whole

COPIED = 2**23
"""Bytes that are read at once."""
TRAILER = 5 * 8
"""Bytes of the numbers: the totals, and how many bytes of ids there are."""
HASH_BYTES = 32


class Batch(NamedTuple):
    """Some documents, in their order."""

    ids: list[Ids]
    residues: list[int]
    text_bytes: int
    skipped: int
    """Rows before the end of this batch that gave no document."""


class Totals(NamedTuple):
    """What some text became."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    skipped: int = 0

    def plus(self, other: "Totals") -> "Totals":
        """Of both."""
        return Totals(*(a + b for a, b in zip(self, other)))


class Piece(NamedTuple):
    """What a piece says of its ids, which are its first `ids_bytes` bytes."""

    totals: Totals
    ids_bytes: int
    index: Index


def write_piece(path: Path, dtype: np.dtype, batches: Iterable[Batch]) -> Totals:
    """Writes documents; those without tokens are left out and counted."""
    found = Totals()

    def write(out: BinaryIO) -> None:
        nonlocal found
        file = _Hashed(out)
        lengths: list[int] = []
        residues: list[int] = []
        for batch in batches:
            kept = [(len(ids), r) for ids, r in zip(batch.ids, batch.residues) if len(ids)]
            if kept:
                file.write(np.concatenate(batch.ids).astype(dtype).tobytes())
            lengths += [length for length, _ in kept]
            residues += [residue for _, residue in kept]
            skipped = batch.skipped + len(batch.ids) - len(kept)
            tokens = sum(length for length, _ in kept)
            found = found.plus(Totals(len(kept), tokens, batch.text_bytes, skipped))
        write_index(file, Index(np.array(lengths, np.int64), np.array(residues, np.uint8)))
        file.write(np.array([*found, found.tokens * dtype.itemsize], "<i8").tobytes())
        out.write(file.digest())

    write_whole(path, write, synced=False)
    return found


def piece_totals(path: Path) -> Totals | None:
    """What is in a piece; None if it is missing or damaged."""
    try:
        with open(path, "rb") as file:
            left = file.seek(0, os.SEEK_END) - HASH_BYTES
            digest = hashlib.sha256()
            for chunk in chunks(file, left):
                digest.update(chunk)
            is_whole = left >= TRAILER and digest.digest() == file.read()
            return read_piece(file).totals if is_whole else None
    except FileNotFoundError:
        return None


def read_piece(file: BinaryIO) -> Piece:
    """What a whole piece says."""
    file.seek(-TRAILER - HASH_BYTES, os.SEEK_END)
    *totals, ids_bytes = np.frombuffer(file.read(TRAILER), "<i8").tolist()
    file.seek(ids_bytes)
    return Piece(Totals(*totals), ids_bytes, read_index(file))


def chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The first bytes of a file."""
    file.seek(0)
    while size > file.tell() and (chunk := file.read(min(COPIED, size - file.tell()))):
        yield chunk


class _Hashed:
    """A file that is written, and the sha256 of what was."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        return self._file.write(data)

    def digest(self) -> bytes:
        return self._digest.digest()
