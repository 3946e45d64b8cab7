import numpy as np

from longctx.data.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


def test_a_document_is_framed_by_its_marks():
    tokens = TOKENIZER.encode(b"\x00a\xff")
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [256, 0, 97, 255, 257]
    assert max(tokens) < TOKENIZER.vocab_size == 258


def test_a_prompt_stays_open():
    assert TOKENIZER.encode_prompt("é").tolist() == [256, 0xC3, 0xA9]
    assert TOKENIZER.encode_prompt("").tolist() == [256]


def test_decoding_inverts_encoding_and_survives_broken_text():
    assert TOKENIZER.decode(TOKENIZER.encode("naïve 文".encode())) == "naïve 文"
    assert TOKENIZER.decode([97, 0xC3, 257, 98]) == "a\ufffdb"
