"""Generated tasks that ask for recall: sequences as a pure function of (seed, split, index).

`mqar` is multi-query associative recall (Zoology, arXiv 2312.04927): keys with a value each, then
queries, which are some of these keys, in random places. At a query the label is the key's value,
which is not shown again. Ours: places are uniform, and no token between them is a key or value of
the sequence, so every answer is unambiguous.

`needle` hides pairs of a key and its value anywhere in a long sequence of other tokens, and asks
for values at its end.

`selective_copying` (Mamba, arXiv 2312.00752): letters in random places among noise, then as many
markers; at each marker the label is the next letter.
"""

import hashlib
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import numpy as np

from longctx.data.config import DataConfig
from longctx.data.stores import Integers
from longctx.data.streams import IGNORE, PackedSequence, Stream
from longctx.errors import InputError

Split = Literal["train", "validation"]

NOISE, MARKER = 0, 1
NUM_SIGNS = 2
"""Tokens of selective copying that are no letters."""
MOST_DRAWS = 10_000
KEPT = 512
"""Sequences that a stream remembers: validation reads the same ones again and again."""
FINGERPRINTED = 8


class Draws:
    """Random numbers of one sequence."""

    def __init__(self, seed: int, split: Split, index: int) -> None:
        # Raw Philox words keep their value across numpy versions; Generator's methods may not.
        key = np.array([seed % 2**64, split == "validation"], dtype=np.uint64)
        counter = np.array([0, 0, 0, index], dtype=np.uint64)
        self._words = np.random.Philox(key=key, counter=counter)

    def below(self, limit: int, count: int) -> Integers:
        """`count` numbers from 0 to `limit` - 1."""
        return (self._words.random_raw(count) % np.uint64(limit)).astype(np.int64)

    def choose(self, limit: int, count: int) -> Integers:
        """`count` different numbers from 0 to `limit` - 1, in random order."""
        return np.argsort(self._words.random_raw(limit), kind="stable")[:count]


def _mqar(config: DataConfig, seq_len: int, draws: Draws) -> tuple[Integers, Integers]:
    first_value = config.vocabulary // 2
    keys = draws.choose(first_value, config.pairs)
    values = first_value + draws.choose(config.vocabulary - first_value, config.pairs)
    is_other = np.ones(config.vocabulary, dtype=bool)
    is_other[keys] = is_other[values] = False
    others = np.flatnonzero(is_other)
    told = 2 * config.pairs
    tokens = others[draws.below(len(others), seq_len)]
    tokens[:told:2], tokens[1:told:2] = keys, values
    places = told + draws.choose(seq_len - told, config.answers)
    asked = draws.choose(config.pairs, config.answers)
    labels = np.full(seq_len, IGNORE)
    tokens[places], labels[places] = keys[asked], values[asked]
    return tokens, labels


def _needle(config: DataConfig, seq_len: int, draws: Draws) -> tuple[Integers, Integers]:
    third, shown = config.vocabulary // 3, seq_len - config.answers
    keys = draws.choose(third, config.pairs)
    values = third + draws.choose(third, config.pairs)
    tokens = 2 * third + draws.below(config.vocabulary - 2 * third, seq_len)
    # Pairs lie in the slots of a sequence in which each takes up one.
    starts = np.sort(draws.choose(shown - config.pairs, config.pairs)) + np.arange(config.pairs)
    tokens[starts], tokens[starts + 1] = keys, values
    asked = draws.choose(config.pairs, config.answers)
    labels = np.full(seq_len, IGNORE)
    tokens[shown:], labels[shown:] = keys[asked], values[asked]
    return tokens, labels


def _selective_copying(config: DataConfig, seq_len: int, draws: Draws) -> tuple[Integers, Integers]:
    letters = NUM_SIGNS + draws.below(config.vocabulary - NUM_SIGNS, config.answers)
    shown = seq_len - config.answers
    tokens, labels = np.full(seq_len, NOISE), np.full(seq_len, IGNORE)
    tokens[np.sort(draws.choose(shown, config.answers))] = letters
    tokens[shown:], labels[shown:] = MARKER, letters
    return tokens, labels


TASKS: dict[str, Callable[[DataConfig, int, Draws], tuple[Integers, Integers]]] = {
    "mqar": _mqar,
    "needle": _needle,
    "selective_copying": _selective_copying,
}


class GeneratedStream(Stream):
    """An endless stream of sequences of a task, one document each; what `PackedStream` is of text.

    A sequence is held out if the sha256 of its tokens, modulo 100, is below `validation_percent`,
    and is drawn anew until it belongs to the split: no sequence is in both.
    """

    def __init__(self, config: DataConfig, seq_len: int, seed: int, split: Split) -> None:
        self.seq_len = seq_len
        self._config, self._seed, self._split = config, seed, split
        self._sequence = lru_cache(maxsize=KEPT)(self._draw)

    def slice(self, index: int, start: int, stop: int) -> PackedSequence:
        """Tokens `start` to `stop` of sequence `index`, with the answers as labels."""
        tokens, labels = self._sequence(index)
        # Nothing follows: the next sequence is another document.
        return PackedSequence(tokens[start:stop], labels[start:stop], IGNORE)

    def document_starts(self, index: int) -> tuple[int, ...]:
        """A sequence is a document, and so is the next one."""
        return (0, self.seq_len)

    def num_labels(self, index: int) -> int:
        """Answers of a sequence."""
        return self._config.answers

    def fingerprint(self) -> str:
        """sha256 of the first sequences; it changes if the generator does."""
        digest = hashlib.sha256()
        for index in range(FINGERPRINTED):
            for part in self._sequence(index):
                digest.update(part.tobytes())
        return digest.hexdigest()

    def _draw(self, index: int) -> tuple[Integers, Integers]:
        config, draws = self._config, Draws(self._seed, self._split, index)
        for _ in range(MOST_DRAWS):
            tokens, labels = TASKS[config.task](config, self.seq_len, draws)
            digest = hashlib.sha256(tokens.tobytes()).digest()
            residue = int.from_bytes(digest[:8], "big") % 100
            if (residue < config.validation_percent) == (self._split == "validation"):
                return tokens, labels
        raise InputError(
            f"data.task = {config.task!r}: {MOST_DRAWS:,} draws gave no sequence for "
            f"{self._split}; raise data.vocabulary, data.answers or train.seq_len"
        )


def answer_entropy(config: DataConfig) -> float:
    """Entropy in nats of the answers, which are uniform: the loss of guessing without looking."""
    possible = {
        "mqar": config.vocabulary - config.vocabulary // 2,
        "needle": config.vocabulary // 3,
        "selective_copying": config.vocabulary - NUM_SIGNS,
    }
    return math.log(possible[config.task])
