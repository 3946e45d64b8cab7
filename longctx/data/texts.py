"""Text of any format, in parts that can be read in parallel."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from os import fsencode
from typing import Any

from longctx.data.config import SourceConfig
from longctx.data.files import find_files, read_bytes, settled, size_of
from longctx.data.rows import Part, Row, dataset_parts, json_parts, line_of, parquet_parts, rows
from longctx.errors import InputError

PART_BYTES = 2**20
"""Files of text are put together until they have as much."""


@dataclass(frozen=True)
class Text:
    """One document."""

    name: str
    """Unique in its source and the same anywhere: a relative path, or one with @ and where the row
    begins (in bytes or rows)."""
    content: bytes


class TextSource:
    """All texts of a source; `read` gives those of one part, in an order that never changes."""

    def __init__(self, source: SourceConfig, parts: tuple[Part, ...]) -> None:
        self.source = source
        self.parts = parts
        self.skipped = 0
        """Files and rows without text, and broken rows, that `read` has left out so far."""

    def read(self, part: Part) -> Iterator[Text]:
        """The documents of a part; InputError names the first bad row if those are refused."""
        if self.source.format == "text":
            yield from self._read_files(part)
            return
        for row in rows(part, self.source):
            problem = row.problem or _problem(row, self.source.column)
            if not problem:
                yield Text(row.name, _content(row.value))
            elif self.source.bad_rows == "refuse":
                where = line_of(part, row) if self.source.format == "jsonl" else row.name
                raise InputError(
                    f'{where}: {problem}; mend it, or set data.bad_rows = "skip" to leave such '
                    "rows out"
                )
            else:
                self.skipped += 1

    def _read_files(self, part: Part) -> Iterator[Text]:
        for name, path in part.files:
            content = read_bytes(path)
            if content:
                yield Text(name, content)
            else:
                self.skipped += 1


def open_texts(source: SourceConfig) -> TextSource:
    """Find the texts of a source; reads names, sizes and indexes only."""
    if source.streaming:
        raise InputError(
            f"data.path = {source.path!r}: a stream cannot be read in parts; set streaming = false"
        )
    source = settled(source)
    if source.format == "text":
        parts = _text_parts(source.path)
    elif source.format == "jsonl":
        parts = json_parts(find_files(source.path))
    elif source.format == "parquet":
        parts = parquet_parts(find_files(source.path), source.column)
    elif source.format == "datasets":
        parts = dataset_parts(source)
    else:
        raise InputError(f"data.path = {source.path!r}: holds token ids, not text")
    return TextSource(source, tuple(parts))


def residue(name: str) -> int:
    """The hash of a document's name, 0 to 99, that decides whether it is held out."""
    return int.from_bytes(sha256(fsencode(name)).digest()[:8], "big") % 100


def _text_parts(path: str) -> Iterator[Part]:
    files: list[tuple[str, Any]] = []
    size = 0
    for name, file in find_files(path).items():
        files.append((name, file))
        size += size_of(file)
        if size >= PART_BYTES:
            yield Part(files[0][0], size, tuple(files))
            files, size = [], 0
    if files:
        yield Part(files[0][0], size, tuple(files))


def _problem(row: Row, column: str) -> str:
    if row.value is None or row.value in ("", b""):
        return f"no text in {column!r}"
    if not isinstance(row.value, str | bytes):
        return f"{column!r} holds {type(row.value).__name__}, not text"
    return ""


def _content(value: Any) -> bytes:
    return value if isinstance(value, bytes) else value.encode(errors="replace")
