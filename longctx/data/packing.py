"""Documents concatenated and cut into sequences, as a pure function of (seed, index)."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from longctx.data.sources import DocumentTokens

IGNORE = -100


@dataclass(frozen=True)
class PackedSequence:
    """Part of a packed sequence; all arrays are as long as the part."""

    tokens: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    """The next token, or IGNORE where it belongs to another document."""
    following: int
    """The token after the last one, whatever its document."""

    def as_one_document(self) -> "PackedSequence":
        """The same tokens with document borders forgotten: no label is ignored."""
        labels = np.append(self.tokens, self.following)[1:]
        return PackedSequence(self.tokens, labels, self.following)


@dataclass(frozen=True)
class EpochOrder:
    """One epoch: its documents in shuffled order, and where each starts (and the last ends)."""

    documents: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]


class PackedStream:
    """An endless stream of shuffled documents, epoch after epoch, cut every `seq_len` tokens.

    Sequence n is the stream from n * seq_len on; it may span documents and epochs. The order of
    an epoch is keyed by (seed, epoch), so any sequence can be read at any time, by any process.
    """

    def __init__(self, documents: DocumentTokens, seq_len: int, seed: int) -> None:
        self.seq_len = seq_len
        self._tokens = documents.tokens
        self._offsets = documents.offsets
        self._seed = seed
        self._order = lru_cache(maxsize=4)(self._shuffle)

    def sequence(self, index: int) -> PackedSequence:
        """The whole sequence number `index`."""
        return self.slice(index, 0, self.seq_len)

    def slice(self, index: int, start: int, stop: int) -> PackedSequence:
        """Tokens `start` to `stop` of sequence `index`, without reading the rest of it."""
        if not (index >= 0 and 0 <= start <= stop <= self.seq_len):
            raise ValueError(f"no slice {start}:{stop} of sequence {index} of {self.seq_len}")
        origin = index * self.seq_len
        tokens, ordinals = self._read(origin + start, origin + stop + 1)
        labels = np.where(ordinals[1:] == ordinals[:-1], tokens[1:], IGNORE)
        return PackedSequence(tokens[:-1], labels, int(tokens[-1]))

    def num_labels(self, index: int) -> int:
        """Labels of sequence `index` that are not IGNORE. No token is read."""
        return self.seq_len - len(self.document_starts(index)) + 1

    def document_starts(self, index: int) -> tuple[int, ...]:
        """Where documents start in sequence `index`: 0, places inside, and `seq_len` if the next
        sequence begins with a new one. No token is read."""
        origin, end = index * self.seq_len, (index + 1) * self.seq_len
        epoch_len = len(self._tokens)
        starts = {0}
        for epoch in range(origin // epoch_len, end // epoch_len + 1):
            borders = self._order(epoch).starts + epoch * epoch_len
            low, high = np.searchsorted(borders, (origin, end), side="right")
            starts.update((borders[low:high] - origin).tolist())
        return tuple(sorted(starts))

    def _shuffle(self, epoch: int) -> EpochOrder:
        # Raw Philox words keep their value across numpy versions; Generator.permutation may not.
        key = np.array([self._seed % 2**64, epoch], dtype=np.uint64)
        draws = np.random.Philox(key=key).random_raw(len(self._offsets) - 1)
        documents = np.argsort(draws, kind="stable")
        lengths = np.diff(self._offsets)[documents]
        return EpochOrder(documents, np.concatenate(([0], np.cumsum(lengths))))

    def _read(self, start: int, stop: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Tokens of a range of the stream and the ordinal of each one's document."""
        epoch_len = len(self._tokens)
        borders = range((start // epoch_len + 1) * epoch_len, stop, epoch_len)
        parts = [self._read_epoch(*part) for part in pairwise([start, *borders, stop])]
        tokens, ordinals = zip(*parts, strict=True)
        return np.concatenate(tokens).astype(np.int64), np.concatenate(ordinals)

    def _read_epoch(
        self, start: int, stop: int
    ) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64]]:
        """As `_read`, for a range that lies in one epoch."""
        epoch, low = divmod(start, len(self._tokens))
        high = low + stop - start
        order = self._order(epoch)
        first = np.searchsorted(order.starts, low, side="right") - 1
        last = np.searchsorted(order.starts, high, side="left")
        borders = np.clip(order.starts[first : last + 1], low, high)
        counts = borders[1:] - borders[:-1]
        shifts = self._offsets[order.documents[first:last]] - order.starts[first:last]
        index = np.arange(low, high) + np.repeat(shifts, counts)
        ordinals = np.repeat(epoch * (len(self._offsets) - 1) + np.arange(first, last), counts)
        return self._tokens[index], ordinals
