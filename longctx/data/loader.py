"""Batches as a pure function of the step: nothing to save, nothing to skip on resume."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from longctx.data.packing import PackedStream
from longctx.data.sources import DataConfig, open_corpus, unigram_entropy
from longctx.data.synthetic import GeneratedStream, answer_entropy
from longctx.data.tokenizer import ByteTokenizer

VALIDATION_SEED = 0


@dataclass(frozen=True)
class Batch:
    """Some packed sequences, or the same part of each."""

    tokens_BT: torch.Tensor
    labels_BT: torch.Tensor
    """The next token, or the answer of a task; IGNORE where there is none in the document."""
    documents: tuple[tuple[int, ...], ...]
    """For every row where documents start in the whole sequence, rising from 0."""
    sequence_ids: tuple[int, ...]
    """The place of each row in the stream, the same for any split of the work."""


class Loader:
    """Reads sequences of a stream; without `document_reset` each sequence is one document."""

    def __init__(
        self, stream: PackedStream | GeneratedStream, batch_size: int, document_reset: bool
    ) -> None:
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
        if not self._document_reset:
            return self._stream.seq_len * len(ids)
        return sum(map(self._stream.num_labels, ids))

    def _row(
        self, index: int, segments: Sequence[tuple[int, int]]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
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
    """Of the held-out text, in nats a byte, or of the answers of a task."""
    fingerprint: str
    """Of the whole corpus, or of a task's first sequences; a resumed run must find the same."""
    vocab_size: int


def build_loaders(config: DataConfig, seq_len: int, batch_size: int, seed: int) -> Loaders:
    """Read `[data]`; validation order does not depend on `seed`, so runs can be compared."""
    if config.task:
        return _generated(config, seq_len, batch_size, seed)
    corpus = open_corpus(config)
    held_out = corpus.load("validation")
    train = PackedStream(corpus.load("train"), seq_len, seed)
    validation = PackedStream(held_out, seq_len, VALIDATION_SEED)
    return Loaders(
        train=Loader(train, batch_size, config.document_reset),
        validation=Loader(validation, batch_size, config.document_reset),
        unigram_entropy=unigram_entropy(held_out.tokens),
        fingerprint=corpus.fingerprint(),
        vocab_size=ByteTokenizer.vocab_size,
    )


def _generated(config: DataConfig, seq_len: int, batch_size: int, seed: int) -> Loaders:
    train = GeneratedStream(config, seq_len, seed, "train")
    validation = GeneratedStream(config, seq_len, VALIDATION_SEED, "validation")
    return Loaders(
        train=Loader(train, batch_size, document_reset=True),
        validation=Loader(validation, batch_size, document_reset=True),
        unigram_entropy=answer_entropy(config),
        fingerprint=validation.fingerprint(),
        vocab_size=config.vocabulary,
    )
