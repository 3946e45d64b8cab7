"""What is read does not depend on where a run stops, nor on how it is split."""

import gzip
import json
from collections.abc import Callable, Iterator
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from longctx.data import ByteTokenizer, DataConfig, Loaders, build_loaders
from longctx.data.config import MixtureConfig
from longctx.data.indexed import write_indexed
from longctx.data.tokenize import TokenizeConfig, tokenize
from longctx.sequence.placement import place

SEQ_LEN, BATCH = 24, 4
DOCUMENTS = [f"{number}: " + "abcdefghij"[: number % 11] * (1 + number % 5) for number in range(60)]
TOKENIZER = ByteTokenizer()


class Split(NamedTuple):
    """How processes share the work."""

    dp: int
    sp: int
    placement: str = "contiguous"


SPLITS = {
    "1x1": [Split(1, 1)],
    "2x1": [Split(2, 1)],
    "1x4": [Split(1, 4, "zigzag")],
    "2x2": [Split(2, 2)],
    "4 -> 2": [Split(1, 4), Split(2, 1), Split(2, 2, "mirror"), Split(1, 2, "zigzag")],
}


def as_text(folder: Path) -> DataConfig:
    for number, text in enumerate(DOCUMENTS):
        (folder / f"{number:03}.txt").write_text(text)
    return DataConfig(str(folder))


def as_lines(folder: Path) -> DataConfig:
    lines = [json.dumps({"text": text}) for text in DOCUMENTS]
    (folder / "a.jsonl").write_text("\n".join(lines[:25]))
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(lines[25:]))
    return DataConfig(str(folder))


def make_rows() -> Any:
    from datasets import Dataset

    ids = [TOKENIZER.encode(text.encode()).tolist() for text in DOCUMENTS]
    return Dataset.from_dict({"text": DOCUMENTS, "ids": ids})


def as_parquet(folder: Path) -> DataConfig:
    make_rows().to_parquet(folder / "rows.parquet")
    return DataConfig(str(folder / "rows.parquet"))


def as_dataset(folder: Path) -> DataConfig:
    make_rows().save_to_disk(folder / "saved")
    return DataConfig(str(folder / "saved"))


def as_dataset_of_ids(folder: Path) -> DataConfig:
    as_dataset(folder)
    return DataConfig(str(folder / "saved"), column="ids", tokenizer="bytes")


def as_stream(folder: Path) -> DataConfig:
    for shard in range(3):
        rows = [json.dumps({"text": text}) for text in DOCUMENTS[shard::3]]
        (folder / f"{shard}.jsonl").write_text("\n".join(rows))
    return DataConfig(str(folder), streaming=True)


def as_stream_of_ids(folder: Path) -> DataConfig:
    make_rows().save_to_disk(folder / "saved", num_shards=4)
    return DataConfig(str(folder / "saved"), streaming=True, column="ids", tokenizer="bytes")


def as_megatron(folder: Path) -> DataConfig:
    pytest.importorskip("megatron.core")
    ids = (TOKENIZER.encode(text.encode()) for text in DOCUMENTS)
    write_indexed(folder / "tokens", ids, TOKENIZER.vocab_size)
    return DataConfig(str(folder / "tokens"), tokenizer="bytes")


def as_tokens(folder: Path) -> DataConfig:
    (folder / "texts").mkdir()
    as_text(folder / "texts")
    options = TokenizeConfig(output=str(folder / "tokens"), workers=1, shard_tokens=700)
    tokenize(str(folder / "texts"), options)
    return DataConfig(str(folder / "tokens"))


def as_mixture(folder: Path) -> DataConfig:
    parts = {}
    for name, make, weight in (("a", as_text, 5), ("b", as_tokens, 3), ("c", as_stream, 2)):
        (folder / name).mkdir()
        made = make(folder / name)
        parts[name] = MixtureConfig(path=made.path, streaming=made.streaming, weight=weight)
    return DataConfig(mixture=parts)


def as_task(_: Path) -> DataConfig:
    return DataConfig(task="mqar", pairs=4, answers=3, vocabulary=24)


def packed(packing: str) -> Callable[[Path], DataConfig]:
    def make(folder: Path) -> DataConfig:
        return DataConfig(as_text(folder).path, packing=packing, long_from=30, long_repeat=2)

    return make


SOURCES = {
    "text": as_text,
    "jsonl": as_lines,
    "parquet": as_parquet,
    "datasets": as_dataset,
    "datasets, ids": as_dataset_of_ids,
    "streaming": as_stream,
    "streaming, ids": as_stream_of_ids,
    "megatron": as_megatron,
    "tokens": as_tokens,
    "mixture": as_mixture,
    "task": as_task,
    "best_fit": packed("best_fit"),
    "whole": packed("whole"),
}


def named(*left_out: str) -> pytest.MarkDecorator:
    """One case for each source; megatron-core takes seconds to import."""
    names = [name for name in SOURCES if name not in left_out]
    slow = pytest.mark.cluster
    marked = [pytest.param(n, marks=slow) if n == "megatron" else n for n in names]
    return pytest.mark.parametrize("name", marked)


def open_loaders(config: DataConfig) -> Loaders:
    return build_loaders(config, SEQ_LEN, BATCH, seed=3)


def read(loaders: list[Loaders], split: Split, step: int) -> np.ndarray:
    """Tokens and labels of a step, put together from what each process reads."""
    found = np.full((2, BATCH, SEQ_LEN), -1)
    rows = BATCH // split.dp
    for rank, own in enumerate(loaders):
        dp_rank, sp_rank = divmod(rank, split.sp)
        segments = place(split.placement, split.sp, SEQ_LEN, heads=2).segments[sp_rank]
        ids = own.train.ids(step)
        valid = own.train.num_valid(ids)
        mine = slice(dp_rank * rows, (dp_rank + 1) * rows)
        batch = own.train.read(ids[mine], segments)
        columns = np.concatenate([np.arange(*segment) for segment in segments])
        for part, tensor in zip(found, (batch.tokens_BT, batch.labels_BT)):
            assert (part[mine, columns] == -1).all()
            part[mine, columns] = tensor.numpy()
    assert valid == (found[1] >= 0).sum()
    return found


def straight(config: DataConfig, steps: int) -> list[np.ndarray]:
    loaders = open_loaders(config)
    return [read([loaders], Split(1, 1), step) for step in range(steps)]


def stopping(config: DataConfig, stops: list[int], splits: list[Split]) -> Iterator[np.ndarray]:
    """The same steps by runs that each end at a stop; the next one is split in another way and
    knows no more than a checkpoint does."""
    state: dict[str, Any] = {}
    for (first, last), split in zip(pairwise(stops), cycle(splits)):
        loaders = [open_loaders(config) for _ in range(split.dp * split.sp)]
        for own in loaders:
            own.load_state(json.loads(json.dumps(state)))
        for step in range(first, last):
            yield read(loaders, split, step)
        state = loaders[-1].state(last)


def check(config: DataConfig, stops: list[int], splits: list[Split], expected: list) -> None:
    seen = 0
    for step, (found, wanted) in enumerate(zip(stopping(config, stops, splits), expected)):
        assert np.array_equal(found, wanted), f"step {step} of a run with stops at {stops}"
        seen += 1
    assert seen == stops[-1]


@named()
def test_stops_and_splits_change_nothing(name, tmp_path):
    config = SOURCES[name](tmp_path)
    every_split = [split for splits in SPLITS.values() for split in splits]
    check(config, [0, 0, 1, 2, 5, 11, 12, 13, 22, 24, 25], every_split, straight(config, 25))


@pytest.mark.cluster
@named()
def test_a_thousand_steps_with_stops_are_those_without(name, tmp_path):
    config, steps = SOURCES[name](tmp_path), 1000
    expected = straight(config, steps)
    draws = np.random.default_rng(len(name))
    for splits in SPLITS.values():
        stops = sorted({0, 1, steps, *draws.integers(2, steps, 8).tolist()})
        check(config, stops, splits, expected)


@pytest.mark.cluster
def test_a_thousand_steps_of_the_standard_library_with_stops_are_those_without():
    config, splits = DataConfig(), [Split(2, 1), Split(1, 2)]
    check(config, [0, 417, 1000], splits, straight(config, 1000))


@named("mixture", "task", "best_fit", "whole")
def test_an_epoch_holds_each_document_once(name, tmp_path):
    tokens = np.concatenate([part[0].ravel() for part in straight(SOURCES[name](tmp_path), 100)])
    ends = np.flatnonzero(tokens == TOKENIZER.end)
    texts = [TOKENIZER.decode(part) for part in np.split(tokens, ends + 1)[:-1]]
    assert set(texts) < set(DOCUMENTS)
    count = len(set(texts))
    epochs = [texts[start : start + count] for start in range(0, len(texts) - count, count)]
    assert len(epochs) > 2
    assert all(len(set(epoch)) == count for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


@named("mixture", "task", "streaming", "streaming, ids")
def test_a_process_reads_its_own_tokens_and_one_more_a_segment(name, tmp_path):
    config = SOURCES[name](tmp_path)
    for placement, sp in (("contiguous", 1), ("contiguous", 2), ("zigzag", 4)):
        for segments in place(placement, sp, SEQ_LEN).segments:
            loader = open_loaders(config).train
            store, steps = loader._stream._store, 30
            before, size = store.bytes_read, store.read(0, 0, 1).dtype.itemsize
            before = store.bytes_read
            for step in range(steps):
                loader.num_valid(loader.ids(step))
                loader.read(loader.ids(step), segments)
            most = steps * BATCH * size * (SEQ_LEN // sp + len(segments))
            if config.packing == "concat":
                assert store.bytes_read - before == most
            else:
                assert most / 4 < store.bytes_read - before <= most
