import time
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.data.bins import PADDING, BinStream, Layout, best_fit, fit, whole
from longctx.data.packing import PackedStream
from longctx.data.streams import IGNORE, PackedSequence
from tests.data.stores import make_store

LENGTHS = [7, 2, 30, 3, 12, 5, 17, 4, 10, 20]
LAYOUTS = {"best_fit": best_fit, "whole": whole}
NAMES = pytest.mark.parametrize("name", LAYOUTS)
SEQ_LEN = 10


def lay_out(name: str, lengths: list[int], seq_len: int) -> Layout:
    return LAYOUTS[name](np.arange(len(lengths)), np.array(lengths), seq_len)


def open_stream(name: str, lengths: list[int], seq_len: int, seed: int = 0) -> BinStream:
    return BinStream(make_store(lengths), lay_out(name, lengths, seq_len), seq_len, seed)


def read_whole(stream: BinStream, index: int) -> PackedSequence:
    return stream.slice(index, 0, stream.seq_len)


def best_fit_one_by_one(sizes: list[int], capacity: int) -> list[int]:
    """What is free in each bin after best fit decreasing, as it is defined."""
    free: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in free if room >= size]
        room = min(fitting) if fitting else capacity
        if fitting:
            free.remove(room)
        free.append(room - size)
    return sorted(free)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 60), st.data())
def test_equal_sizes_at_once_are_placed_as_one_by_one(capacity, data):
    sizes = data.draw(st.lists(st.integers(1, capacity), max_size=60))
    bins = fit(np.array(sizes, dtype=np.int64), capacity)
    assert sorted(set(bins.tolist())) == list(range(len(set(bins.tolist()))))
    filled = np.bincount(bins, weights=sizes) if sizes else np.array([])
    assert sorted((capacity - filled).tolist()) == best_fit_one_by_one(sizes, capacity)


@NAMES
def test_an_epoch_holds_every_token_once_and_only_padding_beside(name):
    stream = open_stream(name, LENGTHS, SEQ_LEN)
    count = lay_out(name, LENGTHS, SEQ_LEN).bins
    epochs = []
    for epoch in range(2):
        rows = [read_whole(stream, epoch * count + place) for place in range(count)]
        tokens = [row.tokens[: SEQ_LEN - row.padding].tolist() for row in rows]
        assert sorted(chain(*tokens)) == list(range(sum(LENGTHS)))
        assert all((row.tokens[SEQ_LEN - row.padding :] == PADDING).all() for row in rows)
        epochs.append(tokens)
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]


def test_best_fit_cuts_only_documents_that_are_longer_than_a_sequence():
    layout = lay_out("best_fit", LENGTHS, SEQ_LEN)
    for document, start, length in zip(layout.documents, layout.starts, layout.lengths):
        assert start % SEQ_LEN == 0
        assert length == min(SEQ_LEN, LENGTHS[document] - start)
    # 30, 20, 10 and the first ten of 12 and 17 fill eight; best fit puts the others in four.
    rest = np.split(layout.lengths, layout.borders[1:-1])[8:]
    assert [lengths.tolist() for lengths in rest] == [[7, 2], [7, 3], [5, 4], [2]]
    assert layout.bins == 8 + 4
    assert lay_out("whole", LENGTHS, SEQ_LEN).bins == 8 + 7


@NAMES
def test_labels_are_the_next_token_of_the_document(name):
    """Of a piece that is cut, the last label is in the next sequence."""
    lengths = np.array(LENGTHS)
    lasts = set((np.cumsum(lengths) - 1).tolist())
    stream, labelled = open_stream(name, LENGTHS, SEQ_LEN), 0
    for index in range(lay_out(name, LENGTHS, SEQ_LEN).bins):
        row = read_whole(stream, index)
        content = SEQ_LEN - row.padding
        for token, label in zip(row.tokens[:content].tolist(), row.labels[:content].tolist()):
            assert label == (IGNORE if token in lasts else token + 1)
        assert (row.labels[content:] == IGNORE).all()
        assert stream.num_labels(index) == (row.labels != IGNORE).sum()
        joined = row.as_one_document()
        assert stream.num_joined(index) == (joined.labels != IGNORE).sum()
        assert (joined.labels[: content - 1] == row.tokens[1:content]).all()
        assert (joined.labels[content:] == IGNORE).all()
        labelled += stream.num_labels(index)
    assert labelled == sum(LENGTHS) - len(LENGTHS)


@NAMES
def test_padding_is_a_document_of_its_own(name):
    stream = open_stream(name, LENGTHS, SEQ_LEN)
    padded = 0
    for index in range(lay_out(name, LENGTHS, SEQ_LEN).bins):
        row, starts = read_whole(stream, index), stream.document_starts(index)
        assert max(starts) <= SEQ_LEN
        if row.padding:
            padded += 1
            assert starts[-1] == SEQ_LEN - row.padding
        borders = [place + 1 for place, label in enumerate(row.labels[:-1]) if label == IGNORE]
        content = SEQ_LEN - row.padding
        inside = [place for place in borders if place <= content and place < SEQ_LEN]
        assert [place for place in starts if 0 < place < SEQ_LEN] == inside
    assert padded


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(sorted(LAYOUTS)))
def test_a_slice_is_the_same_part_of_the_whole(data, name):
    lengths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=10))
    seq_len, index = data.draw(st.integers(1, 12)), data.draw(st.integers(0, 500))
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, seq_len)] * 2)))
    stream = open_stream(name, lengths, seq_len, seed=data.draw(st.integers(0, 2**70)))
    everything = read_whole(stream, index)
    before = stream._store.bytes_read
    part = stream.slice(index, start, stop)
    assert stream._store.bytes_read - before <= 2 * (stop - start + 1)
    np.testing.assert_array_equal(part.tokens, everything.tokens[start:stop])
    np.testing.assert_array_equal(part.labels, everything.labels[start:stop])
    np.testing.assert_array_equal(
        part.as_one_document().labels, everything.as_one_document().labels[start:stop]
    )


def test_the_layout_and_its_order_never_change_between_versions():
    """A resumed run depends on both."""
    layout = lay_out("best_fit", LENGTHS, SEQ_LEN)
    bins = [documents.tolist() for documents in np.split(layout.documents, layout.borders[1:-1])]
    full = [[2], [2], [2], [4], [6], [8], [9], [9]]
    assert bins == [*full, [0, 1], [6, 3], [5, 7], [4]]
    stream = open_stream("best_fit", LENGTHS, SEQ_LEN, seed=3)
    firsts = [int(read_whole(stream, index).tokens[0]) for index in range(14)]
    assert firsts == [90, 19, 52, 0, 80, 29, 100, 54, 69, 59, 42, 9, 69, 100]


def test_without_cuts_or_padding_sequences_are_those_of_concat():
    lengths = [SEQ_LEN] * 6
    stream = open_stream("best_fit", lengths, SEQ_LEN, seed=5)
    plain = PackedStream(make_store(lengths), SEQ_LEN, seed=5)
    for index in range(20):
        left, right = read_whole(stream, index), plain.slice(index, 0, SEQ_LEN)
        np.testing.assert_array_equal(left.tokens, right.tokens)
        np.testing.assert_array_equal(left.labels, right.labels)
        assert stream.document_starts(index) == plain.document_starts(index)


@pytest.mark.alone
def test_a_million_documents_are_laid_out_in_seconds():
    lengths = np.random.default_rng(0).lognormal(6.5, 1.4, 1_000_000).astype(np.int64) + 2
    started = time.perf_counter()
    layout = best_fit(np.arange(len(lengths)), lengths, 4096)
    assert time.perf_counter() - started < 5
    assert lengths.sum() / (layout.bins * 4096) > 0.999
