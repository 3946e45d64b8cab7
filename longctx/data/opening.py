"""From the `[data]` table to loaders."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from longctx.data.bins import BinStream, best_fit, whole
from longctx.data.config import DataConfig, MixtureConfig, SourceConfig
from longctx.data.files import settled
from longctx.data.loader import Loader, Loaders
from longctx.data.mixture import MixedStream
from longctx.data.packing import PackedStream, epoch_documents
from longctx.data.sources import open_source, source_tokenizer
from longctx.data.stores import Integers, TokenStore
from longctx.data.streamed import Place, RowEncoder, Rows, StreamedStream
from longctx.data.streams import Stream
from longctx.data.synthetic import GeneratedStream, answer_entropy
from longctx.data.texts import residue
from longctx.data.tokenizer import Tokenizer, open_tokenizer
from longctx.errors import InputError

VALIDATION_SEED = 0
COUNTED = 4_000_000
"""Held-out tokens whose entropy is taken."""
COUNTED_AT_ONCE = 1024
"""Documents; there are as many counts as ids in the vocabulary."""
COUNTED_STREAMED = 65_536
FINGERPRINTED_ROWS = 8


@dataclass(frozen=True)
class _Opened:
    """A source."""

    train: Stream
    validation: Stream
    tokenizer: Tokenizer
    fingerprint: str
    counts: Integers
    """How often each id is in what is held out."""
    skipped: int = 0


def build_loaders(
    config: DataConfig, seq_len: int, batch_size: int, seed: int, verify: bool = True
) -> Loaders:
    """Opens `[data]`; validation order does not depend on `seed`, so runs can be compared.

    `verify` = False skips `data.verify`, for processes that share files with one that verifies.
    """
    if config.task:
        return _generated(config, seq_len, batch_size, seed)
    opener = _Opener(config, seq_len, batch_size, seed, verify and config.verify)
    opened = {name: opener.open(source) for name, source in config.sources().items()}
    _check_vocabularies(opened)
    weights = {
        name: source.weight if isinstance(source, MixtureConfig) else 1.0
        for name, source in config.sources().items()
    }
    tokenizer = next(iter(opened.values())).tokenizer
    # A path of its own is the same whatever the source.
    held_out = dict(islice(opened.items(), 1)) if config.validation_path else opened
    train = {name: source.train for name, source in opened.items()}
    validation = {name: source.validation for name, source in held_out.items()}
    return Loaders(
        train=Loader(_mixed(train, weights, seed), batch_size, config.document_reset),
        validation=Loader(
            _mixed(validation, weights, VALIDATION_SEED), batch_size, config.document_reset
        ),
        unigram_entropy=unigram_entropy(
            [source.counts for source in held_out.values()],
            [weights[name] for name in held_out],
            tokenizer,
        ),
        fingerprint=_fingerprint({name: s.fingerprint for name, s in opened.items()}),
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer,
        skipped=sum(source.skipped for source in opened.values()),
    )


@dataclass
class _Opener:
    """Opens the sources of a table."""

    config: DataConfig
    seq_len: int
    batch_size: int
    seed: int
    verify: bool
    held_out: TokenStore | None = None
    """What is at `data.validation_path`, once it is open."""

    def open(self, source: SourceConfig) -> _Opened:
        return self._streamed(source) if source.streaming else self._stored(source)

    def _stored(self, source: SourceConfig) -> _Opened:
        source = settled(source)
        splits = open_source(source, self.config, self.verify, self.held_out)
        train, validation = splits
        if self.config.validation_path:
            self.held_out = validation
        return _Opened(
            self._packed(train, self.seed, epoch_documents(train, self.config)),
            self._packed(validation, VALIDATION_SEED, np.arange(len(validation.lengths))),
            source_tokenizer(source, self.config),
            splits.fingerprint(),
            count_tokens(validation),
            train.skipped if source.bad_rows == "skip" else 0,
        )

    def _packed(self, store: TokenStore, seed: int, documents: Integers) -> Stream:
        packing, seq_len = self.config.packing, self.seq_len
        if packing == "concat":
            return PackedStream(store, seq_len, seed, documents)
        lay_out = best_fit if packing == "best_fit" else whole
        layout = lay_out(documents, store.lengths[documents], seq_len)
        return BinStream(store, layout, seq_len, seed)

    def _streamed(self, source: SourceConfig) -> _Opened:
        from longctx.data.hub import open_dataset

        config, where = self.config, f"data.path = {source.path!r}"
        for field, harmless in (("packing", "concat"), ("long_repeat", 1)):
            if getattr(config, field) != harmless:
                raise InputError(
                    f"data.{field} = {getattr(config, field)!r} needs the lengths of all documents "
                    f"first, and {where} is streamed: run longctx data tokenize, or set "
                    "streaming = false"
                )
        tokenizer, dataset = open_tokenizer(config.tokenizer), open_dataset(source)
        held_out, percent = dataset, config.validation_percent
        if config.validation_path:
            held_out, percent = open_dataset(replace(source, path=config.validation_path)), 0
        every = RowEncoder(source, tokenizer)
        train = Rows(
            dataset,
            RowEncoder(source, tokenizer, config.shortest),
            lambda name: residue(name) >= percent,
            self.seed,
        )
        validation = Rows(
            held_out, every, lambda name: not percent or residue(name) < percent, None
        )
        # What is read twice: sequences of a step, by the thread that counts labels and the one that
        # reads ahead; and held-out ones, at each evaluation.
        near, all_ = 2 * self.batch_size, 2**62
        held_out_stream = StreamedStream(validation, self.seq_len, all_)
        return _Opened(
            StreamedStream(train, self.seq_len, near),
            held_out_stream,
            tokenizer,
            _rows_fingerprint(Rows(dataset, every, lambda _: True, None), tokenizer),
            _count_streamed(held_out_stream, tokenizer.vocab_size),
        )


def unigram_entropy(
    counts: Sequence[Integers], weights: Sequence[float], tokenizer: Tokenizer
) -> float:
    """Entropy in nats of the distribution of single tokens; the document marks do not count.

    A model whose loss is not below it has learnt nothing from context. Sources, of each of which
    there are counts, have shares as their weights.
    """
    total = np.zeros(tokenizer.vocab_size)
    for counted, weight in zip(counts, weights):
        counted = counted.copy()
        for mark in (tokenizer.begin, tokenizer.end):
            if mark is not None:
                counted[mark] = 0
        total += counted / max(1, counted.sum()) * (weight / sum(weights))
    found = total[total > 0]
    return math.fsum(-found * np.log(found))


def count_tokens(store: TokenStore) -> Integers:
    """How often each id is in the first documents of a store."""
    counts = np.zeros(store.vocab_size, dtype=np.int64)
    left = COUNTED
    for first in range(0, len(store.lengths), COUNTED_AT_ONCE):
        parts = []
        for document in range(first, min(first + COUNTED_AT_ONCE, len(store.lengths))):
            parts.append(store.read(document, 0, min(int(store.lengths[document]), left)))
            left -= len(parts[-1])
        counts += np.bincount(np.concatenate(parts), minlength=store.vocab_size)
        if not left:
            break
    return counts


def _count_streamed(stream: StreamedStream, vocab_size: int) -> Integers:
    """As `count_tokens`, of what begins in the first epoch."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for index in range(max(1, COUNTED_STREAMED // stream.seq_len)):
        tokens = stream.slice(index, 0, stream.seq_len).tokens
        if index and stream.state(index)["epoch"]:
            break
        counts += np.bincount(tokens, minlength=vocab_size)
    return counts


def _check_vocabularies(opened: dict[str, _Opened]) -> None:
    (first, one), *others = opened.items()
    for name, other in others:
        if other.tokenizer.fingerprint != one.tokenizer.fingerprint:
            raise InputError(
                f"data.mixture.{name} has ids of another tokenizer ({other.tokenizer.name}, "
                f"vocabulary {other.tokenizer.vocab_size}) than data.mixture.{first} "
                f"({one.tokenizer.name}, {one.tokenizer.vocab_size}): tokenize both with the same"
            )


def _mixed(streams: dict[str, Stream], weights: dict[str, float], seed: int) -> Stream:
    if len(streams) == 1:
        return next(iter(streams.values()))
    return MixedStream(streams, weights, seed)


def _fingerprint(of_sources: dict[str, str]) -> str:
    if list(of_sources) == [""]:
        return of_sources[""]
    return hashlib.sha256(json.dumps(of_sources, sort_keys=True).encode()).hexdigest()


def _rows_fingerprint(rows: Rows, tokenizer: Tokenizer) -> str:
    """sha256 of the first documents and the number of shards: more is not known at the start."""
    digest = hashlib.sha256(f"{tokenizer.fingerprint} {rows.num_shards}".encode())
    for _, ids in islice(rows.read(Place()), FINGERPRINTED_ROWS):
        digest.update(ids.astype(np.int64).tobytes() + b"\0")
    return digest.hexdigest()


def _generated(config: DataConfig, seq_len: int, batch_size: int, seed: int) -> Loaders:
    train = GeneratedStream(config, seq_len, seed, "train")
    validation = GeneratedStream(config, seq_len, VALIDATION_SEED, "validation")
    return Loaders(
        train=Loader(train, batch_size, document_reset=True),
        validation=Loader(validation, batch_size, document_reset=True),
        unigram_entropy=answer_entropy(config),
        fingerprint=validation.fingerprint(),
        vocab_size=config.vocabulary,
        tokenizer=open_tokenizer(f"ids:{config.vocabulary}"),
    )
