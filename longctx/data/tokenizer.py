"""Text to token ids: one token a byte, plus two marks around each document."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

NUM_BYTES = 256


class ByteTokenizer:
    """Bytes keep their value as ids; BEGIN opens and END closes every document."""

    BEGIN = NUM_BYTES
    END = NUM_BYTES + 1
    vocab_size = NUM_BYTES + 2

    def encode(self, text: bytes) -> npt.NDArray[np.uint16]:
        """A whole document: BEGIN, its bytes, END."""
        tokens = np.empty(len(text) + 2, dtype=np.uint16)
        tokens[0] = self.BEGIN
        tokens[1:-1] = np.frombuffer(text, dtype=np.uint8)
        tokens[-1] = self.END
        return tokens

    def encode_prompt(self, text: str) -> npt.NDArray[np.uint16]:
        """The start of a document to be continued: BEGIN and the UTF-8 bytes, without END."""
        return self.encode(text.encode())[:-1]

    def decode(self, ids: Iterable[int]) -> str:
        """UTF-8 text of the byte ids; marks are dropped, broken sequences become U+FFFD."""
        return bytes(byte for byte in map(int, ids) if byte < NUM_BYTES).decode(errors="replace")
