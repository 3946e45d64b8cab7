"""Token ids in Megatron's .bin and .idx files, read and written by megatron-core itself."""

import logging
import os
import struct
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from longctx.data.stores import (
    Ids,
    check_ids,
    check_range,
    numbered_residues,
    read_all,
    sampled_fingerprint,
)
from longctx.data.tokenizer import Tokenizer
from longctx.errors import InputError, OutsideError

MAGIC = b"MMIDIDX\x00\x00"
HEADER_BYTES = 34
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}
"""Bytes of an id for Megatron's codes of whole numbers."""
PER_SEQUENCE = 4 + 8
PER_BORDER = 8


class IndexedStore:
    """Documents of an indexed dataset; each may be several of its sequences, end to end."""

    def __init__(self, prefix: str, tokenizer: Tokenizer, verify: bool) -> None:
        self.vocab_size = tokenizer.vocab_size
        self.tokenizer = tokenizer.fingerprint
        self.bytes_read = 0
        self._name = str(Path(prefix).expanduser())
        self._dataset = _open(self._name)
        lengths = self._dataset.sequence_lengths.astype(np.int64)
        self._starts = np.concatenate(([0], np.cumsum(lengths)))
        borders = self._starts[self._dataset.document_indices]
        self._documents = np.flatnonzero(np.diff(borders) > 0)
        self.skipped = len(borders) - 1 - len(self._documents)
        if not len(self._documents):
            raise InputError(f"{self._name}.idx: holds no documents")
        self._borders = borders
        self.lengths = np.diff(borders)[self._documents]
        self.residues = numbered_residues(len(borders) - 1)[self._documents]
        if verify:
            read_all(self)

    def read(self, document: int, start: int, stop: int) -> Ids:
        """Tokens `start` to `stop` of a document; no others are taken from the disk."""
        check_range(self, document, start, stop)
        number = int(self._documents[document])
        origin = int(self._borders[number])
        ids = self._read(origin + start, origin + stop)
        self.bytes_read += ids.nbytes
        return check_ids(ids, self.vocab_size, self._name, number)

    def fingerprint(self) -> str:
        """Of all lengths and of samples of the ids."""
        return sampled_fingerprint(self)

    def _read(self, start: int, stop: int) -> Ids:
        """Tokens of all sequences end to end."""
        parts = []
        sequence = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            low, high = self._starts[sequence : sequence + 2].tolist()
            parts.append(self._dataset.get(sequence, start - low, min(stop, high) - start))
            start, sequence = high, sequence + 1
        if not parts:
            return np.zeros(0, dtype=self._dataset.index.dtype)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def write_indexed(prefix: Path, documents: Iterable[Ids], vocab_size: int) -> None:
    """Write documents of one sequence each, for Megatron to read under this prefix."""
    from torch import from_numpy

    module = _megatron(str(prefix))
    dtype = module.DType.optimal_dtype(vocab_size)
    try:
        builder = module.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        for ids in documents:
            builder.add_item(from_numpy(ids.astype(dtype)))
            builder.end_document()
        builder.finalize(f"{prefix}.idx")
    except OSError as error:
        for suffix in (".bin", ".idx"):
            Path(f"{prefix}{suffix}").unlink(missing_ok=True)
        raise OutsideError(f"{prefix}: cannot be written ({error.strerror})") from error


def _megatron(name: str) -> Any:
    with warnings.catch_warnings():
        # It warns of accelerated optimizers that it lacks.
        warnings.simplefilter("ignore")
        try:
            from megatron.core.datasets import indexed_dataset
        except ImportError as error:
            raise InputError(
                f"{name}: Megatron's files need pip install 'longctx[megatron]'"
            ) from error
    logging.getLogger(indexed_dataset.__name__).setLevel(logging.WARNING)
    return indexed_dataset


def _open(prefix: str) -> Any:
    module = _megatron(prefix)
    missing = [suffix for suffix in (".idx", ".bin") if not os.path.isfile(prefix + suffix)]
    if missing:
        raise InputError(f"{prefix}{missing[0]}: no such file; data.path is the part before .idx")
    try:
        # megatron-core prints tracebacks for files that it has half opened.
        _check_borders(prefix, *_index_header(prefix))
        return module.IndexedDataset(prefix)
    except OSError as error:
        raise OutsideError(f"{prefix}: cannot be read ({error.strerror})") from error


def _index_header(prefix: str) -> tuple[int, int, int]:
    """Bytes of an id, and the numbers of sequences and of borders of documents."""
    with open(f"{prefix}.idx", "rb") as file:
        header = file.read(HEADER_BYTES)
        size = os.fstat(file.fileno()).st_size
    if header[:9] != MAGIC or len(header) < HEADER_BYTES:
        raise InputError(f"{prefix}.idx: no index of Megatron's, or a damaged one")
    version, code, sequences, borders = struct.unpack("<QBQQ", header[9:])
    if version != 1 or code not in SIZES:
        raise InputError(
            f"{prefix}.idx: version {version}, type {code}: only whole numbers and version 1 are "
            "read"
        )
    expected = HEADER_BYTES + sequences * PER_SEQUENCE + borders * PER_BORDER
    if sequences and size == expected + sequences:
        raise InputError(f"{prefix}.idx: a multimodal dataset; its modes are not supported")
    if size != expected:
        raise InputError(
            f"{prefix}.idx: has {size} bytes where its header tells of {expected}: damaged"
        )
    return SIZES[code], sequences, borders


def _check_borders(prefix: str, item: int, sequences: int, borders: int) -> None:
    """InputError unless all sequences lie in the .bin, in documents one after the other."""
    index = np.memmap(f"{prefix}.idx", mode="r", offset=HEADER_BYTES) if borders else b""
    lengths = np.frombuffer(index, "<i4", sequences).astype(np.int64)
    starts = np.frombuffer(index, "<i8", sequences, offset=4 * sequences)
    documents = np.frombuffer(index, "<i8", borders, offset=PER_SEQUENCE * sequences)
    if not lengths.any():
        raise InputError(f"{prefix}.idx: holds no documents")
    if (
        (lengths < 0).any()
        or (starts < 0).any()
        or not borders
        or (documents[0], documents[-1]) != (0, sequences)
        or (np.diff(documents) < 0).any()
    ):
        raise InputError(f"{prefix}.idx: lengths or borders out of order: damaged")
    size, expected = os.path.getsize(f"{prefix}.bin"), int((starts + lengths * item).max())
    if size != expected:
        raise InputError(
            f"{prefix}.bin: has {size} bytes where {prefix}.idx tells of {expected}: damaged, or "
            "of another index"
        )
