"""What a loader reads: endless sequences of packed documents, each readable in parts."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from longctx.data.stores import Integers

IGNORE = -100


@dataclass(frozen=True)
class PackedSequence:
    """Part of a packed sequence; all arrays are as long as the part."""

    tokens: Integers
    labels: Integers
    """The next token, or IGNORE where it belongs to another document."""
    following: int
    """The token after the last one, whatever its document; IGNORE if there is none."""
    padding: int = 0
    """Tokens at the end that only fill the sequence; they are a document of their own."""

    def as_one_document(self) -> "PackedSequence":
        """The same tokens with document borders forgotten: what has a token after it counts."""
        labels = np.append(self.tokens, self.following)[1:]
        if self.padding:
            labels[max(0, len(labels) - self.padding - 1) :] = IGNORE
        return PackedSequence(self.tokens, labels, self.following, self.padding)


class Stream(Protocol):
    """Sequences by number, from 0 on, without end; the same on every process, in any order."""

    seq_len: int

    def slice(self, index: int, start: int, stop: int) -> PackedSequence:
        """Tokens `start` to `stop` of sequence `index`, without reading the rest of it."""
        ...

    def document_starts(self, index: int) -> tuple[int, ...]:
        """Where documents start in sequence `index`: 0, places inside, and `seq_len` if the next
        sequence begins with a new one. No token is read."""
        ...

    def num_labels(self, index: int) -> int:
        """Labels of sequence `index` that are not IGNORE. No token is read."""
        ...

    def num_joined(self, index: int) -> int:
        """As `num_labels`, if the sequence is taken for one document."""
        return self.seq_len

    def state(self, index: int) -> dict[str, Any]:
        """What another process needs to go on with sequence `index` at once, fit for JSON; empty if
        the number says it all."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes what `state` gave; an empty one stands for the start."""
        return


def check_slice(stream: Stream, index: int, start: int, stop: int) -> None:
    """Raises ValueError if a stream has no such slice."""
    if not (index >= 0 and 0 <= start <= stop <= stream.seq_len):
        raise ValueError(f"no slice {start}:{stop} of sequence {index} of {stream.seq_len}")


def shuffled(seed: int, round_: int, count: int, purpose: int = 0) -> Integers:
    """A random order of `count` things, keyed by (seed, round, purpose)."""
    # Raw Philox words keep their value across numpy versions; Generator.permutation may not.
    key = np.array([seed % 2**64, round_], dtype=np.uint64)
    counter = np.array([0, 0, 0, purpose], dtype=np.uint64)
    draws = np.random.Philox(key=key, counter=counter).random_raw(count)
    return np.argsort(draws, kind="stable")
