"""Batches as a pure function of the step: nothing to skip on resume."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from longctx.data.stores import Integers
from longctx.data.streams import Stream
from longctx.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Batch:
    """Some packed sequences, or the same part of each."""

    tokens_BT: torch.Tensor
    labels_BT: torch.Tensor
    """The next token, or the answer of a task; IGNORE where there is none in the document."""
    documents: tuple[tuple[int, ...], ...]
    """For every row where documents, or padding, start in the whole sequence, rising from 0."""
    sequence_ids: tuple[int, ...]
    """The place of each row in the stream, the same for any split of the work."""


class Loader:
    """Reads sequences of a stream; without `document_reset` each sequence is one document."""

    def __init__(self, stream: Stream, batch_size: int, document_reset: bool) -> None:
        self._stream = stream
        self._batch_size = batch_size
        self._document_reset = document_reset

    def ids(self, step: int) -> range:
        """The sequences of a step's batch."""
        return range(step * self._batch_size, (step + 1) * self._batch_size)

    def batch(self, step: int) -> Batch:
        """All of a step's sequences, whole."""
        return self.read(self.ids(step), [(0, self._stream.seq_len)])

    def read(self, ids: Sequence[int], segments: Sequence[tuple[int, int]]) -> Batch:
        """These segments `(start, stop)`, side by side, of these sequences, and nothing else."""
        rows = [self._row(index, segments) for index in ids]
        tokens, labels = (torch.from_numpy(np.stack(columns)) for columns in zip(*rows))
        documents = tuple(self._starts(index) for index in ids)
        return Batch(tokens, labels, documents, tuple(ids))

    def num_valid(self, ids: Sequence[int]) -> int:
        """Labels of whole sequences that count in the loss, known without reading them."""
        count = self._stream.num_labels if self._document_reset else self._stream.num_joined
        return sum(map(count, ids))

    def state(self, step: int) -> dict[str, Any]:
        """What a resume needs to begin step `step`, from 0 on, at once; empty unless data are
        streamed. JSON holds it."""
        return self._stream.state(step * self._batch_size)

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes what `state` gave; without it a stream is read from its start."""
        self._stream.load_state(state)

    def _row(self, index: int, segments: Sequence[tuple[int, int]]) -> tuple[Integers, Integers]:
        parts = [self._stream.slice(index, start, stop) for start, stop in segments]
        if not self._document_reset:
            parts = [part.as_one_document() for part in parts]
        return (
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.labels for part in parts]),
        )

    def _starts(self, index: int) -> tuple[int, ...]:
        if not self._document_reset:
            return (0,)
        return tuple(s for s in self._stream.document_starts(index) if s < self._stream.seq_len)


@dataclass(frozen=True)
class Loaders:
    """What a run needs to know about its data."""

    train: Loader
    validation: Loader
    unigram_entropy: float
    """Of the held-out text, in nats a token, or of the answers of a task."""
    fingerprint: str
    """Of the whole corpus, or of a task's first sequences; a resumed run must find the same."""
    vocab_size: int
    tokenizer: Tokenizer
    skipped: int = 0
    """Rows that `data.bad_rows` has left out."""

    def state(self, step: int) -> dict[str, Any]:
        """What the loader of training needs to go on with step `step`; see `Loader.state`."""
        return self.train.state(step)

    def load_state(self, state: dict[str, Any]) -> None:
        """Gives it back."""
        self.train.load_state(state)
