from pathlib import Path

import pytest
import torch

from longctx.data import IGNORE, DataConfig, Loader, build_loaders, num_valid, split


@pytest.fixture
def corpus(tmp_path) -> str:
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"document {number} " * (number + 1))
    return str(tmp_path)


def test_batches_are_a_pure_function_of_the_step(corpus):
    loader = build_loaders(DataConfig(corpus), seq_len=33, batch_size=3, seed=1).train
    again = build_loaders(DataConfig(corpus), seq_len=33, batch_size=3, seed=1).train
    for step in (4, 0, 99):
        batch, repeated = loader.batch(step), again.batch(step)
        assert batch.sequence_ids == tuple(range(3 * step, 3 * step + 3))
        assert batch.tokens_BT.shape == (3, 33)
        assert torch.equal(batch.tokens_BT, repeated.tokens_BT)
        assert torch.equal(batch.labels_BT, repeated.labels_BT)
        assert torch.equal(batch.documents_BT, repeated.documents_BT)


def test_batch_size_does_not_change_the_sequences(corpus):
    small = build_loaders(DataConfig(corpus), seq_len=16, batch_size=2, seed=1).train
    large = build_loaders(DataConfig(corpus), seq_len=16, batch_size=4, seed=1).train
    joined = torch.cat([small.batch(2).tokens_BT, small.batch(3).tokens_BT])
    assert torch.equal(joined, large.batch(1).tokens_BT)


def test_types_are_what_the_model_takes(corpus):
    batch = build_loaders(DataConfig(corpus), seq_len=8, batch_size=1, seed=0).train.batch(0)
    assert batch.tokens_BT.dtype == batch.labels_BT.dtype == torch.int64
    assert batch.documents_BT.dtype == torch.int32


def test_document_reset_decides_on_ids_and_labels(corpus):
    config = {"seq_len": 400, "batch_size": 2, "seed": 0}
    reset = build_loaders(DataConfig(corpus), **config).train.batch(0)
    joined = build_loaders(DataConfig(corpus, document_reset=False), **config).train.batch(0)
    assert torch.equal(reset.tokens_BT, joined.tokens_BT)
    assert num_valid(joined) == 800
    assert num_valid(reset) == 800 - int((reset.tokens_BT == 257).sum())
    assert reset.documents_BT.amax() > 0 == joined.documents_BT.amax()
    inside = reset.labels_BT != IGNORE
    assert torch.equal(reset.labels_BT[inside], joined.labels_BT[inside])


def test_micro_batches_join_to_the_batch(corpus):
    batch = build_loaders(DataConfig(corpus), seq_len=20, batch_size=5, seed=0).train.batch(1)
    parts = list(split(batch, 2))
    assert [len(part.sequence_ids) for part in parts] == [2, 2, 1]
    assert sum((part.sequence_ids for part in parts), ()) == batch.sequence_ids
    for name in ("tokens_BT", "labels_BT", "documents_BT"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined, getattr(batch, name))
    assert sum(map(num_valid, parts)) == num_valid(batch)


def test_validation_does_not_depend_on_the_seed(corpus):
    first, second = (
        build_loaders(DataConfig(corpus), seq_len=16, batch_size=2, seed=seed) for seed in (1, 2)
    )

    def tokens(loader: Loader) -> torch.Tensor:
        return torch.cat([loader.batch(step).tokens_BT for step in range(4)])

    assert torch.equal(tokens(first.validation), tokens(second.validation))
    assert not torch.equal(tokens(first.train), tokens(second.train))
    assert (first.fingerprint, first.unigram_entropy) == (
        second.fingerprint,
        second.unigram_entropy,
    )
    assert first.vocab_size == 258


def test_a_corpus_smaller_than_a_sequence_repeats(tmp_path: Path):
    (tmp_path / "a.txt").write_text("ab")
    loaders = build_loaders(DataConfig(str(tmp_path)), seq_len=7, batch_size=1, seed=0)
    a, b = ord("a"), ord("b")
    assert loaders.train.batch(0).tokens_BT.tolist() == [[256, a, 257, 256, a, 257, 256]]
    assert loaders.validation.batch(0).tokens_BT.tolist() == [[256, b, 257, 256, b, 257, 256]]
    assert loaders.train.batch(0).documents_BT.tolist() == [[0, 0, 0, 1, 1, 1, 2]]
