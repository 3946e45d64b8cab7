import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.data import DataConfig
from longctx.data.packing import PackedStream, epoch_documents
from longctx.data.stores import MemoryStore
from longctx.data.streams import IGNORE, PackedSequence
from longctx.errors import InputError
from tests.data.stores import make_store

BEGIN, END = 256, 257


def make_documents(lengths: list[int]) -> MemoryStore:
    """Documents of given lengths (marks included) whose bytes are all different."""
    store = make_store(lengths)
    store.tokens[store.offsets[:-1]] = BEGIN
    store.tokens[store.offsets[1:] - 1] = END
    assert len(store.tokens) <= BEGIN
    return store


def whole(stream: PackedStream, index: int) -> PackedSequence:
    return stream.slice(index, 0, stream.seq_len)


def same(left: PackedSequence, right: PackedSequence) -> bool:
    return (
        np.array_equal(left.tokens, right.tokens)
        and np.array_equal(left.labels, right.labels)
        and left.following == right.following
    )


def concatenated(stream: PackedStream, count: int) -> np.ndarray:
    return np.concatenate([whole(stream, index).tokens for index in range(count)])


LENGTHS = [7, 2, 30, 3, 12, 5, 17, 4]
DOCUMENTS = make_documents(LENGTHS)
EPOCH = sum(LENGTHS)


def test_each_epoch_holds_every_document_whole_and_once():
    stream = PackedStream(DOCUMENTS, seq_len=EPOCH // 8, seed=3)
    epochs = np.split(concatenated(stream, 24), 3)
    originals = np.split(DOCUMENTS.tokens, DOCUMENTS.offsets[1:-1])
    for epoch in epochs:
        pieces = np.split(epoch, np.flatnonzero(epoch == END)[:-1] + 1)
        assert sorted(map(tuple, pieces)) == sorted(map(tuple, originals))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])


@pytest.mark.parametrize("seq_len", [1, 5, 13, EPOCH, 3 * EPOCH + 1])
def test_labels_are_the_next_token_inside_a_document_only(seq_len):
    stream = PackedStream(DOCUMENTS, seq_len, seed=1)
    tokens = concatenated(stream, 8)
    for index in range(7):
        sequence = whole(stream, index)
        following = tokens[index * seq_len + 1 : (index + 1) * seq_len + 1]
        expected = np.where(sequence.tokens == END, IGNORE, following)
        np.testing.assert_array_equal(sequence.labels, expected)
        assert sequence.following == following[-1]


@pytest.mark.parametrize("seq_len", [5, 13, 2 * EPOCH])
def test_document_starts_are_where_documents_begin(seq_len):
    stream = PackedStream(DOCUMENTS, seq_len, seed=1)
    for index in range(8):
        sequence = whole(stream, index)
        tokens = [*sequence.tokens.tolist(), sequence.following]
        expected = {0} | {place for place, token in enumerate(tokens) if token == BEGIN}
        assert stream.document_starts(index) == tuple(sorted(expected))


def test_a_single_document_starts_anew_each_epoch():
    sequence = whole(PackedStream(make_documents([4]), seq_len=10, seed=0), 0)
    assert sequence.tokens.tolist() == [BEGIN, 1, 2, END] * 2 + [BEGIN, 1]
    assert sequence.labels.tolist() == [1, 2, END, IGNORE] * 2 + [1, 2]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_slice_is_the_same_part_of_the_whole(data):
    lengths = data.draw(st.lists(st.integers(2, 20), min_size=1, max_size=10))
    seq_len = data.draw(st.integers(1, 90))
    index = data.draw(st.integers(0, 1000))
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, seq_len)] * 2)))
    stream = PackedStream(make_documents(lengths), seq_len, seed=data.draw(st.integers(-9, 2**70)))
    sequence, part = whole(stream, index), stream.slice(index, start, stop)
    following = np.append(sequence.tokens, sequence.following)[stop]
    expected = PackedSequence(
        sequence.tokens[start:stop],
        sequence.labels[start:stop],
        int(following),
    )
    assert same(part, expected)


def test_reading_order_does_not_matter():
    stream, seq_len = PackedStream(DOCUMENTS, 11, seed=5), 11
    for index in np.random.default_rng(0).permutation(100).tolist():
        fresh = PackedStream(DOCUMENTS, seq_len, seed=5)
        assert same(whole(stream, index), whole(fresh, index))


def test_seeds_give_different_orders():
    orders = {tuple(whole(PackedStream(DOCUMENTS, EPOCH, seed), 0).tokens) for seed in range(5)}
    assert len(orders) == 5


def test_the_order_never_changes_between_versions():
    """A resumed run depends on it: a change here is a change of every run's data."""
    orders = {
        (0, 0): [0, 2, 1, 5, 4, 3, 6, 7],
        (0, 1): [5, 3, 7, 2, 4, 1, 0, 6],
        (7, 0): [4, 1, 6, 3, 2, 7, 5, 0],
    }
    for (seed, epoch), order in orders.items():
        tokens = whole(PackedStream(DOCUMENTS, EPOCH, seed), epoch).tokens
        begins = np.flatnonzero(tokens == BEGIN)
        lengths = np.diff(np.append(begins, EPOCH)).tolist()
        assert [LENGTHS.index(length) for length in lengths] == order


def test_one_document_forgets_the_borders():
    sequence = whole(PackedStream(DOCUMENTS, 40, seed=2), 1)
    joined = sequence.as_one_document()
    assert IGNORE in sequence.labels
    np.testing.assert_array_equal(joined.labels[:-1], sequence.tokens[1:])
    assert joined.labels[-1] == sequence.following


@pytest.mark.parametrize(("index", "start", "stop"), [(-1, 0, 1), (0, -1, 1), (0, 3, 2), (0, 0, 6)])
def test_a_slice_outside_its_sequence_is_refused(index, start, stop):
    with pytest.raises(ValueError, match="no slice"):
        PackedStream(DOCUMENTS, 5, seed=0).slice(index, start, stop)


def test_a_slice_reads_its_tokens_and_the_one_that_follows():
    stream = PackedStream(DOCUMENTS, 16, seed=0)
    for index, (start, stop) in enumerate([(0, 16), (3, 9), (15, 16)] * 20):
        before = DOCUMENTS.bytes_read
        stream.slice(index, start, stop)
        assert DOCUMENTS.bytes_read - before == 2 * (stop - start + 1)


def test_long_documents_are_repeated_and_short_ones_left_out():
    config = DataConfig(shortest=4, long_from=12, long_repeat=3)
    documents = epoch_documents(DOCUMENTS, config)
    assert documents.tolist() == [0, 2, 2, 2, 4, 4, 4, 5, 6, 6, 6, 7]
    length = sum(LENGTHS[document] for document in documents)
    tokens = whole(PackedStream(DOCUMENTS, length, 0, documents), 0).tokens
    found = [tuple(piece) for piece in np.split(tokens, np.flatnonzero(tokens == END)[:-1] + 1)]
    originals = [tuple(DOCUMENTS.read(d, 0, LENGTHS[d])) for d in documents]
    assert sorted(found) == sorted(originals)
    assert found != originals


def test_one_occurrence_of_each_document_keeps_the_order():
    documents = epoch_documents(DOCUMENTS, DataConfig(long_from=12))
    plain, chosen = PackedStream(DOCUMENTS, 13, 4), PackedStream(DOCUMENTS, 13, 4, documents)
    assert all(same(whole(plain, index), whole(chosen, index)) for index in range(20))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig(shortest=31), "data.shortest = 31 leaves out every document: the longest of 8"),
        (DataConfig(long_from=31, long_repeat=2), "data.long_from = 31: no document is that long"),
    ],
)
def test_a_choice_that_leaves_nothing_is_refused(config, message):
    with pytest.raises(InputError, match=message):
        epoch_documents(DOCUMENTS, config)
