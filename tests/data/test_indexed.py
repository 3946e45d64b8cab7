import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from longctx.data import DataConfig
from longctx.data.indexed import IndexedStore, write_indexed
from longctx.data.sources import open_source
from longctx.data.tokenizer import open_tokenizer
from longctx.errors import InputError, OutsideError

pytestmark = [
    pytest.mark.cluster,  # megatron-core takes seconds to import
    pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning"),
]

DOCUMENTS = [list(range(number, 2 * number + 1)) for number in range(12)]


def written(prefix: Path, documents=DOCUMENTS, vocab_size: int = 50) -> Path:
    write_indexed(prefix, [np.array(ids, np.uint32) for ids in documents], vocab_size)
    return prefix


def opened(prefix: Path, spec: str = "ids:50", verify: bool = True) -> IndexedStore:
    return IndexedStore(str(prefix), open_tokenizer(spec), verify)


def documents(store) -> list[list[int]]:
    return [store.read(d, 0, length).tolist() for d, length in enumerate(store.lengths.tolist())]


@pytest.mark.parametrize(("vocab_size", "item"), [(50, 2), (65499, 2), (65500, 4), (200_000, 4)])
def test_megatron_reads_what_is_written_here(tmp_path, vocab_size, item):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    rows = [*DOCUMENTS, [vocab_size - 1]]
    dataset = IndexedDataset(str(written(tmp_path / "mine", rows, vocab_size)))
    assert [dataset[number].tolist() for number in range(len(dataset))] == rows
    assert dataset.document_indices.tolist() == list(range(len(rows) + 1))
    assert (tmp_path / "mine.bin").stat().st_size == item * sum(map(len, rows))
    store = opened(tmp_path / "mine", f"ids:{vocab_size}")
    assert documents(store) == rows
    assert store.bytes_read == item * sum(map(len, rows))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
def test_documents_of_several_sequences_are_read_end_to_end(tmp_path, dtype):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    groups = [[[1, 2, 3], [4], [5, 6]], [[7, 8]], [], [[9], [], [10, 11, 12]], [[13]]]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for group in groups:
        for ids in group:
            builder.add_item(torch.tensor(ids))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    store = opened(tmp_path / "theirs")
    expected = [[token for ids in group for token in ids] for group in groups if group]
    assert documents(store) == expected
    for number, ids in enumerate(expected):
        for start in range(len(ids) + 1):
            for stop in range(start, len(ids) + 1):
                before = store.bytes_read
                assert store.read(number, start, stop).tolist() == ids[start:stop]
                assert store.bytes_read - before == (stop - start) * np.dtype(dtype).itemsize


def test_a_prefix_is_told_by_its_files_and_split_by_number(tmp_path):
    written(tmp_path / "mine")
    for path in (tmp_path / "mine", Path(tmp_path / "mine")):
        config = DataConfig(str(path), tokenizer="ids:50", validation_percent=20)
        train, validation = open_source(config, config, verify=True)
        assert sorted(documents(train) + documents(validation)) == sorted(DOCUMENTS)
        assert validation.residues.max() < 20 <= train.residues.min()
    with pytest.raises(InputError, match=r"^data\.path = [^\n]*set data\.tokenizer, or ids:N"):
        open_source(DataConfig(str(path)), DataConfig(str(path)), verify=True)


def test_a_vocabulary_that_is_too_small_is_found_before_training(tmp_path):
    prefix = written(tmp_path / "mine")
    with pytest.raises(InputError, match=rf"^{prefix}: document 10 holds token id 20, but[^\n]*$"):
        opened(prefix, "ids:20")
    store = opened(prefix, "ids:20", verify=False)
    with pytest.raises(InputError, match="document 11 holds token id 20"):
        store.read(11, 0, 12)


def test_the_fingerprint_follows_ids_and_borders(tmp_path):
    moved = [*DOCUMENTS[:-2], DOCUMENTS[-2] + DOCUMENTS[-1][:1], DOCUMENTS[-1][1:]]
    changed = [*DOCUMENTS[:-1], [49, *DOCUMENTS[-1][1:]]]
    found = [
        opened(written(tmp_path / str(number), rows)).fingerprint()
        for number, rows in enumerate((DOCUMENTS, DOCUMENTS, moved, changed))
    ]
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_any_cut_is_named_in_one_line(tmp_path):
    prefix = written(tmp_path / "mine")
    for suffix in (".idx", ".bin"):
        file = Path(f"{prefix}{suffix}")
        content = file.read_bytes()
        for length in {0, 5, 9, 17, 33, 34, 40, len(content) // 2, len(content) - 1}:
            file.write_bytes(content[:length])
            with pytest.raises(InputError, match=rf"^{prefix}\.[^\n]*damaged[^\n]*$"):
                opened(prefix)
        file.write_bytes(content + b"\0")
        with pytest.raises(InputError, match=rf"^{prefix}\.[^\n]*damaged[^\n]*$"):
            opened(prefix)
        file.write_bytes(content)
        file.unlink()
        with pytest.raises(InputError, match=rf"^{file}: no such file[^\n]*$"):
            opened(prefix)
        file.write_bytes(content)
    assert documents(opened(prefix)) == DOCUMENTS


def test_a_changed_byte_of_the_index_is_named_or_changes_the_fingerprint(tmp_path):
    prefix = written(tmp_path / "mine")
    file = Path(f"{prefix}.idx")
    content, original = file.read_bytes(), opened(prefix).fingerprint()
    for place in range(len(content)):
        for bit in (0, 7):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            file.write_bytes(damaged)
            assert fingerprint_or_line(prefix) != original, place


def fingerprint_or_line(prefix: Path) -> str:
    """The fingerprint, or the message of an InputError."""
    try:
        return opened(prefix, verify=False).fingerprint()
    except InputError as error:
        return str(error)


def test_other_kinds_of_files_are_refused(tmp_path):
    prefix = written(tmp_path / "mine")
    file = Path(f"{prefix}.idx")
    content = file.read_bytes()
    file.write_bytes(content + bytes(len(DOCUMENTS)))
    with pytest.raises(InputError, match="a multimodal dataset"):
        opened(prefix)
    for place, value in ((9, 2), (17, 6), (17, 77)):
        file.write_bytes(content[:place] + struct.pack("<B", value) + content[place + 1 :])
        with pytest.raises(InputError, match=r"^[^\n]*idx: version \d, type \d+[^\n]*$"):
            opened(prefix)
    write_indexed(prefix, [], 50)
    with pytest.raises(InputError, match="holds no documents"):
        opened(prefix)


def test_a_folder_that_cannot_be_written_is_an_outside_error(tmp_path):
    with pytest.raises(OutsideError, match=r"^[^\n]*missing/mine: cannot be written[^\n]*$"):
        written(tmp_path / "missing" / "mine")


def test_megatron_that_is_not_installed_is_named(tmp_path, monkeypatch):
    prefix = written(tmp_path / "mine")
    monkeypatch.setitem(sys.modules, "megatron.core.datasets", None)
    with pytest.raises(InputError, match=r"pip install 'longctx\[megatron\]'"):
        opened(prefix)
