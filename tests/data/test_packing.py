import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.data.packing import IGNORE, PackedSequence, PackedStream
from longctx.data.sources import DocumentTokens

BEGIN, END = 256, 257


def make_documents(lengths: list[int]) -> DocumentTokens:
    """Documents of given lengths (marks included) whose bytes are all different."""
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    tokens = np.arange(offsets[-1], dtype=np.uint16)
    assert len(tokens) <= BEGIN
    tokens[offsets[:-1]] = BEGIN
    tokens[offsets[1:] - 1] = END
    return DocumentTokens(tokens, offsets)


def same(left: PackedSequence, right: PackedSequence) -> bool:
    return (
        np.array_equal(left.tokens, right.tokens)
        and np.array_equal(left.labels, right.labels)
        and left.following == right.following
    )


def concatenated(stream: PackedStream, count: int) -> np.ndarray:
    return np.concatenate([stream.sequence(index).tokens for index in range(count)])


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
        sequence = stream.sequence(index)
        following = tokens[index * seq_len + 1 : (index + 1) * seq_len + 1]
        expected = np.where(sequence.tokens == END, IGNORE, following)
        np.testing.assert_array_equal(sequence.labels, expected)
        assert sequence.following == following[-1]


@pytest.mark.parametrize("seq_len", [5, 13, 2 * EPOCH])
def test_document_starts_are_where_documents_begin(seq_len):
    stream = PackedStream(DOCUMENTS, seq_len, seed=1)
    for index in range(8):
        sequence = stream.sequence(index)
        tokens = [*sequence.tokens.tolist(), sequence.following]
        expected = {0} | {place for place, token in enumerate(tokens) if token == BEGIN}
        assert stream.document_starts(index) == tuple(sorted(expected))


def test_a_single_document_starts_anew_each_epoch():
    sequence = PackedStream(make_documents([4]), seq_len=10, seed=0).sequence(0)
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
    whole, part = stream.sequence(index), stream.slice(index, start, stop)
    following = np.append(whole.tokens, whole.following)[stop]
    expected = PackedSequence(
        whole.tokens[start:stop],
        whole.labels[start:stop],
        int(following),
    )
    assert same(part, expected)


def test_reading_order_does_not_matter():
    stream, seq_len = PackedStream(DOCUMENTS, 11, seed=5), 11
    for index in np.random.default_rng(0).permutation(100).tolist():
        fresh = PackedStream(DOCUMENTS, seq_len, seed=5)
        assert same(stream.sequence(index), fresh.sequence(index))


def test_seeds_give_different_orders():
    orders = {tuple(PackedStream(DOCUMENTS, EPOCH, seed).sequence(0).tokens) for seed in range(5)}
    assert len(orders) == 5


def test_the_order_never_changes_between_versions():
    """A resumed run depends on it: a change here is a change of every run's data."""
    orders = {
        (0, 0): [0, 2, 1, 5, 4, 3, 6, 7],
        (0, 1): [5, 3, 7, 2, 4, 1, 0, 6],
        (7, 0): [4, 1, 6, 3, 2, 7, 5, 0],
    }
    for (seed, epoch), order in orders.items():
        tokens = PackedStream(DOCUMENTS, EPOCH, seed).sequence(epoch).tokens
        begins = np.flatnonzero(tokens == BEGIN)
        lengths = np.diff(np.append(begins, EPOCH)).tolist()
        assert [LENGTHS.index(length) for length in lengths] == order


def test_one_document_forgets_the_borders():
    sequence = PackedStream(DOCUMENTS, 40, seed=2).sequence(1)
    joined = sequence.as_one_document()
    assert IGNORE in sequence.labels
    np.testing.assert_array_equal(joined.labels[:-1], sequence.tokens[1:])
    assert joined.labels[-1] == sequence.following


@pytest.mark.parametrize(("index", "start", "stop"), [(-1, 0, 1), (0, -1, 1), (0, 3, 2), (0, 0, 6)])
def test_a_slice_outside_its_sequence_is_refused(index, start, stop):
    with pytest.raises(ValueError, match="no slice"):
        PackedStream(DOCUMENTS, 5, seed=0).slice(index, start, stop)
