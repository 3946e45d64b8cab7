"""Documents or generated tasks to batches, each a pure function of (seed, step)."""

from longctx.data.config import DataConfig
from longctx.data.loader import Batch, Loader, Loaders
from longctx.data.opening import build_loaders
from longctx.data.packing import PackedStream
from longctx.data.prefetch import Prefetch
from longctx.data.sources import open_source, source_tokenizer
from longctx.data.streams import IGNORE, PackedSequence
from longctx.data.tokenizer import ByteTokenizer, Tokenizer, find_tokenizer, open_tokenizer

__all__ = [
    "IGNORE",
    "Batch",
    "ByteTokenizer",
    "DataConfig",
    "Loader",
    "Loaders",
    "PackedSequence",
    "PackedStream",
    "Prefetch",
    "Tokenizer",
    "build_loaders",
    "find_tokenizer",
    "open_source",
    "open_tokenizer",
    "source_tokenizer",
]
