"""Documents of token ids that can be read in parts, and what is held out of them."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from longctx.errors import InputError

Ids = npt.NDArray[np.integer]
Integers = npt.NDArray[np.int64]

CHECKED = 2**20
SAMPLES = 256
SAMPLE_LENGTH = 1024


class TokenStore(Protocol):
    """Documents of token ids; whatever order they are in is the same on every process."""

    vocab_size: int
    tokenizer: str
    """Fingerprint of the tokenizer that made the ids; empty if nobody knows."""
    lengths: Integers
    """Tokens of each document, marks of its begin and end included; never 0."""
    residues: npt.NDArray[np.uint8]
    """A hash of each document, 0 to 99; it decides whether the document is held out."""
    bytes_read: int
    """Bytes of token ids that `read` has taken from the source."""
    skipped: int
    """Rows and files that were left out, because they are broken or hold nothing."""

    def read(self, document: int, start: int, stop: int) -> Ids:
        """Tokens `start` to `stop` of a document, and no others; InputError names what is wrong."""
        ...

    def fingerprint(self) -> str:
        """Changes if any document does; cheap where a manifest holds hashes."""
        ...


class Splits(NamedTuple):
    """What is trained on, and what is held out."""

    train: TokenStore
    validation: TokenStore

    def fingerprint(self) -> str:
        """Of both; that of the source where both are parts of the same."""
        train, validation = self.train.fingerprint(), self.validation.fingerprint()
        if train == validation:
            return train
        return hashlib.sha256(f"{train} {validation}".encode()).hexdigest()


@dataclass(eq=False)
class MemoryStore:
    """Documents end to end in one array: document d is `tokens[offsets[d]:offsets[d + 1]]`."""

    tokens: Ids
    offsets: Integers
    residues: npt.NDArray[np.uint8]
    vocab_size: int
    tokenizer: str
    content: str
    """Hash of what the tokens were made of."""
    skipped: int = 0
    bytes_read: int = 0

    @cached_property
    def lengths(self) -> Integers:
        """Tokens of each document."""
        return np.diff(self.offsets)

    def read(self, document: int, start: int, stop: int) -> Ids:
        """Tokens `start` to `stop` of a document."""
        check_range(self, document, start, stop)
        origin = int(self.offsets[document])
        ids = self.tokens[origin + start : origin + stop]
        self.bytes_read += ids.nbytes
        return ids

    def fingerprint(self) -> str:
        """Hash of what the tokens were made of."""
        return self.content


class Selection:
    """Some documents of a store, or a part of its only one."""

    def __init__(self, store: TokenStore, documents: Integers, part: slice | None = None) -> None:
        self._store = store
        self._documents = documents
        self._start = part.start if part else 0
        self.vocab_size = store.vocab_size
        self.tokenizer = store.tokenizer
        self.lengths = store.lengths[documents]
        if part:
            self.lengths = np.array([part.stop - part.start], dtype=np.int64)
        self.residues = store.residues[documents]
        self.skipped = store.skipped
        self.bytes_read = 0

    def read(self, document: int, start: int, stop: int) -> Ids:
        """Tokens `start` to `stop` of a document of the selection."""
        check_range(self, document, start, stop)
        chosen = int(self._documents[document])
        ids = self._store.read(chosen, self._start + start, self._start + stop)
        self.bytes_read += ids.nbytes
        return ids

    def fingerprint(self) -> str:
        """That of the whole store, so it changes with documents outside of the selection too."""
        return self._store.fingerprint()


def hold_out(store: TokenStore, percent: int) -> Splits:
    """Documents whose residue is below `percent` become the validation split.

    If that leaves one side empty, the document with the smallest (largest) residue moves there.
    Of an only document the last tokens are held out.
    """
    count = len(store.lengths)
    if count == 1:
        return _cut(store, percent)
    order = np.argsort(store.residues, kind="stable")
    held_out = min(max(int((store.residues < percent).sum()), 1), count - 1)
    return Splits(
        train=Selection(store, np.sort(order[held_out:])),
        validation=Selection(store, np.sort(order[:held_out])),
    )


def _cut(store: TokenStore, percent: int) -> Splits:
    length = int(store.lengths[0])
    if length < 2:
        raise InputError("data: a single token leaves nothing to hold out; choose other data")
    held_out = max(1, length * percent // 100)
    only = np.zeros(1, dtype=np.int64)
    return Splits(
        train=Selection(store, only, slice(0, length - held_out)),
        validation=Selection(store, only, slice(length - held_out, length)),
    )


def check_range(store: TokenStore, document: int, start: int, stop: int) -> None:
    """ValueError for a part that the document does not have."""
    if not (0 <= document < len(store.lengths) and 0 <= start <= stop <= store.lengths[document]):
        raise ValueError(f"no tokens {start}:{stop} of document {document}")


def check_ids(ids: Ids, vocab_size: int, source: str, document: int) -> Ids:
    """The ids themselves, all of them below `vocab_size`; InputError names one that is not."""
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        wrong = int(ids[(ids < 0) | (ids >= vocab_size)][0])
        raise InputError(
            f"{source}: document {document} holds token id {wrong}, but the vocabulary has "
            f"{vocab_size}; set the data.tokenizer that made the ids, or make them again"
        )
    return ids


def id_type(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """The smallest type that holds every id of a vocabulary."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def numbered_residues(count: int) -> npt.NDArray[np.uint8]:
    """Residues of documents that have only a number: splitmix64 of it, modulo 100."""
    mixed = (np.arange(1, count + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return ((mixed ^ (mixed >> np.uint64(31))) % np.uint64(100)).astype(np.uint8)


def read_all(store: TokenStore) -> None:
    """Read every id, so that a bad one is found before training."""
    before = store.bytes_read
    for document, length in enumerate(store.lengths.tolist()):
        for start in range(0, length, CHECKED):
            store.read(document, start, min(start + CHECKED, length))
    store.bytes_read = before


def sampled_fingerprint(store: TokenStore) -> str:
    """Hash of the lengths of all documents and of samples of their ids, begin and end of some.

    Where no manifest holds hashes, a change of a few ids that keeps all lengths may stay unseen.
    """
    digest = hashlib.sha256(f"{store.vocab_size} {store.tokenizer}".encode())
    digest.update(store.lengths.astype("<i8").tobytes())
    before = store.bytes_read
    sampled = np.unique(np.linspace(0, len(store.lengths) - 1, SAMPLES).astype(int))
    for document in sampled.tolist():
        length = int(store.lengths[document])
        for start in sorted({0, max(0, length - SAMPLE_LENGTH)}):
            ids = store.read(document, start, min(start + SAMPLE_LENGTH, length))
            digest.update(ids.astype("<i8").tobytes())
    store.bytes_read = before
    return digest.hexdigest()
