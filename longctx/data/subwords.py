"""Tokenizers that read a file: those of the tokenizers library, and SentencePiece."""

import re
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from longctx.data.stores import Ids, id_type
from longctx.data.tokenizer import JSON_FILE, MODEL_FILE
from longctx.errors import InputError, OutsideError

BEGINS = (
    "<|begin|>",
    "<|begin_of_text|>",
    "<|startoftext|>",
    "<s>",
    "<bos>",
    "[BOS]",
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
)
ENDS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "[EOS]",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|im_end|>",
    "<|end|>",
)


LONG = 2**18
"""Characters that the tokenizers library is given at a time, as it needs a hundred times as much
memory; more of a document that has no line end to cut it at."""
LINE_END = re.compile(r"(?<=\w\n)(?=\w)")
"""Where most tokenizers end a word, beyond which no token reaches."""
LINES = "one\nTwo\n3\n4 four\nfünf\n文\n六 six\n\n seven \nB.\n/8\nend"


class _FileTokenizer:
    """What both kinds share: marks around a document, and the file they came from."""

    file_name: str
    vocab_size: int
    begin: int | None
    end: int | None

    def __init__(self, name: str, content: bytes) -> None:
        self.name = name
        self.fingerprint = sha256(content).hexdigest()
        self._content = content

    def _ids(self, texts: list[str]) -> Iterable[Sequence[int] | Ids]:
        raise NotImplementedError

    def encode(self, text: bytes) -> Ids:
        """A whole document with its marks; what is not UTF-8 becomes U+FFFD."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[bytes]) -> list[Ids]:
        """Several documents, on all threads that the library takes."""
        dtype = id_type(self.vocab_size)
        marks = ([] if mark is None else [mark] for mark in (self.begin, self.end))
        before, after = (np.array(mark, dtype) for mark in marks)
        ids = self._ids([text.decode(errors="replace") for text in texts])
        return [np.concatenate((before, np.asarray(row, dtype), after)) for row in ids]

    def encode_prompt(self, text: str) -> Ids:
        """Begin mark and text; where there is no begin mark, nothing goes on from an end mark."""
        (ids,) = self._ids([text.encode(errors="surrogateescape").decode(errors="replace")])
        mark = self.begin if len(ids) or self.begin is not None else self.end
        return np.array([*([] if mark is None else [mark]), *ids], dtype=id_type(self.vocab_size))

    def save(self, folder: Path) -> None:
        """Write the same bytes, under the name that `find_tokenizer` looks for."""
        file = folder / self.file_name
        try:
            file.write_bytes(self._content)
        except OSError as error:
            raise OutsideError(f"{file}: cannot be written ({error.strerror})") from error


class JsonTokenizer(_FileTokenizer):
    """A tokenizer.json of the tokenizers library.

    Text that spells a special token stays text, so that no document holds a mark. Marks are those
    that the file's post-processor puts around text, or else the first known name it has.
    """

    file_name = JSON_FILE

    def __init__(self, name: str, content: bytes) -> None:
        from tokenizers import Tokenizer

        super().__init__(name, content)
        try:
            self._tokenizer = Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises this very class
            reason = str(error).splitlines()[0][:200]
            raise InputError(f"{name}: not a tokenizer.json, or a broken one ({reason})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise InputError(f"{name}: a tokenizer without a vocabulary")
        self.vocab_size = max(vocabulary.values()) + 1
        first, last = _framing(self._tokenizer.encode("a"))
        parts = [_words(self._tokenizer, part) for part in pieces(LINES, 1)]
        self._may_cut = _words(self._tokenizer, LINES) == list(chain(*parts))
        self.begin = first if first is not None else _known(vocabulary, BEGINS)
        self.end = last if last is not None else _known(vocabulary, ENDS)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, without marks and other special tokens."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    def _ids(self, texts: list[str]) -> Iterable[Sequence[int] | Ids]:
        if not self._may_cut or all(len(text) <= LONG for text in texts):
            return self._whole(texts)
        dtype = id_type(self.vocab_size)
        return [
            np.concatenate([np.array(self._whole([part])[0], dtype) for part in pieces(text, LONG)])
            for text in texts
        ]

    def _whole(self, texts: list[str]) -> list[list[int]]:
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]


class SentencePieceTokenizer(_FileTokenizer):
    """A SentencePiece model; marks are its <s> and </s>, as far as it has them."""

    file_name = MODEL_FILE

    def __init__(self, name: str, content: bytes) -> None:
        super().__init__(name, content)
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise InputError(
                f"{name}: a SentencePiece model needs pip install 'longctx[sentencepiece]'"
            ) from error
        self._model = SentencePieceProcessor()
        try:
            self._model.load_from_serialized_proto(content)
            self.vocab_size = self._model.get_piece_size()
        except RuntimeError as error:
            raise InputError(f"{name}: not a SentencePiece model, or a broken one") from error
        begin, end = self._model.bos_id(), self._model.eos_id()
        self.begin, self.end = (None if mark < 0 else mark for mark in (begin, end))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, without marks."""
        return self._model.decode([token for token in map(int, ids) if token < self.vocab_size])

    def _ids(self, texts: list[str]) -> Iterable[Sequence[int] | Ids]:
        return self._model.encode(texts, out_type=int)


def _words(tokenizer: Any, text: str) -> list[str]:
    """What no token reaches beyond."""
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is None:
        return [text]
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def pieces(text: str, size: int) -> Iterator[str]:
    """A text cut at the first end of a line after each `size` characters."""
    start = 0
    while found := LINE_END.search(text, start + size):
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]


def _framing(encoding: Any) -> tuple[int | None, int | None]:
    """The special tokens that a post-processor puts first and last."""
    mask, ids = encoding.special_tokens_mask, encoding.ids
    if not ids:
        return None, None
    return (ids[0] if mask[0] else None), (ids[-1] if mask[-1] else None)


def _known(vocabulary: dict[str, int], names: Sequence[str]) -> int | None:
    return next((vocabulary[name] for name in names if name in vocabulary), None)
