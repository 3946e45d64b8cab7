import gzip
import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from longctx.data import DataConfig, build_loaders
from longctx.data.sources import open_source, open_store
from longctx.data.stores import MemoryStore, TokenStore
from longctx.data.texts import TextSource, residue
from longctx.data.tokenize import TokenizeConfig, tokenize
from longctx.errors import InputError, OutsideError
from tests.data.test_tokenizer import train_json, train_words


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> str:
    return train_json(tmp_path_factory.mktemp("trained") / "tokenizer.json")


def write_files(folder: Path, count: int) -> Path:
    for number in range(count):
        file = folder / f"part{number % 3}" / f"{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * (number + 1))
    return folder


def write_lines(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def open_path(path, percent: int = 5, **fields):
    config = DataConfig(str(path), validation_percent=percent, **fields)
    return open_source(config, config, verify=True)


def open_store_of(path, **fields) -> TokenStore:
    config = DataConfig(str(path), **fields)
    return open_store(config, config, verify=True)


def texts(store: TokenStore) -> list[str]:
    pieces = [store.read(number, 0, length) for number, length in enumerate(store.lengths)]
    assert all(piece[0] == 256 and piece[-1] == 257 for piece in pieces)
    return [piece[1:-1].astype(np.uint8).tobytes().decode(errors="replace") for piece in pieces]


def test_split_is_disjoint_complete_and_independent_of_the_place(tmp_path):
    first = open_path(write_files(tmp_path / "a", 60), 25)
    second = open_path(write_files(tmp_path / "b", 60), 25)
    train, validation = texts(first.train), texts(first.validation)
    assert sorted(train + validation) == sorted("x" * (number + 1) for number in range(60))
    assert len(set(train + validation)) == 60
    assert 5 <= len(validation) <= 25
    assert (train, validation) == (texts(second.train), texts(second.validation))
    assert first.fingerprint() == second.fingerprint()


def test_the_residue_of_its_name_decides_about_a_file(tmp_path):
    found = {f"part{number % 3}/{number}.txt": "x" * (number + 1) for number in range(60)}
    splits = open_path(write_files(tmp_path, 60), 25)
    expected = [text for name, text in sorted(found.items()) if residue(name) < 25]
    assert texts(splits.validation) == expected
    assert {letter: residue(letter) for letter in "abcd"} == {"a": 50, "b": 46, "c": 30, "d": 29}


def test_a_larger_share_only_adds_held_out_files(tmp_path):
    path = write_files(tmp_path, 30)
    held_out = [set(texts(open_path(path, percent).validation)) for percent in (1, 10, 30, 50)]
    assert all(small <= large for small, large in pairwise(held_out))


@pytest.mark.parametrize(("size", "held_out"), [(100, 10), (19, 1), (2, 1)])
def test_a_single_file_is_cut_by_position(tmp_path, size, held_out):
    file = tmp_path / "one.txt"
    text = ("0123456789" * 10)[:size]
    file.write_text(text)
    splits = open_path(file, 10)
    assert texts(splits.train) == [text[:-held_out]]
    assert texts(splits.validation) == [text[-held_out:]]
    (tmp_path / "empty.txt").touch()
    assert texts(open_path(tmp_path, 10).train) == [text[:-held_out]]


def test_folder_and_glob_find_the_same_documents(tmp_path):
    write_files(tmp_path, 12)
    (tmp_path / "empty.txt").touch()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "secret.txt").write_text("secret")
    folder, pattern = open_path(tmp_path), open_path(tmp_path / "**" / "*.txt")
    assert folder.fingerprint() == pattern.fingerprint()
    assert texts(folder.train) == texts(pattern.train)
    assert len(texts(folder.train) + texts(folder.validation)) == 12
    some = open_path(tmp_path / "part[01]" / "*.txt")
    lengths = [len(text) - 1 for text in texts(some.train) + texts(some.validation)]
    assert sorted(lengths) == [number for number in range(12) if number % 3 < 2]


def test_documents_are_read_in_parts(tmp_path):
    splits = open_path(write_files(tmp_path, 12), 30)
    for store in splits:
        whole = texts(store)
        before = store.bytes_read
        for number, text in enumerate(whole):
            assert bytes(store.read(number, 1, 1 + len(text)).tolist()).decode() == text
            middle = len(text) // 2
            assert len(store.read(number, middle, middle)) == 0
        assert store.bytes_read - before == 2 * sum(map(len, whole))
        assert (store.vocab_size, store.tokenizer) == (258, "bytes")
        assert store.lengths.tolist() == [len(text) + 2 for text in whole]


def test_fingerprint_follows_names_contents_and_tokenizer(tmp_path, trained):
    path = write_files(tmp_path, 3)
    original = open_path(path).fingerprint()
    others = [open_path(path, tokenizer=trained).fingerprint()]
    file = tmp_path / "part0" / "0.txt"
    file.write_bytes(b"y")
    others.append(open_path(path).fingerprint())
    file.rename(file.with_name("new.txt"))
    others.append(open_path(path).fingerprint())
    assert len({original, *others}) == 4


def test_the_fingerprint_of_bytes_never_changes_between_versions(tmp_path):
    """A resumed run depends on it."""
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    expected = "8d7c2eb77fd3a08f9e06ca530146b5875809cb8e4c02277bbe042bb4f1b8b682"
    assert open_path(tmp_path).fingerprint() == expected


def test_validation_path_is_held_out_whole(tmp_path):
    train, held_out = write_files(tmp_path / "a", 9), write_files(tmp_path / "b", 1)
    (held_out / "part0" / "0.txt").write_bytes(b"xyz")
    splits = open_path(train, validation_path=str(held_out))
    assert len(texts(splits.train)) == 9
    assert texts(splits.validation) == ["xyz"]
    both = {splits.train.fingerprint(), splits.validation.fingerprint(), splits.fingerprint()}
    assert len(both) == 3


def test_rows_of_all_formats_are_the_same_documents(tmp_path):
    import datasets
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"text": f"row {number} é", "n": number} for number in range(40)]
    write_lines(tmp_path / "rows.jsonl", rows)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=7)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    expected = [row["text"] for row in rows]
    for name in ("rows.jsonl", "rows.parquet", "saved"):
        splits = open_path(tmp_path / name, 20)
        train, validation = texts(splits.train), texts(splits.validation)
        assert sorted(train + validation, key=expected.index) == expected
        assert train == sorted(train, key=expected.index)
        assert 1 < len(validation) < 20
        config = DataConfig(str(tmp_path / name), column="n")
        with pytest.raises(InputError, match=r"^[^\n]*'n' holds int, not text[^\n]*$"):
            open_source(config, config, verify=True)


def test_names_tell_the_format(tmp_path):
    rows = [{"text": "one"}, {"text": "two"}]
    code = tmp_path / "code"
    code.mkdir()
    (code / "a.py").write_text("pass")
    write_lines(code / "settings.json", rows)
    assert len(texts(open_store_of(code))) == 2
    lines = tmp_path / "lines"
    lines.mkdir()
    write_lines(lines / "a.jsonl", rows)
    write_lines(lines / "b.json", rows)
    assert texts(open_store_of(lines)) == ["one", "two"] * 2
    assert texts(open_store_of(lines / "b.json")) == ["one", "two"]
    assert texts(open_store_of(lines / "b.json", format="text")) == [(lines / "b.json").read_text()]
    (lines / "notes.txt").write_text("note")
    for path in (lines, lines / "*"):
        with pytest.raises(InputError, match=r"several formats, a\.jsonl and notes\.txt; set"):
            open_store_of(path)
    assert texts(open_store_of(lines / "*.j*")) == ["one", "two"] * 2


def test_ids_take_the_least_room(tmp_path, trained):
    path = write_files(tmp_path, 5)
    store = open_store_of(path, tokenizer=trained)
    assert isinstance(store, MemoryStore)
    assert store.tokens.dtype == np.uint16
    content = json.loads(Path(trained).read_text())
    content["model"]["vocab"]["x"] = 2**16
    large = tmp_path.parent / "large.json"
    large.write_text(json.dumps(content))
    store = open_store_of(path, tokenizer=str(large))
    assert (store.tokens.dtype, store.tokens.max()) == (np.uint32, 2**16)


def test_a_wrong_path_is_named_in_one_line(tmp_path):
    for path in ("missing", "missing/*.txt", "x" * 5000):
        with pytest.raises(InputError, match=r"^data\.path = .*: no such file, [^\n]*$"):
            open_path(tmp_path / path)
    (tmp_path / "empty").mkdir()
    for form in ("auto", "text", "parquet", "jsonl", "datasets"):
        with pytest.raises(InputError, match=r"^data\.path = .*: holds no files[^\n]*$"):
            open_path(tmp_path / "empty", format=form)


@pytest.mark.parametrize("text", ["", "x"])
def test_too_little_text_is_named_in_one_line(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    for path in (tmp_path, tmp_path / "a.txt", tmp_path / "*.txt"):
        with pytest.raises(InputError, match=r"^data\.path = .*: needs 2 bytes[^\n]*$"):
            open_path(path)


@pytest.mark.parametrize("percent", [0, 51, -1])
def test_a_wrong_share_is_named_in_one_line(percent):
    with pytest.raises(InputError, match=r"^data\.validation_percent = -?\d+: [^\n]*$"):
        DataConfig(validation_percent=percent)


def test_too_much_text_for_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    write_files(tmp_path, 3)
    monkeypatch.setattr("longctx.data.sources.MAX_TEXT_BYTES", 5)
    with pytest.raises(InputError, match=r"^[^\n]*2 GiB of text; run longctx data tokenize[^\n]*$"):
        open_path(tmp_path)
    monkeypatch.setattr("longctx.data.sources.MAX_TEXT_BYTES", 6)
    assert len(texts(open_store_of(tmp_path))) == 3


def test_a_file_that_cannot_be_read_is_an_outside_error(tmp_path, monkeypatch):
    write_files(tmp_path, 3)

    def fail(path: Path) -> bytes:
        raise OSError(13, os.strerror(13), str(path))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OutsideError, match=r"^[^\n]*0\.txt: cannot be read[^\n]*$"):
        open_path(tmp_path)


def test_ids_without_text_make_no_tokens_of_text(tmp_path):
    with pytest.raises(InputError, match=r"^ids:50 stands for no text[^\n]*$"):
        open_path(write_files(tmp_path, 3), tokenizer="ids:50")


def test_embedded_source_is_the_standard_library():
    splits = open_source(DataConfig(), DataConfig(), verify=True)
    found = texts(splits.train) + texts(splits.validation)
    assert any("class JSONDecoder" in text for text in found)
    assert 0.02 < len(splits.validation.lengths) / len(found) < 0.1
    assert len(found) > 500


def test_other_tokenizers_train_too(tmp_path, trained):
    config = DataConfig(str(write_files(tmp_path, 12)), tokenizer=trained)
    loaders = build_loaders(config, seq_len=16, batch_size=2, seed=0)
    assert loaders.tokenizer.name == trained
    assert loaders.train.batch(3).tokens_BT.max() < loaders.vocab_size


def test_text_that_gives_no_token_is_no_document(tmp_path):
    words = train_words(tmp_path / "words.json")
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}").write_text("text text" if number % 2 else "  ")
    splits = open_path(folder, tokenizer=words)
    assert [store.lengths.min() for store in splits] == [2, 2]
    assert sum(len(store.lengths) for store in splits) == 10
    for content in ("   ", "text" + " " * 50):
        (tmp_path / "one").write_text(content)
        with pytest.raises(InputError, match=r"^data: [^\n]*words.json makes no token of the text"):
            open_path(tmp_path / "one", tokenizer=words)


def test_folders_are_not_taken_for_what_one_name_in_them_is(tmp_path):
    (tmp_path / "unfinished").mkdir()
    for name in ("unfinished/draft", "state.json", "dataset_info.json.txt"):
        (tmp_path / name).write_text("text")
    assert texts(open_store_of(tmp_path)) == ["text"] * 3


@pytest.mark.parametrize("name", ["a.txt.gz", "a.json.zst", "a.bin", "a.idx"])
def test_files_whose_names_tell_that_they_are_no_text_are_refused(tmp_path, name):
    for file in {"a.bin", "a.idx", name} if name in ("a.bin", "a.idx") else {name}:
        (tmp_path / file).write_text("ab")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(InputError, match=r"^data\.path = [^\n]*: a\.[a-z.]+ (is no|holds)"):
            open_path(path)
    assert len(open_store_of(tmp_path / name, format="text").lengths) == 1


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write_files(tmp_path, 3)

    def fail(path):
        raise PermissionError(13, os.strerror(13), str(path))

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(OutsideError, match=r"cannot be read \(Permission denied\)"):
        open_path(tmp_path)


def test_packed_lines_are_not_unpacked_beyond_what_fits(tmp_path, monkeypatch):
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b'{"text": "xxxxxxxxx"}\n' * 500))
    read = []
    real = TextSource.read

    def counted(source, part):
        for text in real(source, part):
            read.append(text)
            yield text

    monkeypatch.setattr(TextSource, "read", counted)
    monkeypatch.setattr("longctx.data.sources.MAX_TEXT_BYTES", 200)
    with pytest.raises(InputError, match="2 GiB of text"):
        open_path(tmp_path / "a.json.gz")
    assert len(read) < 30


def test_what_is_trained_on_is_not_held_out(tmp_path):
    write_files(tmp_path / "texts", 6)
    tokens = tmp_path / "tokens"
    tokenize(str(tmp_path / "texts"), TokenizeConfig(output=str(tokens), workers=1))
    (tmp_path / "link").symlink_to(tmp_path / "texts" / "part0")
    inside = tmp_path / "texts" / "part0"
    cases = (
        (tmp_path / "texts", inside),
        (tmp_path / "texts", tmp_path / "link"),
        (tokens, tokens),
    )
    for path, held_out in cases:
        with pytest.raises(InputError, match=r"^data\.validation_path = .* too, so it would be tr"):
            open_path(path, validation_path=str(held_out))
    splits = open_path(tmp_path / "texts" / "part[12]" / "*", validation_path=str(inside))
    assert len(splits.validation.lengths) == 2
