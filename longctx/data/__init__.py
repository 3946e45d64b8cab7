"""Text files or generated tasks to batches, each a pure function of (seed, step)."""

from longctx.data.loader import Batch, Loader, Loaders, build_loaders
from longctx.data.packing import IGNORE, PackedSequence, PackedStream
from longctx.data.sources import Corpus, DataConfig, Document, open_corpus, unigram_entropy
from longctx.data.tokenizer import ByteTokenizer

__all__ = [
    "IGNORE",
    "Batch",
    "ByteTokenizer",
    "Corpus",
    "DataConfig",
    "Document",
    "Loader",
    "Loaders",
    "PackedSequence",
    "PackedStream",
    "build_loaders",
    "open_corpus",
    "unigram_entropy",
]
