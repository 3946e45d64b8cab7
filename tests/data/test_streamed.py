import json
from pathlib import Path

import numpy as np
import pytest

from longctx.data.config import DataConfig, SourceConfig
from longctx.data.hub import open_dataset
from longctx.data.loader import Loaders
from longctx.data.opening import build_loaders
from longctx.data.prefetch import Prefetch
from longctx.data.streamed import Place, RowEncoder, Rows, StreamedStream
from longctx.data.streams import IGNORE, shuffled
from longctx.data.tokenizer import open_tokenizer
from longctx.errors import InputError

SHARDS, ROWS = 3, 20
TOKENIZER = open_tokenizer("bytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three files of JSON lines, rows of 3 to 9 bytes that name themselves."""
    path = tmp_path_factory.mktemp("rows")
    for shard in range(SHARDS):
        rows = [{"text": text(shard, row)} for row in range(ROWS)]
        (path / f"{shard}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text(shard: int, row: int) -> str:
    return f"{shard}:{row}{'.' * (row % 6)}"


def source_of(folder: Path) -> SourceConfig:
    return SourceConfig(path=str(folder), streaming=True)


def open_stream(folder: Path, seq_len: int = 16, kept: int = 4, seed: int = 1) -> StreamedStream:
    source = source_of(folder)
    encode = RowEncoder(source, TOKENIZER)
    return StreamedStream(Rows(open_dataset(source), encode, lambda _: True, seed), seq_len, kept)


def expected_tokens(seed: int, epochs: int) -> np.ndarray:
    documents = [
        TOKENIZER.encode(text(shard, row).encode())
        for epoch in range(epochs)
        for shard in shuffled(seed, epoch, SHARDS)
        for row in range(ROWS)
    ]
    return np.concatenate(documents).astype(np.int64)


def test_rows_are_packed_in_the_order_of_shards_that_are_shuffled_each_epoch(folder):
    stream, tokens = open_stream(folder), expected_tokens(seed=1, epochs=5)
    orders = {tuple(shuffled(1, epoch, SHARDS).tolist()) for epoch in range(5)}
    assert len(orders) > 2
    for index in range(len(tokens) // 16 - 1):
        row = stream.slice(index, 0, 16)
        part = tokens[index * 16 : index * 16 + 17]
        np.testing.assert_array_equal(row.tokens, part[:-1])
        np.testing.assert_array_equal(
            row.labels, np.where(part[:-1] == TOKENIZER.end, IGNORE, part[1:])
        )
        assert row.following == part[-1]
        begins = {0} | set(np.flatnonzero(part == TOKENIZER.begin).tolist())
        assert stream.document_starts(index) == tuple(sorted(begins))
        assert stream.num_labels(index) == (row.labels != IGNORE).sum()


def test_a_slice_is_the_same_part_of_the_whole(folder):
    stream = open_stream(folder)
    for index in range(20):
        everything = stream.slice(index, 0, 16)
        for start, stop in ((0, 5), (5, 16), (7, 7), (15, 16)):
            part = stream.slice(index, start, stop)
            np.testing.assert_array_equal(part.tokens, everything.tokens[start:stop])
            np.testing.assert_array_equal(part.labels, everything.labels[start:stop])
            following = np.append(everything.tokens, everything.following)[stop]
            assert part.following == following


def test_any_order_of_reading_gives_the_same(folder):
    stream, tokens = open_stream(folder), expected_tokens(seed=1, epochs=4)
    for index in np.random.default_rng(0).permutation(len(tokens) // 16 - 1).tolist():
        row = stream.slice(index, 0, 16)
        np.testing.assert_array_equal(row.tokens, tokens[index * 16 : index * 16 + 16])


def test_a_state_continues_at_once_and_without_it_the_start_is_read_again(folder):
    stream, tokens = open_stream(folder), expected_tokens(seed=1, epochs=5)
    stream.slice(3, 0, 16)
    for index in (0, 1, 7, 24, 25, 26, 40, 90):
        stream.document_starts(index)
        # A thread that reads ahead has gone on.
        stream.document_starts(index + 3)
        state = json.loads(json.dumps(stream.state(index)))
        assert state["sequence"] == index
        assert len(json.dumps(state)) < 1000
        for known in (state, None):
            other = open_stream(folder)
            counted = other._rows._encode = CountedEncoder(other._rows._encode)
            if known:
                other.load_state(known)
            row = other.slice(index, 0, 16)
            np.testing.assert_array_equal(row.tokens, tokens[index * 16 : index * 16 + 16])
            if known:
                assert counted.rows < 8


class CountedEncoder:
    def __init__(self, encode: RowEncoder) -> None:
        self.encode, self.rows = encode, 0

    def __call__(self, row: object, name: str) -> object:
        self.rows += 1
        return self.encode(row, name)


def test_going_back_rereads_from_a_place_that_is_near(folder):
    stream = open_stream(folder)
    stream.slice(100, 0, 16)
    counted = stream._rows._encode = CountedEncoder(stream._rows._encode)
    stream.slice(90, 0, 16)
    assert counted.rows < 8


def test_going_far_ahead_reads_from_a_place_that_is_near(folder):
    known = open_stream(folder)
    known.slice(100, 0, 16)
    stream = open_stream(folder)
    stream.slice(0, 0, 16)
    stream.load_state(known.state(100))
    counted = stream._rows._encode = CountedEncoder(stream._rows._encode)
    stream.slice(100, 0, 16)
    assert counted.rows < 8


def test_a_state_of_another_version_is_refused(folder):
    with pytest.raises(InputError, match="place in a streaming dataset is not of this version"):
        open_stream(folder).load_state({"row": 3})


def test_a_buffer_shuffle_is_refused_with_the_reason(folder):
    dataset = open_dataset(source_of(folder))
    shuffles = [dataset.shuffle(seed=1, buffer_size=8), dataset.shuffle(seed=1).map(lambda r: r)]
    for shuffled_ in shuffles:
        with pytest.raises(InputError, match="shuffled with a buffer, whose rows are lost"):
            Rows(shuffled_, lambda row, name: None, lambda _: True, 0)


def loaders_of(folder: Path, **options: object) -> Loaders:
    config = DataConfig(str(folder), streaming=True, **options)
    return build_loaders(config, seq_len=16, batch_size=2, seed=1)


def rows_in(loaders: Loaders, name: str, steps: int) -> set[str]:
    loader = getattr(loaders, name)
    tokens = np.concatenate([loader.batch(step).tokens_BT.numpy().ravel() for step in range(steps)])
    ends = np.flatnonzero(tokens == TOKENIZER.end)
    return {TOKENIZER.decode(part) for part in np.split(tokens, ends + 1)[1:-1]}


def test_reading_ahead_while_labels_are_counted_reads_each_row_once(folder):
    plain = loaders_of(folder).train
    expected = [plain.batch(step) for step in range(40)]
    loader = loaders_of(folder).train
    counted = loader._stream._rows._encode = CountedEncoder(loader._stream._rows._encode)
    micro_batches = ([index] for step in range(60) for index in loader.ids(step))
    batches = Prefetch(loader, micro_batches, [(4, 9), (12, 16)], ahead=3)
    for step, whole in enumerate(expected):
        assert loader.num_valid(loader.ids(step)) == (whole.labels_BT != IGNORE).sum()
        for row in whole.tokens_BT.tolist():
            assert batches.next().tokens_BT.tolist() == [row[4:9] + row[12:16]]
        state = loader.state(step + 1)
        assert state["sequence"] == 2 * (step + 1)
    batches.close()
    # Documents of 8 tokens and more, 2 sequences of 16 a step, and what was read ahead.
    assert counted.rows < 40 * 2 * 16 / 8 + 30


def test_rows_are_held_out_by_name(folder):
    loaders = loaders_of(folder, validation_percent=20)
    train, validation = rows_in(loaders, "train", 20), rows_in(loaders, "validation", 8)
    assert not train & validation
    everything = {text(shard, row) for shard in range(SHARDS) for row in range(ROWS)}
    assert train | validation == everything
    assert 0.1 < len(validation) / len(everything) < 0.35


def test_validation_does_not_depend_on_the_seed_and_is_read_once(folder):
    config = DataConfig(str(folder), streaming=True, validation_percent=20)
    tokens = []
    for seed in (1, 2):
        loaders = build_loaders(config, seq_len=16, batch_size=2, seed=seed)
        tokens.append([loaders.validation.batch(step).tokens_BT.tolist() for step in range(5)])
        stream = loaders.validation._stream
        counted = stream._rows._encode = CountedEncoder(stream._rows._encode)
        assert [loaders.validation.batch(s).tokens_BT.tolist() for s in range(5)] == tokens[-1]
        assert counted.rows == 0
    assert tokens[0] == tokens[1]


def test_a_validation_path_leaves_all_of_the_path_to_training(folder, tmp_path):
    (tmp_path / "held.jsonl").write_text('{"text": "held out"}\n')
    loaders = loaders_of(folder, validation_path=str(tmp_path))
    assert rows_in(loaders, "validation", 3) == {"held out"}
    assert len(rows_in(loaders, "train", 20)) == SHARDS * ROWS


def test_too_short_documents_are_left_out_of_training_only(folder):
    loaders = loaders_of(folder, shortest=9, validation_percent=50)
    assert min(map(len, rows_in(loaders, "train", 20))) == 7
    assert min(map(len, rows_in(loaders, "validation", 20))) < 7


def test_the_fingerprint_changes_with_the_rows(folder, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "another"}\n' * 30)
    other = loaders_of(tmp_path, validation_percent=50)
    assert loaders_of(folder).fingerprint == loaders_of(folder).fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": "best_fit"}, "data.packing = 'best_fit' needs the lengths of all documents"),
        ({"long_from": 9, "long_repeat": 2}, "data.long_repeat = 2 needs the lengths"),
        ({"column": "txt"}, "row 0: nothing in 'txt'"),
        ({"shortest": 10**6}, "no row of the dataset is left for training"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(folder, options, message):
    with pytest.raises(InputError, match=message):
        loaders_of(folder, **options).train.batch(0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": null}', "shard 0, row 1: nothing in 'text'"),
        ('{"text": ""}', "shard 0, row 1: nothing in 'text'"),
        ('{"text": "cut', "shard 0 of the dataset is broken"),
    ],
)
def test_a_bad_row_is_refused_or_skipped(tmp_path, row, message):
    (tmp_path / "0.jsonl").write_text('{"text": "good"}\n' + row + "\n" + '{"text": "fine"}\n')
    with pytest.raises(InputError, match=message):
        open_stream(tmp_path).slice(0, 0, 16)
    if "null" in row:
        source = SourceConfig(path=str(tmp_path), streaming=True, bad_rows="skip")
        rows = Rows(open_dataset(source), RowEncoder(source, TOKENIZER), lambda _: True, None)
        tokens = StreamedStream(rows, 12, 1).slice(0, 0, 12).tokens
        assert TOKENIZER.decode(tokens) == "goodfine"


def test_columns_of_ids_are_checked_against_the_vocabulary(tmp_path):
    (tmp_path / "0.jsonl").write_text('{"ids": [1, 2, 3]}\n{"ids": [4, 9]}\n')
    source = SourceConfig(path=str(tmp_path), streaming=True, column="ids")
    for vocab_size, accepted in ((10, True), (9, False)):
        encode = RowEncoder(source, open_tokenizer(f"ids:{vocab_size}"))
        stream = StreamedStream(Rows(open_dataset(source), encode, lambda _: True, 0), 5, 1)
        if accepted:
            assert stream.slice(0, 0, 5).tokens.tolist() == [1, 2, 3, 4, 9]
            assert stream.state(0)["token"] == 0
            assert Place().token == 0
        else:
            with pytest.raises(InputError, match="token id 9, but the vocabulary has 9"):
                stream.slice(0, 0, 5)


def test_an_error_on_the_way_comes_to_all_who_read_on(tmp_path):
    rows = ['{"text": "a row that is good"}'] * 9 + ['{"text": ""}']
    (tmp_path / "0.jsonl").write_text("\n".join(rows))
    stream = open_stream(tmp_path)
    stream.slice(2, 0, 16)
    for read in (
        stream.document_starts,
        stream.num_labels,
        lambda index: stream.slice(index, 0, 1),
    ):
        with pytest.raises(InputError, match="row 9: nothing in 'text'"):
            read(20)
    assert (
        stream.slice(3, 0, 16).tokens.tolist()
        == open_stream(tmp_path).slice(3, 0, 16).tokens.tolist()
    )
