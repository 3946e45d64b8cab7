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
from longctx.data.files import settled
from longctx.data.stores import MemoryStore, Splits, TokenStore, hold_out, id_type
from longctx.data.texts import Text, open_texts, residue
from longctx.data.tokenizer import Tokenizer, open_tokenizer
from longctx.errors import InputError

MAX_TEXT_BYTES = 2 * 2**30
"""As much text is tokenized in memory at the start."""


def open_source(source: SourceConfig, data: DataConfig, verify: bool) -> Splits:
    """What a source trains on, and what is held out of it or is at `data.validation_path`.

    Documents are held out by their residue. A text that is alone is cut by position: its last
    `data.validation_percent` of bytes, at least one, are the validation document.
    """
    if data.validation_path:
        held_out = replace(source, path=data.validation_path)
        return Splits(open_store(source, data, verify), open_store(held_out, data, verify))
    source = settled(source)
    if _holds_text(source):
        batches = _batches(source)
        start = list(islice(batches, 2))
        tokenizer = source_tokenizer(source, data)
        if len(start) == len(start[0]) == 1:
            return _cut(start[0][0], tokenizer, data.validation_percent)
        store: TokenStore = _tokenize(chain(start, batches), tokenizer)
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
    return _tokenize(_batches(source), tokenizer)


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


def _batches(source: SourceConfig) -> Iterator[list[Text]]:
    """Documents in portions; no portion is empty."""
    texts = open_texts(source)
    size, expected = 0, sum(part.size for part in texts.parts)
    for part in texts.parts:
        if max(size, expected) > MAX_TEXT_BYTES:
            raise InputError(
                f"data.path = {source.path!r}: more than 2 GiB of text; run longctx data tokenize "
                "first, and train on the folder that it writes"
            )
        if batch := list(texts.read(part)):
            size += sum(len(text.content) for text in batch)
            yield batch
    if size < 2:
        raise InputError(f"data.path = {source.path!r}: needs 2 bytes of text; choose other files")


def _cut(text: Text, tokenizer: Tokenizer, percent: int) -> Splits:
    held_out = max(1, len(text.content) * percent // 100)
    whole = _Contents(tokenizer)
    whole.add(text)
    parts = text.content[:-held_out], text.content[-held_out:]
    train, validation = (_tokenize([[Text(text.name, part)]], tokenizer) for part in parts)
    train.content = validation.content = whole.fingerprint()
    return Splits(train, validation)


def _tokenize(batches: Iterable[list[Text]], tokenizer: Tokenizer) -> MemoryStore:
    tokens, residues, lengths = bytearray(), bytearray(), array("q", [0])
    contents = _Contents(tokenizer)
    for batch in batches:
        for text, ids in zip(batch, tokenizer.encode_batch([text.content for text in batch])):
            contents.add(text)
            tokens += ids.tobytes()
            lengths.append(len(ids))
            residues.append(residue(text.name))
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
