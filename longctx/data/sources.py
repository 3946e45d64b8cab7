"""Where data come from: any format becomes documents of token ids, some of them held out."""

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import numpy as np

from longctx.data.arrow import holds_ids, open_ids
from longctx.data.config import DataConfig, SourceConfig
from longctx.data.files import find_files, settled, tell_format
from longctx.data.stores import MemoryStore, Splits, TokenStore, hold_out, id_type
from longctx.data.texts import Text, TextSource, open_texts, residue
from longctx.data.tokenizer import Tokenizer, open_tokenizer
from longctx.errors import InputError

BATCH_BYTES = 2**20
"""Text that a tokenizer is given at a time, unless one document has more."""
MAX_TEXT_BYTES = 2 * 2**30
"""As much text is tokenized in memory at the start."""


def open_source(
    source: SourceConfig, data: DataConfig, verify: bool, held_out: TokenStore | None = None
) -> Splits:
    """What a source trains on, and what is held out of it or is at `data.validation_path`, which
    may be open already.

    Documents are held out by their residue. A text that is alone is cut by position: its last
    `data.validation_percent` of bytes, at least one, are the validation document.
    """
    if data.validation_path:
        there = replace(data, path=data.validation_path, mixture={})
        _check_apart(source, there)
        train = open_store(source, data, verify)
        if held_out is None:
            held_out = open_store(there, data, verify)
        _check_same_tokenizer(source, train, data, held_out)
        return Splits(train, held_out)
    source = settled(source)
    if _holds_text(source):
        texts = open_texts(source)
        batches = _batches(texts)
        start = list(islice(batches, 2))
        tokenizer = source_tokenizer(source, data)
        if len(start) == len(start[0]) == 1:
            return _cut(start[0][0], tokenizer, data.validation_percent)
        store: TokenStore = _tokenize(chain(start, batches), tokenizer)
        store.skipped = texts.skipped
    else:
        store = open_store(source, data, verify)
    return hold_out(store, data.validation_percent)


def open_store(source: SourceConfig, data: DataConfig, verify: bool) -> TokenStore:
    """All documents of a source; `verify` reads all of them before."""
    source = settled(source)
    if source.format == "tokens":
        return _open_tokens(source, data, verify)
    tokenizer = source_tokenizer(source, data)
    if source.format == "megatron":
        from longctx.data.indexed import IndexedStore

        return IndexedStore(source.path, tokenizer, verify)
    if holds_ids(source):
        return open_ids(source, tokenizer, verify)
    texts = open_texts(source)
    store = _tokenize(_batches(texts), tokenizer)
    store.skipped = texts.skipped
    return store


def source_tokenizer(source: SourceConfig, data: DataConfig) -> Tokenizer:
    """What stands behind the ids of a source: `data.tokenizer`, or else the one that a folder of
    tokens brings, or bytes for text."""
    source = settled(source)
    if data.tokenizer or _holds_text(source):
        return open_tokenizer(data.tokenizer)
    if source.format == "tokens":
        from longctx.data.folder import TokenFolder

        folder = TokenFolder(Path(source.path).expanduser(), verify=False)
        return open_tokenizer(folder.tokenizer_spec or folder.tokenizer)
    raise InputError(
        f"data.path = {source.path!r}: nobody knows what made these ids; set data.tokenizer, or "
        "ids:N for N different ids"
    )


def _holds_text(source: SourceConfig) -> bool:
    return source.format not in ("tokens", "megatron") and not holds_ids(source)


def _open_tokens(source: SourceConfig, data: DataConfig, verify: bool) -> TokenStore:
    from longctx.data.folder import TokenFolder

    folder = TokenFolder(Path(source.path).expanduser(), verify)
    if data.tokenizer and open_tokenizer(data.tokenizer).fingerprint != folder.tokenizer:
        raise InputError(
            f"data.tokenizer = {data.tokenizer!r}: another one made the ids of {source.path}; "
            "leave it empty to use that"
        )
    return folder


def _batches(texts: TextSource) -> Iterator[list[Text]]:
    """Documents in portions; no portion is empty."""
    source = texts.source
    size = yielded = 0
    _check_size(source, sum(part.size for part in texts.parts))
    batch: list[Text] = []
    for text in chain.from_iterable(map(texts.read, texts.parts)):
        size += len(text.content)
        _check_size(source, size)
        batch.append(text)
        if size - yielded >= BATCH_BYTES:
            yield batch
            batch, yielded = [], size
    if batch:
        yield batch
    if size < 2:
        raise InputError(f"data.path = {source.path!r}: needs 2 bytes of text; choose other files")


def _check_size(source: SourceConfig, size: int) -> None:
    if size > MAX_TEXT_BYTES:
        raise InputError(
            f"data.path = {source.path!r}: more than 2 GiB of text; run longctx data tokenize "
            "first, and train on the folder that it writes"
        )


def _check_apart(source: SourceConfig, held_out: SourceConfig) -> None:
    """InputError for a file that would be trained on and held out."""
    places = {_place(file) for file in _files(held_out)}
    both = next((file for file in _files(source) if _place(file) in places), None)
    if both:
        raise InputError(
            f"data.validation_path = {held_out.path!r}: {both} is in {source.path!r} too, so it "
            "would be trained on; choose others, or a glob that leaves it out"
        )


def _place(file: Path) -> tuple[int, int]:
    found = os.stat(file)
    return found.st_dev, found.st_ino


def _files(source: SourceConfig) -> Iterable[Path]:
    """What tells two sources apart; nothing is known of datasets."""
    kind = tell_format(source)
    if kind == "tokens":
        return (Path(source.path).expanduser(),)
    return find_files(source.path).values() if kind in ("text", "jsonl", "parquet") else ()


def _check_same_tokenizer(
    source: SourceConfig, train: TokenStore, data: DataConfig, held_out: TokenStore
) -> None:
    if (train.tokenizer, train.vocab_size) != (held_out.tokenizer, held_out.vocab_size):
        raise InputError(
            f"data.validation_path = {data.validation_path!r} has ids of another tokenizer "
            f"(vocabulary {held_out.vocab_size}) than {source.path!r} ({train.vocab_size}): "
            "tokenize both with the same, and name it in data.tokenizer"
        )


def _cut(text: Text, tokenizer: Tokenizer, percent: int) -> Splits:
    held_out = max(1, len(text.content) * percent // 100)
    whole = _Contents(tokenizer)
    whole.add(text)
    parts = text.content[:-held_out], text.content[-held_out:]
    train, validation = (_tokenize([[Text(text.name, part)]], tokenizer) for part in parts)
    train.content = validation.content = whole.fingerprint()
    return Splits(train, validation)


def _tokenize(batches: Iterable[list[Text]], tokenizer: Tokenizer) -> MemoryStore:
    """All documents but those that give no token, such as white space to some tokenizers."""
    tokens, residues, lengths = bytearray(), bytearray(), array("q", [0])
    contents = _Contents(tokenizer)
    for batch in batches:
        for text, ids in zip(batch, tokenizer.encode_batch([text.content for text in batch])):
            contents.add(text)
            if len(ids):
                tokens += ids.tobytes()
                lengths.append(len(ids))
                residues.append(residue(text.name))
    if not tokens:
        raise InputError(
            f"data: {tokenizer.name} makes no token of the text, or of the part that is held out; "
            "choose other files, or set data.validation_path"
        )
    return MemoryStore(
        tokens=np.frombuffer(tokens, dtype=id_type(tokenizer.vocab_size)),
        offsets=np.cumsum(np.array(lengths, dtype=np.int64)),
        residues=np.frombuffer(residues, dtype=np.uint8),
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.fingerprint,
        content=contents.fingerprint(),
    )


class _Contents:
    """A hash over all names, sizes and contents, and over what makes ids of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._digest = hashlib.sha256()
        self._tokenizer = tokenizer.fingerprint

    def add(self, text: Text) -> None:
        self._digest.update(os.fsencode(text.name) + b"\0")
        self._digest.update(len(text.content).to_bytes(8, "little"))
        self._digest.update(text.content)

    def fingerprint(self) -> str:
        """Of bytes it is the hash of the text alone, as their ids are the text."""
        text = self._digest.hexdigest()
        if self._tokenizer == "bytes":
            return text
        return hashlib.sha256(f"{text} {self._tokenizer}".encode()).hexdigest()
