import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from longctx.cli import main
from longctx.data.config import DataConfig
from longctx.data.folder import TokenFolder
from longctx.data.sources import open_source
from longctx.data.statistics import measure
from longctx.data.tokenizer import open_tokenizer

TEXT = "the cat sat on the mat; naïve 文. "


@pytest.fixture
def texts(tmp_path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02}.txt").write_text(f"{number}: " + TEXT * (number + 1))
    return folder


def answer(capsys, *argv: object) -> dict[str, str]:
    """The labels and values that a command prints."""
    capsys.readouterr()
    assert main(["data", *map(str, argv)]) == 0
    lines = capsys.readouterr().out.splitlines()
    return dict(re.split(r"  +", line.strip(), maxsplit=1) for line in lines if "  " in line)


def test_text_becomes_a_tokenizer_tokens_and_what_is_known_of_them(texts, tmp_path, capsys):
    tokenizer, tokens = tmp_path / "tokenizer.json", tmp_path / "tokens"
    train = ["data", "train-tokenizer", str(texts), "--output", str(tokenizer)]
    assert main([*train, "--vocab_size", "270"]) == 0
    assert "270 tokens, learnt from" in capsys.readouterr().out
    made = ["data", "tokenize", str(texts), "--output", str(tokens), "--tokenizer", str(tokenizer)]
    assert main([*made, "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "12 documents" in out
    assert "tokens/s" in out
    assert "MB/s" in out
    shown = answer(capsys, "inspect", tokens)
    assert shown["what it is"] == "a folder of tokens"
    assert shown["documents"] == "12"
    assert shown["verified"] == "sha256 of 4 files"
    assert "tokens: '1: the cat sat on the mat; naïve 文. the" in shown["document 1"]
    counted = answer(capsys, "stats", tokens, "--seq_len", 64)
    assert counted["documents"] == "12"
    size = sum(path.stat().st_size for path in texts.iterdir())
    total = int(counted["tokens"].replace(",", ""))
    assert counted["bytes of text a token"] == f"{size / total:.2f}"
    found = open_tokenizer(str(tokenizer))
    assert total == sum(len(found.encode(path.read_bytes())) for path in texts.iterdir())


def test_a_run_trains_on_the_folder_as_on_the_text(texts, tmp_path):
    tokens = tmp_path / "tokens"
    assert main(["data", "tokenize", str(texts), "--output", str(tokens), "--workers", "1"]) == 0
    configs = [DataConfig(path=str(path)) for path in (tokens, texts)]
    pairs = [open_source(config, config, verify=True) for config in configs]
    for mine, theirs in zip(*pairs):
        assert mine.lengths.tolist() == theirs.lengths.tolist()
        for number, length in enumerate(mine.lengths.tolist()):
            assert np.array_equal(mine.read(number, 0, length), theirs.read(number, 0, length))


def test_a_tokenizer_is_a_function_of_the_text_and_gives_it_back(texts, tmp_path):
    files = [tmp_path / f"{name}.json" for name in "ab"]
    for file in files:
        argv = ["data", "train-tokenizer", str(texts), "--output", str(file)]
        assert main([*argv, "--vocab_size", "300"]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    tokenizer = open_tokenizer(str(files[0]))
    assert 258 < tokenizer.vocab_size <= 300
    assert (tokenizer.begin, tokenizer.end) == (0, 1)
    for text in (TEXT, "never\tseen \x00 ¿☃", "<|end|> is text", ""):
        ids = tokenizer.encode(text.encode())
        assert (ids[0], ids[-1]) == (0, 1)
        assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode(TEXT.encode())) < len(TEXT.encode())


def test_inspect_describes_text_and_rows(texts, tmp_path, capsys):
    size = sum(path.stat().st_size for path in texts.iterdir())
    (texts / "empty.txt").touch()
    shown = answer(capsys, "inspect", texts)
    assert shown["what it is"] == "text files"
    assert shown["documents"] == "12"
    assert shown["text"] == f"{size:,} bytes; 1 rows or files were left out"
    assert shown["00.txt"].startswith(f"{len(TEXT.encode()) + 3} bytes: '0: the cat")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"body": "one"}\n{"body": ""}\n{"body": "three"}\n')
    shown = answer(capsys, "inspect", rows, "--column", "body", "--bad_rows", "skip")
    assert shown["what it is"] == "JSON lines"
    assert (shown["documents"], shown["text"]) == ("2", "8 bytes; 1 rows or files were left out")


def test_statistics_are_those_of_the_lengths():
    lengths = np.array([3, 2**13 - 1, 2**13, 2**15, 2**17 + 5, 2**20, 10])
    found = measure(lengths, 2**13, 5 * int(lengths.sum()))
    assert (found.documents, found.tokens) == (7, lengths.sum())
    assert (found.percentiles[0], found.percentiles[50], found.percentiles[100]) == (3, 8192, 2**20)
    assert found.long == {
        "8K": (4, 2**13 + 2**15 + 2**17 + 5 + 2**20),
        "32K": (3, 2**15 + 2**17 + 5 + 2**20),
        "128K": (2, 2**17 + 5 + 2**20),
        "1M": (1, 2**20),
    }
    assert found.bytes_per_token == 5
    assert (found.packings["concat"].padding, found.packings["concat"].sequences) == (
        0,
        lengths.sum() / 2**13,
    )
    # 149 full pieces; of the rest 8191 and 3, 5, 10 share two sequences, or take four.
    assert found.packings["best_fit"].sequences == 149 + 2
    assert found.packings["whole"].sequences == 149 + 4
    assert found.packings["whole"].padding == pytest.approx(1 - lengths.sum() / (153 * 2**13))
    assert found.packings["best_fit"].cut == pytest.approx(3 / 7)


def test_concat_cuts_as_many_documents_as_a_count_says():
    lengths = np.array([5, 1, 8, 20])
    starts = np.random.default_rng(0).integers(0, 8, (20000, 4))
    counted = (starts + lengths > 8).mean()
    assert measure(lengths, 8).packings["concat"].cut == pytest.approx(counted, abs=0.01)


@pytest.mark.parametrize("command", ["tokenize", "inspect", "stats", "train-tokenizer"])
def test_help_lists_the_options(command, capsys):
    with pytest.raises(SystemExit) as done:
        main(["data", command, "--help"])
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert "--column" in out
    assert main(["data"]) == 0
    assert command in capsys.readouterr().out


MISTAKES = {
    "subcommand": (["tokenise"], "no such subcommand; there are tokenize, inspect, stats"),
    "path": (["inspect", "/no/such"], "PATH = '/no/such': no such file"),
    "paths": (["tokenize", "a", "b", "--output", "x"], "one PATH, not a and b: quote a glob"),
    "no output": (["tokenize", "."], "needs --output FOLDER"),
    "no file": (["train-tokenizer", "."], "needs --output FILE"),
    "suffix": (["train-tokenizer", ".", "--output", "x"], "--output x: does not end in .json"),
    "option": (["stats", ".", "--seq_lne", "8"], "nearest: --seq_len"),
    "seq_len": (["stats", ".", "--seq_len", "0"], "--seq_len = 0"),
    "documents": (["inspect", ".", "--documents", "-1"], "--documents = -1"),
    "vocabulary": (
        ["train-tokenizer", ".", "--output", "x.json", "--vocab_size", "257"],
        "--vocab_size = 257: must be at least 258",
    ),
    "bytes": (
        ["train-tokenizer", ".", "--output", "x.json", "--most_bytes", "0"],
        "--most_bytes = 0",
    ),
    "workers": (["tokenize", ".", "--output", "x", "--workers", "-1"], "--workers = -1"),
    "shard": (["tokenize", ".", "--output", "x", "--shard_tokens", "0"], "--shard_tokens = 0"),
    "format": (["tokenize", ".", "--output", "x", "--format", "zip"], "--format"),
    "tokenizer": (
        ["tokenize", ".", "--output", "x", "--tokenizer", "nowhere.json"],
        "--tokenizer = 'nowhere.json': cannot be read",
    ),
    "ids": (["tokenize", ".", "--output", "x", "--tokenizer", "ids:9"], "stands for no text"),
    "column": (
        ["tokenize", "rows.jsonl", "--output", "x", "--column", "body"],
        "line 1: no 'body' in the row",
    ),
    "row": (["tokenize", "rows.jsonl", "--output", "x"], "line 2: broken JSON"),
    "rows to inspect": (["inspect", "rows.jsonl"], "--bad_rows skip"),
    "rows to learn": (["train-tokenizer", "rows.jsonl", "--output", "x.json"], "line 2: broken"),
    "no text": (["train-tokenizer", "empty.txt", "--output", "x.json"], "no text in it"),
    "tokens": (["tokenize", ".", "--output", "x", "--read_as", "tokens"], "token ids, not text"),
}


@pytest.mark.parametrize(("argv", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_gets_one_line_and_nothing_is_written(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "good"}\n{"text": "cut\n')
    (tmp_path / "empty.txt").touch()
    assert main(["data", *argv]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "rows.jsonl"]


def test_ids_without_a_tokenizer_are_refused_or_shown_as_numbers(tmp_path, capsys):
    import pyarrow
    from pyarrow import parquet

    file = tmp_path / "ids.parquet"
    parquet.write_table(pyarrow.table({"ids": [[1, 2, 3], [4, 5]]}), file)
    assert main(["data", "stats", str(file), "--column", "ids"]) == 2
    assert "set --tokenizer, or ids:N" in capsys.readouterr().err
    shown = answer(capsys, "inspect", file, "--column", "ids", "--tokenizer", "ids:6")
    assert (shown["documents"], shown["tokens"]) == ("2", "5")
    assert shown["document 0"] == "3 tokens: '1 2 3'"
    assert main(["data", "inspect", str(file), "--column", "ids", "--tokenizer", "ids:5"]) == 2
    assert "token id 5" in capsys.readouterr().err


def test_a_changed_shard_is_found_by_inspect(texts, tmp_path, capsys):
    tokens = tmp_path / "tokens"
    assert main(["data", "tokenize", str(texts), "--output", str(tokens), "--workers", "1"]) == 0
    manifest = json.loads((tokens / "manifest.json").read_text())
    assert manifest["tokens"] == int(TokenFolder(tokens).lengths.sum())
    file = tokens / "tokens-00000.bin"
    file.write_bytes(file.read_bytes()[:-1] + b"\x02")
    assert main(["data", "inspect", str(tokens)]) == 2
    assert "changed since it was tokenized" in capsys.readouterr().err


def test_no_more_text_is_learnt_from_than_was_asked_for(tmp_path, capsys):
    (tmp_path / "large.txt").write_text(TEXT * 100)
    argv = ["train-tokenizer", str(tmp_path / "large.txt"), "--output", str(tmp_path / "x.json")]
    assert main(["data", *argv, "--vocab_size", "300", "--most_bytes", "100"]) == 0
    assert "learnt from 100 bytes" in capsys.readouterr().out


def test_names_that_no_terminal_can_show_are_printed_all_the_same(tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / os.fsdecode(b"\xff.txt")).write_text("text")
    assert answer(capsys, "inspect", folder)["\\udcff.txt"] == "4 bytes: 'text'"
