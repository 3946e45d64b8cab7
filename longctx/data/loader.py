"""Batches as a pure function of the step: nothing to save, nothing to skip on resume."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from longctx.data.packing import IGNORE, PackedStream
from longctx.data.sources import DataConfig, open_corpus, unigram_entropy
from longctx.data.tokenizer import ByteTokenizer

VALIDATION_SEED = 0


@dataclass(frozen=True)
class Batch:
    """Some packed sequences."""

    tokens_BT: torch.Tensor
    labels_BT: torch.Tensor
    """The next token; IGNORE where it belongs to another document."""
    documents_BT: torch.Tensor
    """int32; equal ids in a row mean the same document."""
    sequence_ids: tuple[int, ...]
    """The place of each row in the stream, the same for any split of the work."""


class Loader:
    """Cuts a stream into batches; without `document_reset` each sequence is one document."""

    def __init__(self, stream: PackedStream, batch_size: int, document_reset: bool) -> None:
        self._stream = stream
        self._batch_size = batch_size
        self._document_reset = document_reset

    def batch(self, step: int) -> Batch:
        """Sequences step * batch_size to (step + 1) * batch_size - 1."""
        ids = range(step * self._batch_size, (step + 1) * self._batch_size)
        rows = [self._stream.sequence(index) for index in ids]
        if not self._document_reset:
            rows = [row.as_one_document() for row in rows]
        return Batch(
            tokens_BT=torch.from_numpy(np.stack([row.tokens for row in rows])),
            labels_BT=torch.from_numpy(np.stack([row.labels for row in rows])),
            documents_BT=torch.from_numpy(np.stack([row.document_ids for row in rows])),
            sequence_ids=tuple(ids),
        )


@dataclass(frozen=True)
class Loaders:
    """What a run needs to know about its data."""

    train: Loader
    validation: Loader
    unigram_entropy: float
    """Of the held-out text, in nats a byte."""
    fingerprint: str
    """Of the whole corpus; a resumed run must find the same."""
    vocab_size: int


def build_loaders(config: DataConfig, seq_len: int, batch_size: int, seed: int) -> Loaders:
    """Read `[data]`; validation order does not depend on `seed`, so runs can be compared."""
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


def split(batch: Batch, micro_batch: int) -> Iterator[Batch]:
    """Consecutive micro-batches of `micro_batch` sequences; the last may be smaller."""
    for start in range(0, len(batch.sequence_ids), micro_batch):
        rows = slice(start, start + micro_batch)
        yield Batch(
            tokens_BT=batch.tokens_BT[rows],
            labels_BT=batch.labels_BT[rows],
            documents_BT=batch.documents_BT[rows],
            sequence_ids=batch.sequence_ids[rows],
        )


def num_valid(batch: Batch) -> int:
    """Labels that count in the loss."""
    return int((batch.labels_BT != IGNORE).sum())
