from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from longctx.data import DataConfig
from longctx.data.arrow import ArrowStore
from longctx.data.sources import open_source, open_store
from longctx.errors import InputError

ROWS = [[number * 10 + place for place in range(number + 1)] for number in range(30)]
TYPES = {
    "list": pa.list_(pa.int32()),
    "large": pa.large_list(pa.uint16()),
    "long": pa.list_(pa.int64()),
}


def save(folder: Path, rows: list, kind: pa.DataType = TYPES["list"], chunk: int = 7) -> Path:
    """A folder of the datasets library, whose column has a chunk for about so many rows."""
    import datasets

    table = datasets.table.InMemoryTable(pa.table({"ids": pa.array(rows, kind)}))
    chunks = -(-len(rows) // chunk)
    datasets.Dataset(table).save_to_disk(folder, num_shards=chunks)
    assert datasets.load_from_disk(folder).data.column("ids").num_chunks == chunks
    return folder


def opened(path: Path, verify: bool = True, **fields) -> ArrowStore:
    config = DataConfig(str(path), **{"column": "ids", "tokenizer": "ids:1000", **fields})
    return open_store(config, config, verify)


def documents(store) -> list[list[int]]:
    return [store.read(d, 0, length).tolist() for d, length in enumerate(store.lengths.tolist())]


@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
def test_every_part_of_every_row_is_read(tmp_path, kind):
    store = opened(save(tmp_path / "saved", ROWS, kind))
    assert isinstance(store, ArrowStore)
    assert store.bytes_read == 0
    assert documents(store) == ROWS
    size = np.dtype(kind.value_type.to_pandas_dtype()).itemsize
    assert store.bytes_read == size * sum(map(len, ROWS))
    for number in (0, 6, 7, 29):
        for start in range(number + 1):
            assert store.read(number, start, number).tolist() == ROWS[number][start:number]


def test_rows_of_one_length_and_slices_of_a_dataset_are_read(tmp_path):
    import datasets

    rows = [[number, number + 1, number + 2] for number in range(20)]
    kind = pa.list_(pa.int32(), 3)
    assert documents(opened(save(tmp_path / "fixed", rows, kind))) == rows
    saved = datasets.load_from_disk(save(tmp_path / "whole", ROWS))
    saved.select([5, 3, 9]).save_to_disk(tmp_path / "some")
    assert documents(opened(tmp_path / "some")) == [ROWS[5], ROWS[3], ROWS[9]]
    saved.select(range(3, 12)).save_to_disk(tmp_path / "range")
    assert documents(opened(tmp_path / "range")) == ROWS[3:12]


def test_parquet_files_are_read_as_well(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for number in range(2):
        table = pa.table({"ids": pa.array(ROWS[number * 15 :][:15], TYPES["list"])})
        parquet.write_table(table, tmp_path / f"{number}.parquet", row_group_size=4)
    assert documents(opened(tmp_path / "*.parquet")) == ROWS


def test_slices_and_holes_of_rows_of_one_length_are_read(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [[number, number + 1] for number in range(20)]
    for name, kind in {"fixed": pa.list_(pa.int32(), 2), "list": TYPES["list"]}.items():
        with_hole = pa.array([*rows[:7], None, *rows[8:]], kind)
        parquet.write_table(pa.table({"ids": with_hole}), tmp_path / f"{name}.parquet")
        store = opened(tmp_path / f"{name}.parquet", split="train[5:]", bad_rows="skip")
        assert documents(store) == rows[5:7] + rows[8:]
        assert store.skipped == 1


def test_documents_are_held_out_by_their_number(tmp_path):
    config = DataConfig(
        str(save(tmp_path / "saved", ROWS)), column="ids", tokenizer="ids:1000",
        validation_percent=20,
    )  # fmt: skip
    train, validation = open_source(config, config, verify=True)
    assert sorted(documents(train) + documents(validation)) == sorted(ROWS)
    assert 2 < len(validation.lengths) < 12
    assert validation.residues.max() < 20 <= train.residues.min()


def test_nothing_but_the_asked_part_is_mapped_in(tmp_path):
    """Counts pages that the process holds of the file, before and after a small read."""
    rows = [list(range(3)), [7] * 4_000_000, [5, 6]]
    store = opened(save(tmp_path / "saved", rows), verify=False)

    def resident() -> int:
        entries = Path("/proc/self/smaps").read_text().split("saved/")[1:]
        lines = [line for entry in entries for line in entry.splitlines()[1:5]]
        return sum(int(line.split()[1]) for line in lines if line.startswith("Rss:"))

    before = resident()
    assert store.read(1, 2_000_000, 2_000_003).tolist() == [7] * 3
    assert store.bytes_read == 12
    small = resident() - before
    assert store.read(1, 0, 4_000_000).sum() == 28_000_000
    assert 4 * small < resident() - before


def test_a_vocabulary_that_is_too_small_is_found_before_training(tmp_path):
    path = save(tmp_path / "saved", ROWS)
    with pytest.raises(InputError, match=r"saved': document 28 holds token id 300, but[^\n]*$"):
        opened(path, tokenizer="ids:300")
    store = opened(path, verify=False, tokenizer="ids:300")
    assert store.read(28, 0, 20).tolist() == ROWS[28][:20]
    with pytest.raises(InputError, match="document 28 holds token id 300"):
        store.read(28, 20, 21)


def test_empty_rows_are_refused_or_counted(tmp_path):
    for name, hole in (("null", None), ("empty", [])):
        path = save(tmp_path / name, [[1, 2], hole, [3], [4, 5]], chunk=2)
        with pytest.raises(InputError, match=r"row 1 has no ids in 'ids'; [^\n]*$"):
            opened(path)
        store = opened(path, bad_rows="skip")
        assert documents(store) == [[1, 2], [3], [4, 5]]
        assert store.skipped == 1
        with pytest.raises(InputError, match="no row has ids"):
            opened(save(tmp_path / f"only-{name}", [hole]), bad_rows="skip")


def test_what_is_no_id_is_named_in_one_line(tmp_path):
    path = save(tmp_path / "gaps", [[1], [2, None, 3]])
    with pytest.raises(InputError, match=r"row 1 has a gap[^\n]*$"):
        opened(path)
    path = save(tmp_path / "floats", [[1.0]], pa.list_(pa.float32()))
    with pytest.raises(InputError, match=r"'ids' holds lists of float; token ids are[^\n]*$"):
        opened(path)
    path = save(tmp_path / "saved", ROWS)
    with pytest.raises(
        InputError, match=r"^data\.path = [^\n]*set data\.tokenizer, or ids:N[^\n]*$"
    ):
        opened(path, tokenizer="")
    with pytest.raises(InputError, match=r"no column 'text'; set data\.column to one of 'ids'$"):
        opened(path, column="text")


def test_the_fingerprint_is_that_of_the_ids(tmp_path):
    first, same, other = (
        opened(save(tmp_path / name, rows, kind, chunk)).fingerprint()
        for name, rows, kind, chunk in (
            ("a", ROWS, TYPES["list"], 7),
            ("b", ROWS, TYPES["long"], 30),
            ("c", [*ROWS[:-1], [999, *ROWS[-1][1:]]], TYPES["list"], 7),
        )
    )
    assert first == same != other
