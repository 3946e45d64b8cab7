"""Rows of JSON lines, parquet files and datasets."""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from longctx.data.config import SourceConfig
from longctx.data.files import size_of, unreadable
from longctx.errors import InputError

RANGE_BYTES = 32 * 2**20
"""A file of JSON lines is cut into parts of as much."""
RANGE_ROWS = 4096
"""Rows of a dataset that are one part."""
BATCH_ROWS = 256


@dataclass(frozen=True)
class Part:
    """What one worker reads at a time."""

    name: str
    size: int
    """Bytes, about, for progress."""
    files: tuple[tuple[str, Path], ...]
    """Names and places: several of text, one of JSON lines or parquet, none of a dataset."""
    start: int = 0
    """Of the bytes of JSON lines, the row groups of a parquet file or the rows of a dataset."""
    stop: int = 0
    first_row: int = 0
    """Number of a row group's first row."""


@dataclass(frozen=True)
class Row:
    """One row, or what is wrong with it."""

    name: str
    value: Any
    problem: str = ""


def rows(part: Part, source: SourceConfig) -> Iterator[Row]:
    """The rows of a part, in their order."""
    if source.format == "jsonl":
        return _json_rows(part, source.column)
    if source.format == "parquet":
        return _parquet_rows(part, source.column)
    return _dataset_rows(part, source)


def json_parts(files: dict[str, Path]) -> Iterator[Part]:
    """Ranges of bytes; a line belongs to the range it begins in. Packed files stay whole."""
    for name, path in files.items():
        size = size_of(path)
        step = size if _is_packed(path) else RANGE_BYTES
        for start in range(0, size, max(step, 1)):
            stop = min(start + step, size)
            yield Part(f"{name}@{start}", stop - start, ((name, path),), start, stop)


def line_of(part: Part, row: Row) -> str:
    """File and number of a line, for messages; it counts the lines before."""
    ((_, path),) = part.files
    place = int(row.name.rpartition("@")[2])
    number = 1
    with _open_lines(path) as file:
        while place > 0 and (block := file.read(min(place, 2**20))):
            number += block.count(b"\n")
            place -= len(block)
    return f"{path}: line {number}"


def _is_packed(path: Path) -> bool:
    return path.suffix == ".gz"


def _open_lines(path: Path) -> Any:
    try:
        return gzip.open(path) if _is_packed(path) else path.open("rb")
    except OSError as error:
        raise unreadable(path, error) from error


def _json_rows(part: Part, column: str) -> Iterator[Row]:
    ((name, path),) = part.files
    place, stop = part.start, part.stop
    try:
        with _open_lines(path) as file:
            if _is_packed(path):
                stop = 2**63
            elif place:
                file.seek(place - 1)
                place += len(file.readline()) - 1
            while place < stop and (line := file.readline()):
                if line.strip():
                    yield _json_row(f"{name}@{place}", line, column)
                place += len(line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: a damaged gzip file ({error})") from error
    except OSError as error:
        raise unreadable(path, error) from error


def _json_row(name: str, line: bytes, column: str) -> Row:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return Row(name, None, f"broken JSON ({str(error).partition(':')[0]})")
    if not isinstance(value, dict):
        return Row(name, None, "no JSON object; data.format jsonl reads one object a line")
    if column not in value:
        return Row(name, None, f"no {column!r} in the row (it has {_some(value)})")
    return Row(name, value[column])


def _some(names: Any) -> str:
    names = [repr(name) for name in names]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"


def parquet_parts(files: dict[str, Path], column: str) -> Iterator[Part]:
    """Row groups."""
    for name, path in files.items():
        opened = _open_parquet(path)
        first = 0
        check_column(opened.schema_arrow.names, column, str(path))
        for group in range(opened.num_row_groups):
            about = opened.metadata.row_group(group)
            yield Part(
                f"{name}@{first}", about.total_byte_size, ((name, path),), group, group + 1, first
            )
            first += about.num_rows


def check_column(names: Any, column: str, where: str) -> None:
    """InputError if rows have no such column."""
    if column not in names:
        raise InputError(f"{where}: no column {column!r}; set data.column to one of {_some(names)}")


def parquet_column(path: Path, column: str) -> Any:
    """Arrow's type of a column."""
    schema = _open_parquet(path).schema_arrow
    check_column(schema.names, column, str(path))
    return schema.field(column).type


def _open_parquet(path: Path) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path}: no parquet file, or a damaged one") from error
    except OSError as error:
        raise unreadable(path, error) from error


def _parquet_rows(part: Part, column: str) -> Iterator[Row]:
    import pyarrow

    ((name, path),) = part.files
    number = part.first_row
    try:
        batches = _open_parquet(path).iter_batches(
            BATCH_ROWS, row_groups=[part.start], columns=[column]
        )
        for batch in batches:
            for value in _values(batch.column(0)):
                yield Row(f"{name}@{number}", value)
                number += 1
    except (pyarrow.ArrowInvalid, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path}: row group {part.start} is damaged ({reason})") from error


def _values(column: Any) -> list[Any]:
    """Strings as their bytes, which need not be UTF-8."""
    import pyarrow

    if pyarrow.types.is_string(column.type):
        column = column.cast(pyarrow.binary())
    elif pyarrow.types.is_large_string(column.type):
        column = column.cast(pyarrow.large_binary())
    return column.to_pylist()


def dataset_parts(source: SourceConfig) -> Iterator[Part]:
    """Ranges of rows."""
    dataset = cached_dataset(source)
    check_column(dataset.column_names, source.column, f"data.path = {source.path!r}")
    size = dataset.data.nbytes // max(len(dataset), 1)
    for start in range(0, len(dataset), RANGE_ROWS):
        stop = min(start + RANGE_ROWS, len(dataset))
        yield Part(f"{source.split}@{start}", size * (stop - start), (), start, stop)


def _dataset_rows(part: Part, source: SourceConfig) -> Iterator[Row]:
    dataset = cached_dataset(source).select_columns(source.column).with_format("arrow")
    for start in range(part.start, part.stop, BATCH_ROWS):
        table = dataset[start : min(start + BATCH_ROWS, part.stop)]
        for number, value in enumerate(_values(table.column(0)), start):
            yield Row(f"{source.split}@{number}", value)


def cached_dataset(source: SourceConfig) -> Any:
    """The same object for the same source, as its map of rows takes time to make."""
    return _opened(**{field.name: getattr(source, field.name) for field in fields(SourceConfig)})


@lru_cache(maxsize=4)
def _opened(**options: Any) -> Any:
    from longctx.data.hub import open_dataset

    return open_dataset(SourceConfig(**options))
