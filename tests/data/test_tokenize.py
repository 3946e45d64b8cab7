import errno
import fcntl
import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from longctx.data import tokenize as module
from longctx.data.folder import UNFINISHED, TokenFolder
from longctx.data.pieces import Totals
from longctx.data.texts import residue
from longctx.data.tokenize import TokenizeConfig, tokenize
from longctx.data.tokenizer import ByteTokenizer
from longctx.data.workers import in_order
from longctx.errors import InputError, OutsideError

COUNT = 40


@pytest.fixture(autouse=True)
def _small_units(monkeypatch):
    monkeypatch.setattr("longctx.data.texts.PART_BYTES", 200)
    monkeypatch.setattr("longctx.data.rows.RANGE_BYTES", 200)
    monkeypatch.setattr(module, "UNIT_BYTES", 300)
    monkeypatch.setattr(module, "BATCH_BYTES", 120)


@pytest.fixture
def texts(tmp_path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(COUNT):
        (folder / f"{number:02}.txt").write_text(f"text {number} " * 3 * (number % 7 + 1))
    (folder / "20.txt").write_text("")
    return folder


def config(tmp_path: Path, name: str = "tokens", **options) -> TokenizeConfig:
    return TokenizeConfig(
        **{"output": str(tmp_path / name), "workers": 1, "shard_tokens": 700} | options
    )


def contents(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def documents(folder: Path) -> list[list[int]]:
    store = TokenFolder(folder)
    return [store.read(i, 0, n).tolist() for i, n in enumerate(store.lengths.tolist())]


def test_tokens_are_those_of_each_text_in_order(texts, tmp_path):
    done = tokenize(str(texts), config(tmp_path))
    files = [path for path in sorted(texts.iterdir()) if path.stat().st_size]
    encode = ByteTokenizer().encode
    expected = [encode(path.read_bytes()).tolist() for path in files]
    assert documents(tmp_path / "tokens") == expected
    store = TokenFolder(tmp_path / "tokens")
    assert store.residues.tolist() == [residue(path.name) for path in files]
    size = sum(path.stat().st_size for path in files)
    assert done.totals == done.new == Totals(COUNT - 1, sum(map(len, expected)), size, 1)
    assert store.text_bytes == size


def test_a_shard_ends_with_the_unit_that_fills_it(texts, tmp_path):
    tokenize(str(texts), config(tmp_path))
    tokens = [shard.tokens for shard in TokenFolder(tmp_path / "tokens").manifest.shards]
    assert len(tokens) >= 4
    assert all(700 <= count < 700 + 600 for count in tokens[:-1])


def test_rows_are_documents_wherever_the_parts_are_cut(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"text": f"row {number} " * (number % 9 + 1)} for number in range(50)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenize(str(file), config(tmp_path))
    encode = ByteTokenizer().encode
    expected = [encode(row["text"].encode()).tolist() for row in rows]
    assert documents(tmp_path / "tokens") == expected


def test_the_tokenizer_comes_along(texts, tmp_path):
    from tests.data.test_tokenizer import train_json

    file = train_json(tmp_path / "mine.json")
    tokenize(str(texts), config(tmp_path, tokenizer=file))
    folder = TokenFolder(tmp_path / "tokens")
    assert Path(folder.tokenizer_spec).read_bytes() == Path(file).read_bytes()
    assert folder.vocab_size > 256


@pytest.mark.alone
def test_the_number_of_workers_leaves_no_trace(texts, tmp_path):
    tokenize(str(texts), config(tmp_path, "one"))
    tokenize(str(texts), config(tmp_path, "three", workers=3))
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def killed_at(call: int, texts: Path, options: TokenizeConfig) -> bool:
    """Tokenizes in a process that ends without a word before one of its calls of the system."""
    child = os.fork()
    if not child:
        left = call

        def counted(real):
            def call(*args, **options):
                nonlocal left
                left -= 1
                return real(*args, **options) if left else os._exit(9)

            return call

        for name in ("fsync", "replace", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            tokenize(str(texts), options)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.alone
@pytest.mark.parametrize("first", [1, 12])
def test_kills_at_any_call_leave_no_trace(texts, tmp_path, first):
    """Each run gets a call further than the one before."""
    tokenize(str(texts), config(tmp_path, "expected"))
    call = first
    while killed_at(call, texts, config(tmp_path)):
        call += 1
    assert call > first + 1
    assert contents(tmp_path / "tokens") == contents(tmp_path / "expected")


@pytest.mark.cluster
def test_kills_at_random_moments_leave_no_trace(tmp_path):
    """Two workers and their parent, on the standard library's sources in bytes."""
    options = {"workers": 2, "shard_tokens": 2_000_000}
    tokenize("", config(tmp_path, "expected", **options))
    chance, kills = random.Random(0), 0
    while True:
        child = os.fork()
        if not child:
            try:
                tokenize("", config(tmp_path, **options))
            finally:
                os._exit(0)
        time.sleep(chance.uniform(0.02, 0.2 + 0.1 * kills))
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            break
        kills += 1
    tokenize("", config(tmp_path, **options))
    assert kills >= 3
    assert contents(tmp_path / "tokens") == contents(tmp_path / "expected")


def test_a_damaged_piece_is_made_again(texts, tmp_path, monkeypatch):
    tokenize(str(texts), config(tmp_path, "expected"))
    with monkeypatch.context() as patch:
        stop_after(4, patch)
        with pytest.raises(KeyboardInterrupt):
            tokenize(str(texts), config(tmp_path, shard_tokens=10**6))
    pieces = sorted((tmp_path / "tokens" / UNFINISHED).glob("piece-*"))
    assert len(pieces) == 4
    damaged = bytearray(pieces[1].read_bytes())
    damaged[3] ^= 1
    pieces[1].write_bytes(damaged)
    pieces[2].write_bytes(b"")
    done = tokenize(str(texts), config(tmp_path, shard_tokens=10**6))
    assert done.new.documents < done.totals.documents
    assert documents(tmp_path / "tokens") == documents(tmp_path / "expected")


def stop_after(pieces: int, monkeypatch) -> None:
    """Ctrl-C when as many pieces are written."""
    real, left = module.Unfinished.write_piece, [pieces]

    def write_piece(self, unit, batches):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(self, unit, batches)

    monkeypatch.setattr(module.Unfinished, "write_piece", write_piece)


@pytest.mark.parametrize("name", ["plan.json", "shards.json"])
@pytest.mark.parametrize("content", ["{", "[]", '{"shards": 3}'])
def test_a_damaged_record_is_one_line(texts, tmp_path, monkeypatch, name, content):
    with monkeypatch.context() as patch:
        stop_after(4, patch)
        with pytest.raises(KeyboardInterrupt):
            tokenize(str(texts), config(tmp_path, shard_tokens=100))
    record = tmp_path / "tokens" / UNFINISHED / name
    assert record.exists()
    record.write_text(content)
    with pytest.raises(InputError, match=r"damaged|something else"):
        tokenize(str(texts), config(tmp_path, shard_tokens=100))


def test_a_second_run_finds_it_complete(texts, tmp_path):
    first = tokenize(str(texts), config(tmp_path))
    before = contents(tmp_path / "tokens")
    again = tokenize(str(texts), config(tmp_path, workers=2))
    assert (again.totals, again.new) == (first.totals, Totals())
    assert contents(tmp_path / "tokens") == before


@pytest.mark.parametrize("is_finished", [True, False])
def test_other_tokens_are_refused_by_what_differs(texts, tmp_path, monkeypatch, is_finished):
    from tests.data.test_tokenizer import train_json

    with monkeypatch.context() as patch:
        if not is_finished:
            stop_after(3, patch)
        try:
            tokenize(str(texts), config(tmp_path))
        except KeyboardInterrupt:
            assert not is_finished
    before = contents(tmp_path / "tokens")
    other = train_json(tmp_path / "mine.json")
    cases = [
        ({"tokenizer": other}, "the tokenizer"),
        ({"shard_tokens": 701}, "--shard_tokens = 700 there, 701 here"),
        ({"column": "body"}, "--column = text there, body here"),
        ({"format": "megatron"}, "--format = tokens there, megatron here"),
    ]
    for options, words in cases:
        with pytest.raises(InputError, match=rf"^{tmp_path}/tokens: [^\n]*{words}[^\n]*$"):
            tokenize(str(texts), config(tmp_path, **options))
    (texts / "00.txt").write_text("longer than before")
    with pytest.raises(InputError, match="names or sizes of the texts"):
        tokenize(str(texts), config(tmp_path))
    assert contents(tmp_path / "tokens") == before


def test_a_folder_of_something_else_is_left_alone(texts, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match="exists and is not empty; choose another"):
            tokenize(str(texts), config(tmp_path, output=str(path)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "texts"]


def test_tokens_among_the_texts_are_refused(texts, tmp_path, monkeypatch):
    monkeypatch.chdir(texts)
    for path, output in ((str(texts), texts / "tokens"), (".", "tokens"), ("../texts", ".")):
        with pytest.raises(InputError, match=r"^--output [^\n]*, of which all files are read; "):
            tokenize(path, config(tmp_path, output=str(output)))
    tokenize("*.txt", config(tmp_path, output="tokens"))
    assert tokenize("*.txt", config(tmp_path, output="tokens")).seconds == 0


def test_a_home_is_found_for_the_output(texts, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tokenize(str(texts), config(tmp_path, output="~/tokens"))
    assert len(documents(tmp_path / "tokens")) == COUNT - 1


def test_only_one_process_writes_a_folder(texts, tmp_path, monkeypatch):
    seen = []

    def write_piece(*_):
        with pytest.raises(InputError, match="another longctx data tokenize writes it") as caught:
            tokenize(str(texts), config(tmp_path))
        seen.append(caught)
        raise KeyboardInterrupt

    monkeypatch.setattr(module.Unfinished, "write_piece", write_piece)
    with pytest.raises(KeyboardInterrupt):
        tokenize(str(texts), config(tmp_path))
    assert len(seen) == 1


def test_a_disk_that_cannot_lock_is_no_other_process(texts, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OutsideError, match=r"\(Function not implemented\); mend that and run"):
        tokenize(str(texts), config(tmp_path))


def test_an_empty_folder_stays_one_after_a_mistake(tmp_path):
    (tmp_path / "rows.jsonl").write_text("[]")
    (tmp_path / "tokens").mkdir()
    with pytest.raises(InputError, match="no JSON object"):
        tokenize(str(tmp_path / "rows.jsonl"), config(tmp_path))
    assert list((tmp_path / "tokens").iterdir()) == []


@pytest.mark.alone
@pytest.mark.parametrize("workers", [1, 2])
def test_a_broken_row_is_named_and_nothing_is_left(tmp_path, workers):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "good"}\n{"text": "cut\n' + '{"text": "good"}\n' * 20)
    options = {"workers": workers, "output": str(tmp_path / "deep" / "tokens")}
    with pytest.raises(InputError, match=r"^[^\n]*rows.jsonl: line 2: broken JSON[^\n]*$"):
        tokenize(str(file), config(tmp_path, **options))
    if workers == 1:  # another worker may have completed a piece
        assert not (tmp_path / "deep" / "tokens").exists()
    done = tokenize(str(file), config(tmp_path, **options, bad_rows="skip"))
    assert (done.totals.documents, done.totals.skipped) == (21, 1)


def test_no_text_at_all_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match="no text in it"):
        tokenize(str(tmp_path / "empty.txt"), config(tmp_path))
    assert not (tmp_path / "tokens").exists()


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(texts, tmp_path, monkeypatch):
    tokenize(str(texts), config(tmp_path, "expected"))
    real, calls = os.fsync, []

    def fsync(handle):
        calls.append(handle)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OutsideError, match=r"^--output [^\n]*No space left[^\n]*free some"):
            tokenize(str(texts), config(tmp_path))
    assert not list((tmp_path / "tokens").rglob(".partial-*"))
    with pytest.raises(InputError, match="unfinished"):
        TokenFolder(tmp_path / "tokens")
    tokenize(str(texts), config(tmp_path))
    assert contents(tmp_path / "tokens") == contents(tmp_path / "expected")


@pytest.mark.alone
def test_a_killed_worker_is_one_line():
    def work(item):
        if item == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return item * 2

    with pytest.raises(OutsideError, match=r"^a worker process was killed \(exit code -9\)[^\n]*$"):
        list(in_order(work, range(8), 2))


@pytest.mark.alone
def test_results_come_in_order_and_errors_as_they_are():
    def work(item):
        time.sleep(0.01 * (item % 3))
        if item == 20:
            raise InputError("twenty")
        return -item

    results = in_order(work, range(30), 3)
    assert [next(results) for _ in range(15)] == [(item, -item) for item in range(15)]
    with pytest.raises(InputError, match=r"^twenty$"):
        list(results)


@pytest.mark.cluster
def test_megatron_reads_what_is_written_for_it(texts, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    tokenize(str(texts), config(tmp_path))
    options = config(tmp_path, "indexed", format="megatron")
    tokenize(str(texts), options)
    names = ["tokenized.json", "tokens.bin", "tokens.idx"]
    assert sorted(contents(tmp_path / "indexed")) == names
    dataset = IndexedDataset(str(tmp_path / "indexed" / "tokens"))
    read = [np.asarray(dataset[index]).tolist() for index in range(len(dataset))]
    assert read == documents(tmp_path / "tokens")
    assert dataset.document_indices.tolist() == list(range(COUNT))
    assert tokenize(str(texts), options).new == Totals()
