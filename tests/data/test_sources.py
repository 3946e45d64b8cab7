import math
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from longctx.data.sources import Corpus, DataConfig, Document, open_corpus, unigram_entropy
from longctx.data.tokenizer import ByteTokenizer
from longctx.errors import InputError, OutsideError


def write_files(folder: Path, count: int) -> Path:
    for number in range(count):
        file = folder / f"part{number % 3}" / f"{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * (number + 1))
    return folder


def names(corpus: Corpus, split: str) -> list[str]:
    return [document.name for document in corpus.select(split)]


def texts(corpus: Corpus, split: str) -> list[str]:
    loaded = corpus.load(split)
    pieces = np.split(loaded.tokens, loaded.offsets[1:-1])
    return [ByteTokenizer().decode(piece) for piece in pieces]


def test_split_is_disjoint_complete_and_independent_of_the_place(tmp_path):
    first = open_corpus(DataConfig(str(write_files(tmp_path / "a", 60)), 25))
    second = open_corpus(DataConfig(str(write_files(tmp_path / "b", 60)), 25))
    train, validation = names(first, "train"), names(first, "validation")
    assert sorted(train + validation) == [document.name for document in first.documents]
    assert len(set(train + validation)) == 60
    assert 5 <= len(validation) <= 25
    assert (train, validation) == (names(second, "train"), names(second, "validation"))
    assert first.fingerprint() == second.fingerprint()


def test_a_larger_share_only_adds_held_out_files(tmp_path):
    path = str(write_files(tmp_path, 30))
    held_out = [set(names(open_corpus(DataConfig(path, p)), "validation")) for p in (1, 10, 30, 50)]
    assert all(small <= large for small, large in pairwise(held_out))


def test_no_split_of_several_files_is_empty():
    """Residues of the names: a 50, b 46, c 30, d 29."""
    cases = {"ab": ("a", "b"), "cd": ("c", "d"), "acd": ("a", "cd")}
    for letters, (train, validation) in cases.items():
        documents = tuple(Document(letter, Path(letter), 1) for letter in letters)
        corpus = Corpus(documents, validation_percent=45)
        assert names(corpus, "train") == list(train)
        assert names(corpus, "validation") == list(validation)


@pytest.mark.parametrize(("size", "held_out"), [(100, 10), (19, 1), (2, 1)])
def test_a_single_file_is_cut_by_position(tmp_path, size, held_out):
    file = tmp_path / "one.txt"
    text = ("0123456789" * 10)[:size]
    file.write_text(text)
    corpus = open_corpus(DataConfig(str(file), 10))
    assert texts(corpus, "train") == [text[:-held_out]]
    assert texts(corpus, "validation") == [text[-held_out:]]


def test_folder_and_glob_find_the_same_documents(tmp_path):
    write_files(tmp_path, 12)
    (tmp_path / "empty.txt").touch()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "secret.txt").write_text("secret")
    folder = open_corpus(DataConfig(str(tmp_path)))
    pattern = open_corpus(DataConfig(str(tmp_path / "**" / "*.txt")))
    assert folder == pattern
    assert len(folder.documents) == 12
    some = open_corpus(DataConfig(str(tmp_path / "part[01]" / "*.txt")))
    assert some.documents == tuple(d for d in folder.documents if d.name[:5] in ("part0", "part1"))


def test_loaded_documents_are_the_files(tmp_path):
    corpus = open_corpus(DataConfig(str(write_files(tmp_path, 12)), 30))
    for split in ("train", "validation"):
        loaded = corpus.load(split)
        assert (loaded.tokens.dtype, loaded.offsets.dtype) == (np.uint16, np.int64)
        assert loaded.offsets[-1] == len(loaded.tokens)
        expected = [document.path.read_text() for document in corpus.select(split)]
        assert texts(corpus, split) == expected


def test_fingerprint_follows_names_and_contents(tmp_path):
    config = DataConfig(str(write_files(tmp_path, 3)))
    original = open_corpus(config).fingerprint()
    file = tmp_path / "part0" / "0.txt"
    file.write_bytes(b"y")
    changed = open_corpus(config).fingerprint()
    file.rename(file.with_name("new.txt"))
    renamed = open_corpus(config).fingerprint()
    assert len({original, changed, renamed}) == 3


def test_unigram_entropy_of_known_distributions():
    encode = ByteTokenizer().encode
    assert unigram_entropy(encode(b"aaaa")) == 0
    assert unigram_entropy(encode(bytes(range(256)) * 2)) == pytest.approx(math.log(256))
    assert unigram_entropy(encode(b"aabc")) == pytest.approx(1.5 * math.log(2))


def test_a_wrong_path_is_named_in_one_line(tmp_path):
    for path in ("missing", "missing/*.txt", "x" * 5000):
        with pytest.raises(InputError, match=r"^data\.path = .*: no such file, [^\n]*$"):
            open_corpus(DataConfig(str(tmp_path / path)))


@pytest.mark.parametrize("text", ["", "x"])
def test_too_little_text_is_named_in_one_line(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    for path in (tmp_path, tmp_path / "a.txt", tmp_path / "*.txt"):
        with pytest.raises(InputError, match=r"^data\.path = .*: needs 2 bytes[^\n]*$"):
            open_corpus(DataConfig(str(path)))


@pytest.mark.parametrize("percent", [0, 51, -1])
def test_a_wrong_share_is_named_in_one_line(percent):
    with pytest.raises(InputError, match=r"^data\.validation_percent = -?\d+: [^\n]*$"):
        DataConfig(validation_percent=percent)


def test_a_file_lost_after_opening_is_an_outside_error(tmp_path):
    corpus = open_corpus(DataConfig(str(write_files(tmp_path, 3))))
    os.remove(corpus.documents[0].path)
    with pytest.raises(OutsideError, match=r"^[^\n]*0\.txt: cannot be read[^\n]*$"):
        corpus.fingerprint()


def test_embedded_source_is_the_standard_library():
    corpus = open_corpus(DataConfig())
    found = {document.name for document in corpus.documents}
    assert {"dataclasses.py", "json/decoder.py"} <= found
    assert not any("site-packages" in name or "__pycache__" in name for name in found)
    loaded = corpus.load("validation")
    assert 0.02 < len(names(corpus, "validation")) / len(found) < 0.1
    assert 2.5 < unigram_entropy(loaded.tokens) < 4
