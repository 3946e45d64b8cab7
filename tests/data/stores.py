"""Stores of documents for tests."""

from collections.abc import Sequence

import numpy as np

from longctx.data.stores import MemoryStore


def make_store(lengths: Sequence[int], vocab_size: int = 2**16) -> MemoryStore:
    """Documents of these lengths whose tokens count up from 0 through all of them."""
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    return MemoryStore(
        tokens=(np.arange(offsets[-1]) % vocab_size).astype(np.uint16),
        offsets=offsets,
        residues=(np.arange(len(lengths)) % 100).astype(np.uint8),
        vocab_size=vocab_size,
        tokenizer="",
        content="made",
    )
