import math
from pathlib import Path

import pytest
import torch

from longctx.data import IGNORE, DataConfig, Loader, build_loaders, opening


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
        assert batch.documents == repeated.documents


def test_batch_size_does_not_change_the_sequences(corpus):
    small = build_loaders(DataConfig(corpus), seq_len=16, batch_size=2, seed=1).train
    large = build_loaders(DataConfig(corpus), seq_len=16, batch_size=4, seed=1).train
    joined = torch.cat([small.batch(2).tokens_BT, small.batch(3).tokens_BT])
    assert torch.equal(joined, large.batch(1).tokens_BT)


def test_types_are_what_the_model_takes(corpus):
    batch = build_loaders(DataConfig(corpus), seq_len=8, batch_size=1, seed=0).train.batch(0)
    assert batch.tokens_BT.dtype == batch.labels_BT.dtype == torch.int64
    assert batch.documents[0][0] == 0


def test_document_reset_decides_on_documents_and_labels(corpus):
    config = {"seq_len": 400, "batch_size": 2, "seed": 0}
    reset = build_loaders(DataConfig(corpus), **config).train
    joined = build_loaders(DataConfig(corpus, document_reset=False), **config).train
    for loader in (reset, joined):
        counted = int((loader.batch(0).labels_BT != IGNORE).sum())
        assert loader.num_valid(loader.ids(0)) == counted
    batch, whole = reset.batch(0), joined.batch(0)
    assert torch.equal(batch.tokens_BT, whole.tokens_BT)
    assert whole.documents == ((0,), (0,))
    assert len(batch.documents[0]) > 1
    inside = batch.labels_BT != IGNORE
    assert torch.equal(batch.labels_BT[inside], whole.labels_BT[inside])
    assert (whole.labels_BT != IGNORE).all()


def test_parts_of_sequences_join_to_the_batch(corpus):
    loader = build_loaders(DataConfig(corpus), seq_len=20, batch_size=5, seed=0).train
    whole = loader.batch(1)
    parts = [loader.read(loader.ids(1), segments) for segments in ([(0, 7), (13, 20)], [(7, 13)])]
    for name in ("tokens_BT", "labels_BT"):
        left, right = (getattr(part, name) for part in parts)
        joined = torch.cat((left[:, :7], right, left[:, 7:]), 1)
        assert torch.equal(joined, getattr(whole, name))
    assert all(part.documents == whole.documents for part in parts)


def test_validation_does_not_depend_on_the_seed(corpus):
    config = DataConfig(corpus, validation_percent=50)
    first, second = (build_loaders(config, seq_len=16, batch_size=2, seed=seed) for seed in (1, 2))

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
    assert loaders.train.batch(0).documents == ((0, 3, 6),)


def test_padding_counts_in_no_loss_whether_documents_reset_or_not(corpus):
    for packing in ("best_fit", "whole"):
        for document_reset in (True, False):
            config = DataConfig(corpus, packing=packing, document_reset=document_reset)
            loader = build_loaders(config, seq_len=100, batch_size=6, seed=0).train
            batch = loader.batch(0)
            counted = int((batch.labels_BT != IGNORE).sum())
            assert loader.num_valid(loader.ids(0)) == counted < batch.labels_BT.numel()
            halves = [loader.read(loader.ids(0), [part]) for part in ((0, 37), (37, 100))]
            for name in ("tokens_BT", "labels_BT"):
                joined = torch.cat([getattr(half, name) for half in halves], 1)
                assert torch.equal(joined, getattr(batch, name))


def test_lengths_decide_what_is_trained_on_but_not_what_is_held_out(corpus):
    plain = build_loaders(DataConfig(corpus), seq_len=64, batch_size=9, seed=0)
    config = DataConfig(corpus, shortest=100, long_from=200, long_repeat=5)
    chosen = build_loaders(config, seq_len=64, batch_size=9, seed=0)
    assert torch.equal(chosen.validation.batch(0).tokens_BT, plain.validation.batch(0).tokens_BT)

    def documents(loader: Loader) -> list[str]:
        text = chosen.tokenizer.decode(loader.read(range(200), [(0, 64)]).tokens_BT.flatten())
        return text.split("document ")

    before, after = documents(plain.train), documents(chosen.train)
    assert before.count("3 ")
    assert not after.count("3 ")
    assert after.count("19 ") / len(after) > 1.5 * before.count("19 ") / len(before)


def test_entropy_is_that_of_the_first_held_out_tokens_without_marks(tmp_path, monkeypatch):
    (tmp_path / "held").mkdir()
    for name, text in (("train.txt", "cc"), ("held/a", "ab" * 50), ("held/b", "d" * 100)):
        (tmp_path / name).write_text(text)
    config = DataConfig(str(tmp_path / "train.txt"), validation_path=str(tmp_path / "held"))
    shares = {4_000_000: [50, 50, 100], 104: [50, 50, 1], 4: [2, 1]}
    for counted, counts in shares.items():
        monkeypatch.setattr(opening, "COUNTED", counted)
        loaders = build_loaders(config, seq_len=7, batch_size=1, seed=0)
        expected = -sum(n / sum(counts) * math.log(n / sum(counts)) for n in counts)
        assert loaders.unigram_entropy == pytest.approx(expected)


def test_what_is_not_streamed_needs_no_state(corpus):
    for config in (
        DataConfig(corpus),
        DataConfig(task="mqar"),
        DataConfig(corpus, packing="whole"),
    ):
        assert build_loaders(config, seq_len=64, batch_size=3, seed=0).state(5) == {}
