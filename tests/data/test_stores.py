import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.data.stores import (
    MemoryStore,
    check_ids,
    hold_out,
    id_type,
    numbered_residues,
    sampled_fingerprint,
)
from longctx.errors import InputError


def make_store(lengths: list[int], residues: list[int]) -> MemoryStore:
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    tokens = np.arange(offsets[-1], dtype=np.uint16)
    return MemoryStore(tokens, offsets, np.array(residues, np.uint8), 70_000, "mine", "content")


def documents(store) -> list[list[int]]:
    return [store.read(d, 0, length).tolist() for d, length in enumerate(store.lengths.tolist())]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 99)), min_size=2, max_size=12),
    st.integers(1, 50),
)
def test_every_document_is_in_one_split_and_no_split_is_empty(drawn, percent):
    lengths, residues = map(list, zip(*drawn))
    store = make_store(lengths, residues)
    train, validation = hold_out(store, percent)
    both = documents(train) + documents(validation)
    assert sorted(both) == documents(store)
    assert len(train.lengths) > 0 < len(validation.lengths)
    assert documents(train) == sorted(documents(train))
    assert documents(validation) == sorted(documents(validation))
    if 0 < sum(residue < percent for residue in residues) < len(residues):
        assert max(validation.residues) < percent <= min(train.residues)
    else:
        assert min(len(train.lengths), len(validation.lengths)) == 1
        assert max(validation.residues) <= min(train.residues)
    assert train.fingerprint() == validation.fingerprint() == "content"


def test_no_split_of_several_documents_is_empty():
    """As with residues of the names a, b, c and d."""
    cases = {(50, 46): ([0], [1]), (30, 29): ([0], [1]), (50, 30, 29): ([0], [1, 2])}
    for residues, (train, validation) in cases.items():
        store = make_store([1] * len(residues), list(residues))
        splits = hold_out(store, 45)
        assert documents(splits.train) == [[number] for number in train]
        assert documents(splits.validation) == [[number] for number in validation]


@pytest.mark.parametrize(("length", "held_out"), [(100, 10), (19, 1), (2, 1)])
def test_an_only_document_is_cut(length, held_out):
    store = make_store([length], [99])
    train, validation = hold_out(store, 10)
    assert documents(train) + documents(validation) == [
        list(range(length - held_out)),
        list(range(length - held_out, length)),
    ]
    assert validation.read(0, held_out - 1, held_out).tolist() == [length - 1]
    assert (train.vocab_size, train.tokenizer) == (70_000, "mine")


def test_a_single_token_cannot_be_cut():
    with pytest.raises(InputError, match=r"^data: a single token[^\n]*$"):
        hold_out(make_store([1], [0]), 5)


def test_reads_are_exact_and_counted():
    store = make_store([4, 6], [1, 70])
    train, _ = hold_out(store, 50)
    assert train.read(0, 2, 5).tolist() == [6, 7, 8]
    assert train.read(0, 6, 6).tolist() == []
    assert (train.bytes_read, store.bytes_read) == (6, 6)


@pytest.mark.parametrize("part", [(0, -1, 2), (0, 3, 2), (0, 0, 5), (2, 0, 1), (-1, 0, 1)])
def test_a_part_outside_of_its_document_is_refused(part):
    store = make_store([4, 4], [1, 70])
    for each in (store, hold_out(make_store([4, 4, 4], [1, 70, 80]), 50).train):
        with pytest.raises(ValueError, match="no tokens"):
            each.read(*part)
    with pytest.raises(ValueError, match="no tokens"):
        hold_out(make_store([8], [0]), 50).train.read(0, 0, 5)


def test_ids_outside_of_the_vocabulary_are_named():
    for ids, wrong in (([1, 9, 7, 10], 9), ([6, 7], 7), ([3, -2], -2)):
        expected = rf"^mine: document 4 holds token id {wrong}, but the vocabulary has 7; [^\n]*$"
        with pytest.raises(InputError, match=expected):
            check_ids(np.array(ids), 7, "mine", 4)
    ids = np.array([0, 6], np.uint16)
    assert check_ids(ids, 7, "mine", 4) is ids
    assert len(check_ids(ids[:0], 7, "mine", 4)) == 0


def test_the_smallest_type_holds_every_id():
    for size, dtype in ((1, np.uint16), (2**16, np.uint16), (2**16 + 1, np.uint32)):
        assert id_type(size) is dtype
        assert np.iinfo(dtype).max >= size - 1


def test_numbered_residues_are_uniform_and_never_change_between_versions():
    residues = numbered_residues(100_000)
    assert residues[:6].tolist() == numbered_residues(6).tolist() == [35, 0, 79, 44, 47, 90]
    counts = np.bincount(residues, minlength=100)
    assert len(counts) == 100
    assert np.abs(counts / 1000 - 1).max() < 0.15


def test_a_sampled_fingerprint_follows_ids_lengths_and_the_tokenizer():
    def fingerprint(lengths, residues=None, change=None, **fields) -> str:
        store = make_store(lengths, residues or [1] * len(lengths))
        for name, value in fields.items():
            setattr(store, name, value)
        if change is not None:
            store.tokens[change] = 5000
        found = sampled_fingerprint(store)
        assert store.bytes_read == 0
        return found

    original = fingerprint([3000, 9])
    assert original == fingerprint([3000, 9])
    changed = [
        fingerprint([2999, 10]),
        fingerprint([3000, 9], change=0),
        fingerprint([3000, 9], change=2999),
        fingerprint([3000, 9], change=3008),
        fingerprint([3000, 9], vocab_size=9999),
        fingerprint([3000, 9], tokenizer="other"),
    ]
    assert len({original, *changed}) == 7
    assert fingerprint([4, 6]) != fingerprint([6, 4])
