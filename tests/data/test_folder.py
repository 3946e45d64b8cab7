import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from longctx.data.folder import (
    MANIFEST,
    UNFINISHED,
    TokenFolder,
    is_token_folder,
    read_manifest,
)
from longctx.data.pieces import Batch
from longctx.data.tokenizer import ByteTokenizer
from longctx.data.unfinished import Plan, Unfinished
from longctx.errors import InputError
from longctx.files import write_whole


class Hundred(ByteTokenizer):
    """A tokenizer with a file, for ids below 100."""

    vocab_size, fingerprint, name = 100, "f" * 64, "hundred.json"

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text('{"hundred": true}')


def write(folder: Path, documents: list[list[int]], tokenizer=None, shard_tokens: int = 40) -> Path:
    """Documents as a folder of tokens, two a unit; document n has residue n."""
    tokenizer = tokenizer or Hundred()
    plan = Plan(
        tokenizer.fingerprint, tokenizer.name, tokenizer.vocab_size, "uint16", "texts", "text",
        "a hash", shard_tokens, "tokens",
    )  # fmt: skip
    unfinished = Unfinished(folder, plan)
    for unit in range(0, len(documents), 2):
        ids = [np.array(document, dtype=np.uint16) for document in documents[unit : unit + 2]]
        residues = list(range(unit, unit + len(ids)))
        totals = unfinished.write_piece(unit // 2, [Batch(ids, residues, 10, 1)])
        unfinished.add(unit // 2, totals)
    unfinished.finish(tokenizer)
    unfinished.close()
    return folder


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(0, 100, length).tolist() for length in random.integers(1, 30, 21)]


@pytest.fixture(scope="module")
def original(tmp_path_factory, documents) -> Path:
    return write(tmp_path_factory.mktemp("folder") / "tokens", documents)


@pytest.fixture
def folder(tmp_path, original) -> Path:
    return shutil.copytree(original, tmp_path / "tokens")


def test_what_was_written_is_read(folder, documents):
    store = TokenFolder(folder)
    assert len(store.manifest.shards) > 3
    assert store.lengths.tolist() == [len(document) for document in documents]
    assert store.residues.tolist() == list(range(21))
    assert (store.vocab_size, store.tokenizer) == (100, "f" * 64)
    assert store.tokenizer_spec == str(folder / "tokenizer.json")
    assert (store.text_bytes, sum(s.skipped for s in store.manifest.shards)) == (110, 11)
    for number, document in enumerate(documents):
        assert store.read(number, 0, len(document)).tolist() == document


def test_a_part_of_a_document_is_read_and_nothing_else(folder, documents):
    store = TokenFolder(folder)
    longest = max(range(21), key=lambda number: len(documents[number]))
    assert store.read(longest, 3, 9).tolist() == documents[longest][3:9]
    assert store.bytes_read == 2 * 6
    assert store.read(longest, 4, 4).tolist() == []
    assert store.bytes_read == 2 * 6
    for start, stop in ((-1, 2), (5, 4), (0, len(documents[longest]) + 1)):
        with pytest.raises(ValueError, match="no tokens"):
            store.read(longest, start, stop)


def test_documents_without_tokens_are_left_out_and_counted(tmp_path):
    store = TokenFolder(write(tmp_path / "tokens", [[], [1, 2], [3], []]))
    assert store.lengths.tolist() == [2, 1]
    assert store.residues.tolist() == [1, 2]
    assert sum(shard.skipped for shard in store.manifest.shards) == 2 + 2


def test_every_changed_byte_is_found(folder):
    TokenFolder(folder)
    random = np.random.default_rng(1)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for place in random.choice(len(content), min(len(content), 25), replace=False).tolist():
            damaged = bytearray(content)
            damaged[place] ^= 1 << int(random.integers(8))
            path.write_bytes(damaged)
            with pytest.raises(InputError, match=rf"^{path}: [^\n]*$"):
                TokenFolder(folder)
        path.write_bytes(content)
    TokenFolder(folder)


def test_ids_alone_are_not_hashed_unless_asked(folder):
    path = folder / "tokens-00001.bin"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    TokenFolder(folder, verify=False)
    with pytest.raises(InputError, match="changed since it was tokenized"):
        TokenFolder(folder)


@pytest.mark.parametrize("verify", [True, False])
def test_a_cut_or_missing_file_is_named(folder, verify):
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for damaged in (content[:-1], content + b"\0", b"", None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(InputError, match=rf"^{folder}[^\n]*$") as caught:
                TokenFolder(folder, verify)
            assert path.name in str(caught.value)
            path.write_bytes(content)


def test_a_manifest_of_another_version_is_named(folder):
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(content | {"version": 2}))
    with pytest.raises(InputError, match="version 2 is not version 1"):
        TokenFolder(folder)


@pytest.mark.parametrize("text", ["", "[]", "3", '{"version": 1}', "[" * 100000, '{"version": []}'])
def test_a_manifest_that_is_none_is_named(folder, text):
    (folder / MANIFEST).write_text(text)
    with pytest.raises(InputError, match=rf"^{folder / MANIFEST}: [^\n]*$"):
        TokenFolder(folder)


def test_an_id_beyond_the_vocabulary_is_named(tmp_path):
    store = TokenFolder(write(tmp_path / "tokens", [[1], [2, 3], [4, 100, 5]]))
    assert store.read(2, 0, 1).tolist() == [4]
    with pytest.raises(InputError, match=r"tokens: document 2 holds token id 100, [^\n]* 100;"):
        store.read(2, 1, 3)


def test_a_tokenizer_that_the_manifest_does_not_name_is_not_the_one_of_the_folder(tmp_path):
    folder = write(tmp_path, [[1, 2]], ByteTokenizer())
    (folder / "tokenizer.json").write_text("of something else")
    assert TokenFolder(folder).tokenizer_spec == ""


def test_an_unfinished_folder_says_so(tmp_path):
    folder = tmp_path / "tokens"
    (folder / UNFINISHED).mkdir(parents=True)
    assert is_token_folder(folder)
    with pytest.raises(InputError, match="unfinished; run the same longctx data tokenize command"):
        TokenFolder(folder)


def test_a_file_is_replaced_only_by_a_whole_one(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, write)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_whole(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


def test_other_folders_are_no_folders_of_tokens(tmp_path, folder):
    assert is_token_folder(folder)
    assert not is_token_folder(tmp_path)
    (tmp_path / MANIFEST).write_text("{}")
    assert not is_token_folder(tmp_path)
    assert not is_token_folder(tmp_path / "nowhere")


def test_the_fingerprint_is_that_of_the_documents(tmp_path, folder, documents):
    original = TokenFolder(folder).fingerprint()
    assert TokenFolder(write(tmp_path / "again", documents)).fingerprint() == original
    fewer = write(tmp_path / "fewer", documents[:-1])
    assert TokenFolder(fewer).fingerprint() != original
    assert read_manifest(fewer).plan == read_manifest(folder).plan
