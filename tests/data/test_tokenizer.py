import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from longctx.data import subwords
from longctx.data.tokenizer import ByteTokenizer, find_tokenizer, open_tokenizer
from longctx.errors import InputError
from longctx.eval import generate as sampling

TOKENIZER = ByteTokenizer()
CORPUS = ["the cat sat on the mat", "naïve 文 text", "a cat, a mat; the end"] * 20


def train_json(path, names=("<|begin|>", "<|end|>"), framed=False, **limits) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(names), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if framed:
        marks = [(name, tokenizer.token_to_id(name)) for name in names]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{names[0]} $A {names[1]}", special_tokens=marks
        )
    if limits:
        tokenizer.enable_truncation(limits["truncation"])
        tokenizer.enable_padding(length=limits["padding"])
    tokenizer.save(str(path))
    return str(path)


def train_words(path) -> str:
    """Knows one word, and no marks."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"text": 0, "?": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> str:
    return train_json(tmp_path_factory.mktemp("trained") / "tokenizer.json")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    from sentencepiece import SentencePieceTrainer

    written, path = io.BytesIO(), tmp_path_factory.mktemp("model") / "mine.model"
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=written, vocab_size=60, byte_fallback=False,
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    path.write_bytes(written.getvalue())
    return str(path)


def test_a_document_is_framed_by_its_marks():
    tokens = TOKENIZER.encode(b"\x00a\xff")
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [256, 0, 97, 255, 257]
    assert max(tokens) < TOKENIZER.vocab_size == 258
    assert (TOKENIZER.begin, TOKENIZER.end) == (256, 257)


def test_a_prompt_stays_open():
    assert TOKENIZER.encode_prompt("é").tolist() == [256, 0xC3, 0xA9]
    assert TOKENIZER.encode_prompt("").tolist() == [256]


def test_a_prompt_need_not_be_utf8(trained):
    prompt = os.fsdecode(b"a\xff")
    assert TOKENIZER.encode_prompt(prompt).tolist() == [256, 0x61, 0xFF]
    tokenizer = open_tokenizer(trained)
    assert tokenizer.encode_prompt(prompt).tolist() == tokenizer.encode(b"a\xff")[:-1].tolist()


def test_a_prompt_of_no_token_is_refused(tmp_path, monkeypatch):
    words = open_tokenizer(train_words(tmp_path / "words.json"))
    monkeypatch.setattr(sampling, "load_tokenizer", lambda *_: words)
    monkeypatch.setattr(sampling, "load_model", lambda *_: None)
    with pytest.raises(InputError, match=r"^--prompt ' ': [^\n]*words.json makes no token of it$"):
        sampling.generate("run", sampling.GenerateConfig(prompt=" "))


def test_decoding_inverts_encoding_and_survives_broken_text():
    assert TOKENIZER.decode(TOKENIZER.encode("naïve 文".encode())) == "naïve 文"
    assert TOKENIZER.decode([97, 0xC3, 257, 98]) == "a\ufffdb"


@pytest.mark.parametrize("kind", ["trained", "model"])
def test_a_tokenizer_of_a_file_frames_encodes_and_decodes(kind, request):
    tokenizer = open_tokenizer(request.getfixturevalue(kind))
    texts = ["the cat", "naïve 文", "a"]
    for text, ids in zip(texts, tokenizer.encode_batch([text.encode() for text in texts])):
        assert ids[0] == tokenizer.begin != tokenizer.end == ids[-1]
        assert not {tokenizer.begin, tokenizer.end} & set(ids[1:-1].tolist())
        assert tokenizer.decode(ids) == text
        assert ids.tolist() == tokenizer.encode(text.encode()).tolist()
        assert tokenizer.encode_prompt(text).tolist() == ids[:-1].tolist()
        assert ids.dtype == np.uint16
        assert ids.max() < tokenizer.vocab_size
    assert tokenizer.encode_prompt("").tolist() == [tokenizer.begin]
    assert len(tokenizer.encode(b"the cat")) < 5 + kind.count("model") * 4


def test_ids_are_those_of_the_library_itself(trained, model):
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer

    text = CORPUS[1]
    expected = Tokenizer.from_file(trained).encode(text).ids
    assert open_tokenizer(trained).encode(text.encode())[1:-1].tolist() == expected
    expected = SentencePieceProcessor(model_file=model).encode(text)
    assert open_tokenizer(model).encode(text.encode())[1:-1].tolist() == expected


def test_text_that_spells_a_mark_stays_text(trained, model):
    for spec, text in ((trained, "a<|end|>b"), (model, "a</s>b")):
        tokenizer = open_tokenizer(spec)
        ids = tokenizer.encode(text.encode()).tolist()
        assert (ids.count(tokenizer.begin), ids.count(tokenizer.end)) == (1, 1)
    assert open_tokenizer(trained).decode(ids := open_tokenizer(trained).encode(b"a<|end|>b")) == (
        "a<|end|>b"
    ), ids


def test_marks_of_a_post_processor_are_used_once(tmp_path):
    tokenizer = open_tokenizer(train_json(tmp_path / "t.json", ("[X]", "[Y]"), framed=True))
    assert (tokenizer.begin, tokenizer.end) == (0, 1)
    ids = tokenizer.encode(b"the cat").tolist()
    assert (ids.count(0), ids.count(1)) == (1, 1)
    assert tokenizer.encode_prompt("the cat").tolist() == ids[:-1]


def test_a_tokenizer_without_a_begin_mark_begins_with_text(tmp_path):
    tokenizer = open_tokenizer(train_json(tmp_path / "t.json", ("<|endoftext|>",)))
    assert (tokenizer.begin, tokenizer.end) == (None, 0)
    assert tokenizer.decode(tokenizer.encode(b"the")[:-1]) == "the"
    assert tokenizer.encode_prompt("").tolist() == [0]
    assert tokenizer.encode_prompt("the")[0] != 0


def test_limits_that_the_file_sets_do_not_cut_or_pad_documents(tmp_path, trained):
    limited = train_json(tmp_path / "t.json", truncation=3, padding=50)
    text = " ".join(CORPUS[:3]).encode()
    plain = open_tokenizer(trained).encode(text).tolist()
    assert open_tokenizer(limited).encode(text).tolist() == plain
    assert len(plain) not in (3, 5, 50, 52)


def test_the_vocabulary_counts_up_to_the_largest_id(tmp_path, trained):
    content = json.loads(Path(trained).read_text())
    content["model"]["vocab"]["a"] = 90_000
    (tmp_path / "t.json").write_text(json.dumps(content))
    tokenizer = open_tokenizer(str(tmp_path / "t.json"))
    assert tokenizer.vocab_size == 90_001
    ids = tokenizer.encode(b"ab")
    assert (ids.dtype, max(ids)) == (np.uint32, 90_000)
    assert tokenizer.fingerprint != open_tokenizer(trained).fingerprint


def test_text_that_is_not_utf8_gets_replacement_characters(trained):
    tokenizer = open_tokenizer(trained)
    assert tokenizer.decode(tokenizer.encode(b"a\xffb")) == "a\ufffdb"


@pytest.mark.parametrize("kind", ["trained", "model"])
def test_a_saved_tokenizer_is_found_again(kind, request, tmp_path):
    tokenizer = open_tokenizer(request.getfixturevalue(kind))
    tokenizer.save(tmp_path)
    again = open_tokenizer(find_tokenizer(tmp_path))
    assert again.fingerprint == tokenizer.fingerprint == open_tokenizer(str(tmp_path)).fingerprint
    assert again.encode(b"the cat").tolist() == tokenizer.encode(b"the cat").tolist()


def test_bytes_and_ids_save_no_file(tmp_path):
    for spec in ("", "bytes", "ids:7"):
        open_tokenizer(spec).save(tmp_path)
    assert find_tokenizer(tmp_path) == ""
    assert open_tokenizer("").fingerprint == "bytes"


def test_ids_without_text_are_numbers():
    tokenizer = open_tokenizer("ids:50304")
    assert (tokenizer.vocab_size, tokenizer.fingerprint) == (50304, "ids:50304")
    assert (tokenizer.begin, tokenizer.end) == (None, None)
    assert tokenizer.decode([3, 50303]) == "3 50303"
    for use in (lambda: tokenizer.encode_batch([b"a"]), lambda: tokenizer.encode_prompt("a")):
        with pytest.raises(InputError, match="stands for no text"):
            use()


@pytest.mark.parametrize("spec", ["ids:", "ids:0", "ids:-3", "ids:2e5", "ids:99999999999", "ids:²"])
def test_a_wrong_number_of_ids_is_named_in_one_line(spec):
    with pytest.raises(InputError, match=r"^data\.tokenizer = 'ids:.*: the size [^\n]*$"):
        open_tokenizer(spec)


def test_a_missing_or_broken_file_is_named_in_one_line(tmp_path):
    (tmp_path / "broken.json").write_text('{"version": "1.0", "model": {')
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "broken.model").write_bytes(b"\x00\x01nonsense")
    (tmp_path / "empty.model").touch()
    wrong = [path.name for path in tmp_path.iterdir()]
    assert len(wrong) == 6
    for name in [*wrong, "missing.json", "missing.model", "", "x\0y", "x" * 5000]:
        with pytest.raises(InputError, match=r"^[^\n]*(not a|cannot be read)[^\n]*$") as caught:
            open_tokenizer(str(tmp_path / name))
        assert (name or tmp_path.name)[:20].replace("\0", "\\x00") in str(caught.value)


def test_sentencepiece_that_is_not_installed_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(InputError, match=r"pip install 'longctx\[sentencepiece\]'"):
        open_tokenizer(model)


def test_long_documents_are_encoded_in_parts_where_that_changes_no_id(
    tmp_path, trained, monkeypatch
):
    text = "the cat\nsat; on\n\nthe mat.\n naïve\n文 text\na cat\n/a\r\nmat\n7\n" * 9
    monkeypatch.setattr(subwords, "LONG", 20)
    tokenizer, given = open_tokenizer(trained), []
    encode = tokenizer._whole
    monkeypatch.setattr(tokenizer, "_whole", lambda texts: given.extend(texts) or encode(texts))
    assert tokenizer.encode(text.encode())[1:-1].tolist() == encode([text])[0]
    assert len(given) > 9
    assert "".join(given) == text
    content = json.loads(Path(trained).read_text())
    for name, value in (
        ("normalizer", {"type": "Prepend", "prepend": "_"}),
        ("pre_tokenizer", content["pre_tokenizer"] | {"add_prefix_space": True}),
        ("pre_tokenizer", content["pre_tokenizer"] | {"use_regex": False}),
        ("pre_tokenizer", None),
    ):
        (tmp_path / "t.json").write_text(json.dumps(content | {name: value}))
        tokenizer = open_tokenizer(str(tmp_path / "t.json"))
        whole = tokenizer._whole([text])[0]
        assert tokenizer.encode(text.encode())[1:-1].tolist() == whole
