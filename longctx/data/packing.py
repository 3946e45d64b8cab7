"""Documents concatenated and cut into sequences, as a pure function of (seed, index)."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from longctx.data.config import DataConfig
from longctx.data.stores import Ids, Integers, TokenStore
from longctx.data.streams import IGNORE, PackedSequence, Stream, check_slice, shuffled
from longctx.errors import InputError

KEPT_EPOCHS = 4


def epoch_documents(store: TokenStore, config: DataConfig) -> Integers:
    """The documents that an epoch of training holds, a long one as often as it is repeated."""
    lengths = store.lengths
    documents = np.flatnonzero(lengths >= config.shortest)
    if not len(documents):
        raise InputError(
            f"data.shortest = {config.shortest} leaves out every document: the longest of "
            f"{len(lengths):,} has {lengths.max():,} tokens; lower it"
        )
    if config.long_repeat == 1:
        return documents
    is_long = lengths[documents] >= config.long_from
    if not is_long.any():
        raise InputError(
            f"data.long_from = {config.long_from}: no document is that long, the longest has "
            f"{lengths.max():,} tokens; lower it, or leave data.long_repeat at 1"
        )
    return np.repeat(documents, np.where(is_long, config.long_repeat, 1))


@dataclass(frozen=True)
class EpochOrder:
    """One epoch: its documents in shuffled order, and where each starts (and the last ends)."""

    documents: Integers
    starts: Integers


class PackedStream(Stream):
    """An endless stream of shuffled documents, epoch after epoch, cut every `seq_len` tokens.

    Sequence n is the stream from n * seq_len on; it may span documents and epochs. The order of
    an epoch is keyed by (seed, epoch), so any sequence can be read at any time, by any process.
    """

    def __init__(
        self, store: TokenStore, seq_len: int, seed: int, documents: Integers | None = None
    ) -> None:
        self.seq_len = seq_len
        self._store, self._seed = store, seed
        self._documents = np.arange(len(store.lengths)) if documents is None else documents
        self._epoch_len = int(store.lengths[self._documents].sum())
        self._order = lru_cache(maxsize=KEPT_EPOCHS)(self._shuffle)

    def slice(self, index: int, start: int, stop: int) -> PackedSequence:
        """Reads its tokens and the one that follows."""
        check_slice(self, index, start, stop)
        origin = index * self.seq_len
        tokens, ordinals = self._read(origin + start, origin + stop + 1)
        labels = np.where(ordinals[1:] == ordinals[:-1], tokens[1:], IGNORE)
        return PackedSequence(tokens[:-1], labels, int(tokens[-1]))

    def num_labels(self, index: int) -> int:
        """All but the last token of each document."""
        return self.seq_len - len(self.document_starts(index)) + 1

    def document_starts(self, index: int) -> tuple[int, ...]:
        """Found in the order of its epochs."""
        origin, end = index * self.seq_len, (index + 1) * self.seq_len
        starts = {0}
        for epoch in range(origin // self._epoch_len, end // self._epoch_len + 1):
            borders, shift = self._order(epoch).starts, origin - epoch * self._epoch_len
            low, high = np.searchsorted(borders, (shift, shift + self.seq_len), side="right")
            starts.update((borders[low:high] - shift).tolist())
        return tuple(sorted(starts))

    def _shuffle(self, epoch: int) -> EpochOrder:
        documents = self._documents[shuffled(self._seed, epoch, len(self._documents))]
        starts = np.zeros(len(documents) + 1, dtype=np.int64)
        np.cumsum(self._store.lengths[documents], out=starts[1:])
        return EpochOrder(documents, starts)

    def _read(self, start: int, stop: int) -> tuple[Integers, Integers]:
        """Tokens of a range of the stream and the ordinal of each one's document."""
        epoch_len = self._epoch_len
        borders = range((start // epoch_len + 1) * epoch_len, stop, epoch_len)
        tokens: list[Ids] = []
        ordinals: list[int] = []
        for low, high in pairwise([start, *borders, stop]):
            self._read_epoch(low, high, tokens, ordinals)
        counts = [len(part) for part in tokens]
        return np.concatenate(tokens).astype(np.int64), np.repeat(ordinals, counts)

    def _read_epoch(self, start: int, stop: int, tokens: list[Ids], ordinals: list[int]) -> None:
        """As `_read`, for a range that lies in one epoch; appends to the lists."""
        epoch, low = divmod(start, self._epoch_len)
        high = low + stop - start
        order = self._order(epoch)
        first = int(np.searchsorted(order.starts, low, side="right")) - 1
        last = int(np.searchsorted(order.starts, high, side="left"))
        documents = order.documents[first:last].tolist()
        borders = order.starts[first : last + 1].tolist()
        for place, document in enumerate(documents):
            origin, end = borders[place], borders[place + 1]
            tokens.append(
                self._store.read(document, max(low, origin) - origin, min(high, end) - origin)
            )
            ordinals.append(epoch * len(self._documents) + first + place)
