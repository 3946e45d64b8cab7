"""Sequences of several sources, in fixed shares."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from longctx.data.stores import Integers
from longctx.data.streams import PackedSequence, Stream, shuffled
from longctx.errors import InputError

BLOCK = 10_000
"""Sequences after which each source has had its share exactly."""
PURPOSE = 1
"""Tells the draws of a mixture from those of its sources."""
KEPT_BLOCKS = 4


class Turns(NamedTuple):
    """Whose turn each sequence of a block is, and which of that source's sequences it gets."""

    sources: Integers
    numbers: Integers


def shares(weights: Mapping[str, float]) -> Integers:
    """Sequences of each source in a block: weights rounded by largest remainder."""
    exact = np.array(list(weights.values())) / sum(weights.values()) * BLOCK
    for name, share in zip(weights, exact):
        if share < 1:
            raise InputError(
                f"data.mixture.{name}.weight = {weights[name]} is less than 1/{BLOCK} of all "
                "weights: raise it, or leave the source out"
            )
    counts = np.floor(exact).astype(np.int64)
    missing = BLOCK - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return counts


class MixedStream(Stream):
    """Streams that take turns: blocks of 10,000 sequences hold each source's share in random order.

    Of each source, sequences come in order and without a gap, so nothing is lost or repeated.
    """

    def __init__(self, streams: Mapping[str, Stream], weights: Mapping[str, float], seed: int):
        self._names, self._streams = list(streams), list(streams.values())
        self._counts = shares({name: weights[name] for name in streams})
        self._seed = seed
        self.seq_len = self._streams[0].seq_len
        self._turns = lru_cache(maxsize=KEPT_BLOCKS)(self._shuffle)

    def place(self, index: int) -> tuple[int, int]:
        """The source of a sequence, and its number among that source's."""
        block, place = divmod(index, BLOCK)
        turns = self._turns(block)
        return int(turns.sources[place]), int(turns.numbers[place])

    def slice(self, index: int, start: int, stop: int) -> PackedSequence:
        """That of the source."""
        source, number = self.place(index)
        return self._streams[source].slice(number, start, stop)

    def document_starts(self, index: int) -> tuple[int, ...]:
        """Those of the source's sequence."""
        source, number = self.place(index)
        return self._streams[source].document_starts(number)

    def num_labels(self, index: int) -> int:
        """Those of the source's sequence."""
        source, number = self.place(index)
        return self._streams[source].num_labels(number)

    def num_joined(self, index: int) -> int:
        """Those of the source's sequence."""
        source, number = self.place(index)
        return self._streams[source].num_joined(number)

    def state(self, index: int) -> dict[str, Any]:
        """That of each source at its next sequence, where there is one."""
        block, place = divmod(index, BLOCK)
        had = np.bincount(self._turns(block).sources[:place], minlength=len(self._streams))
        following = block * self._counts + had
        states = [stream.state(int(n)) for stream, n in zip(self._streams, following)]
        return {name: state for name, state in zip(self._names, states) if state}

    def load_state(self, state: dict[str, Any]) -> None:
        """Gives each source its own."""
        for name, stream in zip(self._names, self._streams):
            if name in state:
                stream.load_state(state[name])

    def _shuffle(self, block: int) -> Turns:
        sources = np.repeat(np.arange(len(self._counts)), self._counts)
        sources = sources[shuffled(self._seed, block, BLOCK, PURPOSE)]
        numbers = np.empty(BLOCK, dtype=np.int64)
        for source, count in enumerate(self._counts):
            numbers[sources == source] = block * count + np.arange(count)
        return Turns(sources, numbers)
