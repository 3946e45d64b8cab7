import gzip
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.data import rows as rows_module
from longctx.data import texts as texts_module
from longctx.data.config import SourceConfig
from longctx.data.hub import open_dataset
from longctx.data.rows import Part
from longctx.data.texts import TextSource, open_texts, residue
from longctx.errors import InputError, OutsideError


def read_all(source: TextSource) -> list[tuple[str, str]]:
    found = [text for part in source.parts for text in source.read(part)]
    return [(text.name, text.content.decode()) for text in found]


def lines(path: Path, *contents: str, end: str = "\n") -> Path:
    path.write_text("".join(json.dumps({"text": text}) + end for text in contents))
    return path


def opened(path, **fields) -> TextSource:
    return open_texts(SourceConfig(str(path), **fields))


def test_small_files_share_a_part_and_large_ones_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(texts_module, "PART_BYTES", 10)
    for name, size in {"a": 4, "b": 4, "c": 4, "d": 30, "e": 0, "f": 1}.items():
        (tmp_path / name).write_text(name * size)
    source = opened(tmp_path)
    assert [[name for name, _ in part.files] for part in source.parts] == [
        ["a", "b", "c"], ["d"], ["e", "f"],
    ]  # fmt: skip
    assert [(part.name, part.size) for part in source.parts] == [("a", 12), ("d", 30), ("e", 1)]
    assert [name for name, _ in read_all(source)] == ["a", "b", "c", "d", "f"]
    assert source.skipped == 1


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=30), max_size=12),
    st.integers(1, 60),
    st.sampled_from(["\n", "\r\n", "\n\n", " \n"]),
    st.booleans(),
)
def test_parts_of_json_lines_hold_every_row_once(tmp_path_factory, contents, size, end, is_open):
    path = lines(tmp_path_factory.mktemp("rows") / "rows.jsonl", *contents, end=end)
    if is_open and contents:
        path.write_bytes(path.read_bytes().rstrip())
    whole = read_all(opened(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "RANGE_BYTES", size)
        source = opened(path)
    assert [text for _, text in whole] == contents
    assert read_all(source) == whole
    assert len({name for name, _ in whole}) == len(whole)
    assert sum(part.size for part in source.parts) == path.stat().st_size
    assert len({part.name for part in source.parts}) == len(source.parts)


def test_parts_travel_to_other_processes(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    lines(tmp_path / "rows.jsonl", "one", "two")
    parquet.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.parquet"):
        source = opened(tmp_path / name)
        assert read_all(pickle.loads(pickle.dumps(source))) == read_all(source)
        assert all(isinstance(part, Part) for part in source.parts)


def test_packed_lines_have_the_names_of_plain_ones(tmp_path):
    plain = lines(tmp_path / "rows.jsonl", "one", "two", "three")
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    offsets = [name.removeprefix("rows.jsonl@") for name, _ in read_all(opened(plain))]
    assert offsets == ["0", "16", "32"]
    assert read_all(opened(packed)) == [
        (f"rows.jsonl.gz@{offset}", text)
        for offset, (_, text) in zip(offsets, read_all(opened(plain)))
    ]


def test_rows_of_parquet_are_numbered_through_its_groups(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    contents = [f"row {number}" for number in range(10)]
    for kind in (pa.string(), pa.large_string(), pa.binary()):
        table = pa.table({"a": range(10), "text": pa.array(contents, kind)})
        parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=4)
        source = opened(tmp_path / "rows.parquet")
        assert [part.name for part in source.parts] == [f"rows.parquet@{n}" for n in (0, 4, 8)]
        expected = [(f"rows.parquet@{number}", text) for number, text in enumerate(contents)]
        assert read_all(source) == expected


def test_rows_of_a_dataset_are_numbered_through_its_parts(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(rows_module, "RANGE_ROWS", 4)
    monkeypatch.setattr(rows_module, "BATCH_ROWS", 3)
    contents = [f"row {number}" for number in range(10)]
    whole = datasets.Dataset.from_dict({"body": contents})
    datasets.DatasetDict({"train": whole, "test": whole.select([3, 1])}).save_to_disk(tmp_path)
    source = opened(tmp_path, column="body")
    assert [part.name for part in source.parts] == ["train@0", "train@4", "train@8"]
    assert read_all(source) == [(f"train@{n}", text) for n, text in enumerate(contents)]
    other = opened(tmp_path, column="body", split="test")
    assert read_all(other) == [("test@0", "row 3"), ("test@1", "row 1")]


BAD_ROWS = {
    '{"text": "cut': "broken JSON",
    '{"text": "a"} x': "broken JSON",
    "[" * 10_000: "broken JSON",
    '"text"': "no JSON object",
    '{"other": 1, "more": 2}': r"no 'text' in the row \(it has 'other', 'more'\)",
    '{"text": ""}': "no text in 'text'",
    '{"text": null}': "no text in 'text'",
    '{"text": [1, 2]}': "'text' holds list, not text",
}


@pytest.mark.parametrize("row", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_a_bad_line_is_named_by_file_and_number_or_counted(tmp_path, row, monkeypatch):
    monkeypatch.setattr(rows_module, "RANGE_BYTES", 20)
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "one"}}\n\n{row}\n{{"text": "two"}}\n')
    expected = rf"^{path}: line 3: {BAD_ROWS[row]}[^\n]*; mend it, or set data\.bad_rows[^\n]*$"
    with pytest.raises(InputError, match=expected):
        read_all(opened(path))
    source = opened(path, bad_rows="skip")
    assert [text for _, text in read_all(source)] == ["one", "two"]
    assert source.skipped == 1


def test_a_line_that_is_not_utf8_is_broken(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "\xff"}\n')
    with pytest.raises(InputError, match=rf"^{path}: line 2: broken JSON[^\n]*$"):
        read_all(opened(path))
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(InputError, match=rf"^{packed}: line 2: broken JSON[^\n]*$"):
        read_all(opened(packed))


def test_a_byte_order_mark_before_lines_is_no_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "\\ufefftwo"}\r\n')
    assert [text for _, text in read_all(opened(path))] == ["one", "\ufefftwo"]


def test_half_a_surrogate_does_not_stop_reading(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n')
    assert read_all(opened(path)) == [("rows.jsonl@0", "a?b")]


def test_empty_rows_of_columns_are_named_by_row_or_counted(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": ["one", None, "", "two"]}), tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=r"^rows\.parquet@1: no text in 'text'; [^\n]*$"):
        read_all(opened(tmp_path / "rows.parquet"))
    source = opened(tmp_path / "rows.parquet", bad_rows="skip")
    assert [text for _, text in read_all(source)] == ["one", "two"]
    assert source.skipped == 2


def test_strings_of_a_column_need_not_be_utf8(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    bad = pa.array([b"a\xffb"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"text": bad}), tmp_path / "rows.parquet")
    source = opened(tmp_path / "rows.parquet")
    assert [text.content for text in source.read(source.parts[0])] == [b"a\xffb"]


def test_damaged_files_are_named_in_one_line(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    packed = lines(tmp_path / "rows.jsonl", *map(str, range(99))).read_bytes()
    path = tmp_path / "cut.jsonl.gz"
    for damage in (gzip.compress(packed)[:-20], b"no gzip", gzip.compress(packed)[:30] + b"x" * 99):
        path.write_bytes(damage)
        with pytest.raises(InputError, match=rf"^{path}: (a damaged gzip file|line)[^\n]*$"):
            read_all(opened(path))
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"text": ["x" * 100, "y" * 100]}), path, compression="none")
    content = path.read_bytes()
    place = content.index(b"x" * 100)
    for damage in (content[:-9], content[:50] + content[60:], b"PAR1", b""):
        path.write_bytes(damage)
        with pytest.raises(InputError, match=rf"^{path}: [^\n]*damaged[^\n]*$"):
            read_all(opened(path))
    path.write_bytes(content[: place - 8] + b"\xff" * 16 + content[place + 8 :])
    with pytest.raises(InputError, match=rf"^{path}: row group 0 is damaged[^\n]*$"):
        read_all(opened(path))


def test_a_column_that_is_missing_is_named_in_one_line(tmp_path):
    import datasets
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"body": ["one"]}), tmp_path / "rows.parquet")
    datasets.Dataset.from_dict({"body": ["one"]}).save_to_disk(tmp_path / "saved")
    for name in ("rows.parquet", "saved"):
        with pytest.raises(InputError, match=r"no column 'text'; set data.column to one of 'body'"):
            opened(tmp_path / name)


def test_ids_and_streams_are_no_texts(tmp_path):
    for suffix in (".idx", ".bin"):
        (tmp_path / f"p{suffix}").touch()
    with pytest.raises(InputError, match="holds token ids, not text"):
        opened(tmp_path / "p")
    with pytest.raises(InputError, match="set streaming = false"):
        opened(lines(tmp_path / "rows.jsonl", "one"), streaming=True)


def test_residues_never_change_between_versions():
    """They decide which documents are held out."""
    assert {letter: residue(letter) for letter in "abcd"} == {"a": 50, "b": 46, "c": 30, "d": 29}


def test_streams_of_local_files_have_a_shard_a_file_and_every_row(tmp_path):
    import datasets

    contents = [f"row {number}" for number in range(9)]
    saved = datasets.Dataset.from_dict({"text": contents})
    saved.save_to_disk(tmp_path / "saved", num_shards=3)
    stream = open_dataset(SourceConfig(str(tmp_path / "saved"), streaming=True))
    assert stream.num_shards == 3
    assert [row["text"] for row in stream] == contents
    for number in range(3):
        lines(tmp_path / f"{number}.jsonl", f"{number} a", f"{number} b")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_bytes(b"two\nlines \xff")
    stream = open_dataset(SourceConfig(str(tmp_path / "*.jsonl"), streaming=True))
    assert stream.num_shards == 3
    expected = [f"{number} {letter}" for number in range(3) for letter in "ab"]
    assert [row["text"] for row in stream] == expected
    whole = open_dataset(SourceConfig(str(tmp_path / "text"), format="text", streaming=True))
    assert [row["text"] for row in whole] == ["two\nlines \ufffd"]


def test_nobody_is_told_of_local_files(tmp_path, monkeypatch):
    import datasets

    calls = []
    monkeypatch.setattr(datasets.load, "get_session", lambda: calls.append("a request"))
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    open_dataset(SourceConfig(str(lines(tmp_path / "rows.jsonl", "one")), streaming=True))
    assert not calls


def test_datasets_that_cannot_be_opened_are_named_in_one_line(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub

    one = datasets.Dataset.from_dict({"text": ["one"]})
    datasets.DatasetDict({"train": one}).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match=r"^[^\n]*no split 'x'; set data\.split to one of train$"):
        open_dataset(SourceConfig(str(tmp_path / "saved"), split="x"))
    next((tmp_path / "saved" / "train").glob("*.arrow")).write_bytes(b"cut")
    with pytest.raises(InputError, match=r"^[^\n]*saved: a damaged dataset \([^\n]*$"):
        open_dataset(SourceConfig(str(tmp_path / "saved")))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for streaming in (True, False):
        config = SourceConfig("hf://nobody/nothing", streaming=streaming)
        expected = r"^data\.path = 'hf://nobody/nothing': cannot be loaded [^\n]*HF_HUB_OFFLINE"
        with pytest.raises(OutsideError, match=expected):
            open_dataset(config)
