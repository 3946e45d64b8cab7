"""Token ids in a column of a dataset, read through Arrow's memory maps."""

from typing import Any

import numpy as np

from longctx.data.config import SourceConfig
from longctx.data.files import find_files
from longctx.data.rows import cached_dataset, check_column, parquet_column
from longctx.data.stores import (
    Ids,
    Integers,
    check_ids,
    check_range,
    numbered_residues,
    read_all,
    sampled_fingerprint,
)
from longctx.data.tokenizer import Tokenizer
from longctx.errors import InputError


def holds_ids(source: SourceConfig) -> bool:
    """Whether the column of a settled source holds lists of numbers, not text."""
    if source.format == "parquet":
        file = next(iter(find_files(source.path).values()))
        return _is_list(parquet_column(file, source.column))
    if source.format == "datasets" and not source.streaming:
        return _is_list(_column(source).type)
    return False


def open_ids(source: SourceConfig, tokenizer: Tokenizer, verify: bool) -> "ArrowStore":
    """The ids of a dataset, or of parquet files through the copy that the datasets library keeps;
    `verify` looks at every id."""
    store = ArrowStore(source, tokenizer)
    if verify:
        read_all(store)
    return store


class ArrowStore:
    """One document a row; empty rows are left out if the source skips bad rows."""

    def __init__(self, source: SourceConfig, tokenizer: Tokenizer) -> None:
        column = _column(source)
        if not _is_integer(column.type.value_type):
            raise InputError(
                f"data.path = {source.path!r}: column {source.column!r} holds lists of "
                f"{column.type.value_type}; token ids are whole numbers"
            )
        self.vocab_size = tokenizer.vocab_size
        self.tokenizer = tokenizer.fingerprint
        self.bytes_read = 0
        self._name = f"data.path = {source.path!r}"
        self._chunks = [chunk.values for chunk in column.chunks]
        starts, lengths = _borders(column.chunks)
        rows = np.flatnonzero(lengths > 0)
        self.skipped = len(lengths) - len(rows)
        """Rows without ids."""
        if self.skipped and source.bad_rows == "refuse":
            row = int(np.flatnonzero(lengths <= 0)[0])
            raise InputError(
                f"{self._name}: row {row} has no ids in {source.column!r}; mend it, or set "
                'data.bad_rows = "skip" to leave such rows out'
            )
        if not len(rows):
            raise InputError(f"{self._name}: no row has ids in {source.column!r}")
        self._rows = rows
        self._starts = starts[rows]
        self._chunk_of = np.repeat(np.arange(len(self._chunks)), [len(c) for c in column.chunks])
        self._chunk_of = self._chunk_of[rows]
        self.lengths = lengths[rows]
        self.residues = numbered_residues(len(lengths))[rows]

    def read(self, document: int, start: int, stop: int) -> Ids:
        """Tokens `start` to `stop` of a row; no others are taken from the disk."""
        check_range(self, document, start, stop)
        values = self._chunks[self._chunk_of[document]]
        part = values.slice(int(self._starts[document]) + start, stop - start)
        row = int(self._rows[document])
        if part.null_count:
            raise InputError(f"{self._name}: row {row} has a gap (null) among its ids")
        ids = part.to_numpy()
        self.bytes_read += ids.nbytes
        return check_ids(ids, self.vocab_size, self._name, row)

    def fingerprint(self) -> str:
        """Of all lengths and of evenly spread samples of the ids."""
        return sampled_fingerprint(self)


def _column(source: SourceConfig) -> Any:
    """The column as Arrow holds it: in chunks, mapped from the disk."""
    dataset = cached_dataset(source)
    check_column(dataset.column_names, source.column, f"data.path = {source.path!r}")
    assert dataset._indices is None  # neither loading nor saving leaves rows out of order
    return dataset.data.column(source.column)


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _is_integer(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_integer(kind))


def _borders(chunks: list[Any]) -> tuple[Integers, Integers]:
    """Where each row starts among the values of its chunk, and how many it has; 0 for null."""
    from pyarrow import types

    starts, lengths = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for chunk in chunks:
        if types.is_fixed_size_list(chunk.type):
            size = chunk.type.list_size
            begins = (np.arange(len(chunk)) + chunk.offset) * size
            counts = np.full(len(chunk), size)
        else:
            borders = chunk.offsets.to_numpy().astype(np.int64)
            begins, counts = borders[:-1], np.diff(borders)
        if chunk.null_count:
            counts = np.where(chunk.is_valid().to_numpy(zero_copy_only=False), counts, 0)
        starts.append(begins)
        lengths.append(counts)
    return np.concatenate(starts), np.concatenate(lengths)
