"""Sequences that cut no document but those too long for one, and are filled up with padding.

`best_fit` follows "Fewer truncations improve language modeling" (Ding et al., arXiv 2404.10830):
pieces of `seq_len` are cut from longer documents, and what is left of each goes, the longest first,
into the sequence where it leaves the least room. `whole` gives each piece a sequence of its own.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from longctx.data.stores import Integers, TokenStore
from longctx.data.streams import IGNORE, PackedSequence, Stream, check_slice, shuffled

PADDING = 0
"""Token id that fills sequences; every vocabulary has it."""
NOWHERE = -1
KEPT_EPOCHS = 2


@dataclass(frozen=True)
class Layout:
    """Which pieces of documents share a sequence: those of bin b are borders[b]:borders[b + 1]."""

    documents: Integers
    starts: Integers
    """Where in its document a piece begins."""
    lengths: Integers
    borders: Integers

    @property
    def bins(self) -> int:
        """Sequences of an epoch."""
        return len(self.borders) - 1


def whole(documents: Integers, lengths: Integers, seq_len: int) -> Layout:
    """Each piece by itself; `lengths` are those of the documents."""
    cut, rest = _pieces(documents, lengths, seq_len)
    pieces = [np.concatenate(parts) for parts in zip(cut, rest)]
    return Layout(*pieces, np.arange(len(pieces[0]) + 1))


def best_fit(documents: Integers, lengths: Integers, seq_len: int) -> Layout:
    """Pieces of full length by themselves, the others where they fit best."""
    cut, rest = _pieces(documents, lengths, seq_len)
    bins = fit(rest[2], seq_len)
    # The longest of a sequence comes first.
    order = np.lexsort((-rest[2], bins))
    pieces = [np.concatenate((full, part[order])) for full, part in zip(cut, rest)]
    counts = np.concatenate((np.ones(len(cut[0]), dtype=np.int64), np.bincount(bins)))
    return Layout(*pieces, np.concatenate(([0], np.cumsum(counts))))


def fit(sizes: Integers, capacity: int) -> Integers:
    """The bin of each size by best fit decreasing; each goes where it leaves the least room.

    Equal sizes are placed together, so time grows with the number of different (size, room).
    """
    bins = np.empty(len(sizes), dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    firsts = np.flatnonzero(np.diff(sizes[order], prepend=-1))
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    opened = 0
    for items in np.split(order, firsts[1:]) if len(sizes) else []:
        size = int(sizes[items[0]])
        while len(items):
            smallest = bisect_left(rooms, size)
            room = rooms[smallest] if smallest < len(rooms) else capacity
            each = room // size
            wanted = -(-len(items) // each)
            if smallest < len(rooms):
                taken = by_room[room][-wanted:]
                del by_room[room][-wanted:]
                if not by_room[room]:
                    del by_room[room], rooms[smallest]
            else:
                taken = list(range(opened, opened + wanted))
                opened += wanted
            placed = min(len(items), each * len(taken))
            bins[items[:placed]] = np.repeat(taken, each)[:placed]
            items = items[placed:]
            last = placed - each * (len(taken) - 1)
            for left, filled in (
                (room - each * size, taken[:-1]),
                (room - last * size, taken[-1:]),
            ):
                if left and filled:
                    if left not in by_room:
                        insort(rooms, left)
                    by_room.setdefault(left, []).extend(filled)
    return bins


def _pieces(
    documents: Integers, lengths: Integers, seq_len: int
) -> tuple[list[Integers], list[Integers]]:
    """(documents, starts, lengths) of the pieces of full length, and of the shorter ones."""
    full, rest = np.divmod(lengths, seq_len)
    number = np.arange(full.sum()) - np.repeat(np.cumsum(full) - full, full)
    lefts = np.flatnonzero(rest)
    return (
        [np.repeat(documents, full), number * seq_len, np.full(len(number), seq_len)],
        [documents[lefts], full[lefts] * seq_len, rest[lefts]],
    )


class BinStream(Stream):
    """The sequences of a layout, shuffled anew each epoch; what is free in one is padding.

    The label of a cut piece's last token is the next token of its document.
    """

    def __init__(self, store: TokenStore, layout: Layout, seq_len: int, seed: int) -> None:
        self.seq_len = seq_len
        self._store, self._layout, self._seed = store, layout, seed
        self._order = lru_cache(maxsize=KEPT_EPOCHS)(self._shuffle)

    def slice(self, index: int, start: int, stop: int) -> PackedSequence:
        """Reads its tokens and the one that follows, if there is one."""
        check_slice(self, index, start, stop)
        documents, origins, lengths = self._pieces_of(index)
        tokens, owners = [], []
        end = 0
        for number, (document, origin, length) in enumerate(zip(documents, origins, lengths)):
            begin, end = end, end + length
            low, high = max(start, begin), min(stop + 1, end)
            if low < high:
                at = origin - begin
                tokens.append(self._store.read(document, at + low, at + high))
                owners.append((number, high - low))
        missing = stop + 1 - max(start, min(stop + 1, end))
        tokens.append(np.full(missing, PADDING))
        owners.append((NOWHERE, missing))
        joined = np.concatenate(tokens).astype(np.int64)
        owner = np.repeat(*(np.array(column) for column in zip(*owners)))
        is_inside = (owner[1:] == owner[:-1]) & (owner[1:] != NOWHERE)
        labels = np.where(is_inside, joined[1:], IGNORE)
        following = int(joined[-1]) if stop < end else IGNORE
        return PackedSequence(joined[:-1], labels, following, max(0, missing - 1))

    def document_starts(self, index: int) -> tuple[int, ...]:
        """Padding starts as a document does."""
        borders = np.cumsum(self._pieces_of(index)[2]).tolist()
        if borders[-1] > self.seq_len:
            return (0, *borders[:-1])
        return (0, *borders)

    def num_labels(self, index: int) -> int:
        """All but the last token of each document, and no padding."""
        lengths = self._pieces_of(index)[2]
        return sum(lengths) - len(lengths)

    def num_joined(self, index: int) -> int:
        """All but the last token, and no padding."""
        return sum(self._pieces_of(index)[2]) - 1

    def _pieces_of(self, index: int) -> tuple[list[int], list[int], list[int]]:
        """Documents, starts and lengths of a sequence's pieces; one that is cut at the end of the
        sequence is a token longer, the one that follows."""
        epoch, place = divmod(index, self._layout.bins)
        bin_ = self._order(epoch)[place]
        pieces = slice(*self._layout.borders[bin_ : bin_ + 2].tolist())
        documents, starts, lengths = (
            array[pieces].tolist()
            for array in (self._layout.documents, self._layout.starts, self._layout.lengths)
        )
        if starts[-1] + lengths[-1] < self._store.lengths[documents[-1]]:
            lengths[-1] += 1
        return documents, starts, lengths

    def _shuffle(self, epoch: int) -> Integers:
        return shuffled(self._seed, epoch, self._layout.bins)
