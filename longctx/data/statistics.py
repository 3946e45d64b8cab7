"""`longctx data stats`: how long documents are, and what each packing makes of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longctx.data.bins import Layout, best_fit, whole
from longctx.data.config import DataConfig
from longctx.data.files import tell_format
from longctx.data.folder import TokenFolder
from longctx.data.options import PathOptions
from longctx.data.sources import open_store
from longctx.data.stores import Integers
from longctx.errors import InputError

PERCENTS = (0, 5, 25, 50, 75, 95, 99, 100)
LONG = {"8K": 2**13, "32K": 2**15, "128K": 2**17, "1M": 2**20}


@dataclass(frozen=True)
class StatsConfig(PathOptions):
    """Options of `longctx data stats`."""

    tokenizer: str = ""
    """As data.tokenizer: a file, bytes or ids:N; empty means bytes for text, and for tokens the one
    that made them."""
    seq_len: int = 8192
    """Tokens of a sequence, for the shares of padding."""

    def __post_init__(self) -> None:
        if not 1 <= self.seq_len < 2**62:
            raise InputError(f"--seq_len = {self.seq_len}: must be at least 1 and below 2 ** 62")


@dataclass(frozen=True)
class Packing:
    """What a packing makes of all documents."""

    sequences: float
    """Sequences of an epoch; concat may end within one."""
    padding: float
    """Share of their tokens."""
    cut: float
    """Share of the documents that lie in more than one sequence."""


@dataclass(frozen=True)
class Statistics:
    """Lengths in tokens, marks included."""

    documents: int
    tokens: int
    percentiles: dict[int, int]
    long: dict[str, tuple[int, int]]
    """Documents of at least this length, and their tokens."""
    packings: dict[str, Packing]
    bytes_per_token: float | None
    """None where nobody counted the bytes of text."""


def measure(lengths: Integers, seq_len: int, text_bytes: int | None = None) -> Statistics:
    """Statistics of documents of these lengths."""
    tokens = int(lengths.sum())
    ordered = np.sort(lengths)
    places = [round(percent / 100 * (len(ordered) - 1)) for percent in PERCENTS]
    at_least = {name: ordered[np.searchsorted(ordered, floor) :] for name, floor in LONG.items()}
    documents = np.arange(len(lengths))
    fitted, alone = best_fit(documents, lengths, seq_len), whole(documents, lengths, seq_len)
    is_long = float((lengths > seq_len).mean())
    return Statistics(
        documents=len(lengths),
        tokens=tokens,
        percentiles={percent: int(ordered[place]) for percent, place in zip(PERCENTS, places)},
        long={name: (len(found), int(found.sum())) for name, found in at_least.items()},
        packings={
            "concat": Packing(tokens / seq_len, 0.0, _cut_by_concat(lengths, seq_len)),
            "best_fit": _packing(fitted, tokens, seq_len, is_long),
            "whole": _packing(alone, tokens, seq_len, is_long),
        },
        bytes_per_token=None if text_bytes is None else text_bytes / tokens,
    )


def stats(path: str, config: StatsConfig) -> Iterator[tuple[str, str]]:
    """What is known of the documents at a path, as labels and values."""
    source = config.source(path)
    if tell_format(source) == "tokens":
        folder = TokenFolder(Path(path).expanduser(), verify=False)
        lengths, text_bytes = folder.lengths, folder.text_bytes
    else:
        store = open_store(source, DataConfig(tokenizer=config.tokenizer), verify=False)
        lengths, text_bytes = store.lengths, None
    found = measure(lengths, config.seq_len, text_bytes)
    yield "documents", f"{found.documents:,}"
    yield "tokens", f"{found.tokens:,}"
    if found.bytes_per_token is not None:
        yield "bytes of text a token", f"{found.bytes_per_token:.2f}"
    yield "tokens a document", f"{found.tokens / found.documents:,.1f}"
    for percent, length in found.percentiles.items():
        names = {0: "shortest", 50: "median", 100: "longest"}
        yield f"  {names.get(percent, f'{percent} % have at most')}", f"{length:,}"
    for name, (documents, tokens) in found.long.items():
        share = tokens / found.tokens
        yield f"at least {name}", f"{documents:,} documents, {tokens:,} tokens ({share:.1%})"
    for name, packing in found.packings.items():
        yield (
            f"{name}, {config.seq_len:,} tokens",
            f"{packing.sequences:,.0f} sequences, {packing.padding:.2%} padding, "
            f"{packing.cut:.1%} of documents cut",
        )


def _packing(layout: Layout, tokens: int, seq_len: int, is_cut: float) -> Packing:
    return Packing(layout.bins, 1 - tokens / (layout.bins * seq_len), is_cut)


def _cut_by_concat(lengths: Integers, seq_len: int) -> float:
    """Expected over all orders: a document of n tokens begins anywhere in a sequence."""
    return float(np.minimum(1.0, (lengths - 1) / seq_len).mean())
