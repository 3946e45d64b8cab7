"""Text to token ids and back; every tokenizer frames a document by the marks it has."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from longctx.data.stores import Ids, id_type
from longctx.errors import InputError

NUM_BYTES = 256
JSON_FILE = "tokenizer.json"
MODEL_FILE = "tokenizer.model"


class Tokenizer(Protocol):
    """What text becomes; the same file gives the same ids everywhere."""

    vocab_size: int
    fingerprint: str
    """sha256 of the file that decides the ids; "bytes" or "ids:N" where there is no file."""
    name: str
    """For messages: a path, "bytes" or "ids:N"."""
    begin: int | None
    """The mark that opens a document, or None."""
    end: int | None
    """The mark that closes a document, or None."""

    def encode(self, text: bytes) -> Ids:
        """A whole document with its marks."""
        ...

    def encode_batch(self, texts: Sequence[bytes]) -> list[Ids]:
        """Several documents, on several threads where the tokenizer has them."""
        ...

    def encode_prompt(self, text: str) -> Ids:
        """The start of a document to be continued: begin mark and text, without an end mark."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; marks are dropped, broken characters become U+FFFD."""
        ...

    def save(self, folder: Path) -> None:
        """Put the file that decides the ids, if there is one, where `find_tokenizer` sees it."""
        ...


class ByteTokenizer:
    """Bytes keep their value as ids; two marks open and close every document."""

    begin = NUM_BYTES
    end = NUM_BYTES + 1
    vocab_size = NUM_BYTES + 2
    fingerprint = name = "bytes"

    def encode(self, text: bytes) -> Ids:
        """A whole document: begin mark, its bytes, end mark."""
        tokens = np.empty(len(text) + 2, dtype=id_type(self.vocab_size))
        tokens[0] = self.begin
        tokens[1:-1] = np.frombuffer(text, dtype=np.uint8)
        tokens[-1] = self.end
        return tokens

    def encode_batch(self, texts: Sequence[bytes]) -> list[Ids]:
        """Several documents, one after the other."""
        return [self.encode(text) for text in texts]

    def encode_prompt(self, text: str) -> Ids:
        """Begin mark and the UTF-8 bytes, without an end mark."""
        return self.encode(text.encode(errors="surrogateescape"))[:-1]

    def decode(self, ids: Iterable[int]) -> str:
        """UTF-8 text of the byte ids; marks are dropped, broken sequences become U+FFFD."""
        return bytes(byte for byte in map(int, ids) if byte < NUM_BYTES).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """There is no file to save."""


class IdTokenizer:
    """Stands for ids below `vocab_size` whose text nobody knows."""

    begin = end = None

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.fingerprint = self.name = f"ids:{vocab_size}"

    def encode(self, text: bytes) -> Ids:
        """Refused: there is no text."""
        raise InputError(
            f"{self.name} stands for no text ({len(text)} bytes given): name a tokenizer file"
        )

    def encode_batch(self, texts: Sequence[bytes]) -> list[Ids]:
        """Refused: there is no text."""
        return [self.encode(text) for text in texts]

    def encode_prompt(self, text: str) -> Ids:
        """Refused: there is no text."""
        return self.encode(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        """The numbers, with spaces between."""
        return " ".join(str(int(token)) for token in ids)

    def save(self, folder: Path) -> None:
        """There is no file to save."""


def open_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer of `data.tokenizer`: "" or bytes, ids:N, or a file, or a folder with one."""
    if spec in ("", "bytes"):
        return ByteTokenizer()
    if spec.startswith("ids:"):
        return _open_ids(spec)
    path = Path(spec).expanduser()
    if os.path.isdir(path):
        path = Path(find_tokenizer(path) or path / JSON_FILE)
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(
            f"data.tokenizer = {spec!r}: cannot be read ({getattr(error, 'strerror', error)}); "
            f"name a {JSON_FILE}, a SentencePiece .model, a folder with one, bytes or ids:N"
        ) from error
    from longctx.data.subwords import JsonTokenizer, SentencePieceTokenizer

    kind = SentencePieceTokenizer if path.suffix == ".model" else JsonTokenizer
    return kind(str(path), content)


def find_tokenizer(folder: Path) -> str:
    """What `open_tokenizer` takes for the file that `save` put into a folder, or ""."""
    files = (folder / JSON_FILE, folder / MODEL_FILE)
    return next((str(file) for file in files if file.is_file()), "")


def _open_ids(spec: str) -> IdTokenizer:
    number = spec.removeprefix("ids:")
    if not (number.isascii() and number.isdigit() and 0 < int(number) <= 2**31):
        raise InputError(
            f"data.tokenizer = {spec!r}: the size of the vocabulary must be 1 to 2147483648, as in "
            "ids:50304"
        )
    return IdTokenizer(int(number))
