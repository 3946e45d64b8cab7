"""The held-out loss by position in documents."""

import json

import pytest
import torch

from longctx.data import IGNORE
from longctx.sequence.local import LocalView
from longctx.train import trainer as trainer_module
from longctx.train.evaluate import bin_starts, evaluate
from longctx.train.trainer import train
from tests.train.processes import run

PACKED = {
    "train__precision": "fp64",
    "train__seq_len": 300,
    "train__steps": 2,
    "train__micro_batch": 2,
    "eval__every": 2,
    "eval__sequences": 5,
    "model__mixers.S.balance_weight": 0.0,
}


@pytest.fixture
def last_evaluation(monkeypatch):
    """The model of the last evaluation of a run, and the batches that it read."""
    seen = {}

    def noting(trainer):
        read, batches = trainer.loaders.validation.read, []

        def keeping(*arguments):
            batches.append(read(*arguments))
            return batches[-1]

        with monkeypatch.context() as patch:
            patch.setattr(trainer.loaders.validation, "read", keeping)
            told = evaluate(trainer)
        seen.update(model=trainer.model, batches=batches)
        return told

    monkeypatch.setattr(trainer_module, "evaluate", noting)
    return seen


def summary(settings) -> dict:
    return json.loads((settings.run.path / "summary.json").read_text())


@torch.no_grad()
def by_hand(model, batches) -> dict[int, list[float]]:
    """Losses of labels by position, from all logits of one sequence after the other."""
    found = {}
    for batch in batches:
        x_BTD, view = model.embedding(batch.tokens_BT), LocalView(batch.documents, 300)
        for block in model.blocks:
            x_BTD, *_ = block(x_BTD, view)
        loss_BT = -model.head(model.norm(x_BTD)).log_softmax(-1)
        for row, starts in enumerate(batch.documents):
            for place, label in enumerate(batch.labels_BT[row].tolist()):
                if label != IGNORE:
                    position = place - max(start for start in starts if start <= place)
                    found.setdefault(position, []).append(float(loss_BT[row, place, label]))
    return found


def test_bins_double_in_length_below_the_length_of_a_sequence():
    assert bin_starts(1) == bin_starts(16) == [0]
    assert bin_starts(17) == [0, 16]
    assert bin_starts(300) == [0, 16, 32, 64, 128, 256]
    assert bin_starts(256) == [0, 16, 32, 64, 128]


def test_loss_by_position_is_the_mean_over_the_labels_of_each_bin(settings, rows, last_evaluation):
    config = settings(**PACKED)
    train(config)
    batches = last_evaluation["batches"]
    assert sum(len(batch.documents) for batch in batches) == config.eval.sequences
    assert max(len(starts) for batch in batches for starts in batch.documents) > 1
    losses = by_hand(**last_evaluation)
    starts = [0, 16, 32, 64, 128, 256]
    told = summary(config)
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], 300])):
        here = [x for position in range(start, stop) for x in losses.get(position, [])]
        assert told["val_labels_by_position"][number] == len(here)
        mean = told["val_loss_by_position"][number]
        assert mean == pytest.approx(sum(here) / len(here), abs=1e-10)
    everything = [x for here in losses.values() for x in here]
    assert told["val_loss"] == pytest.approx(sum(everything) / len(everything), abs=1e-10)
    assert told["val_loss_by_position"] == rows(config)[-1]["val_loss_by_position"]


def test_a_bin_without_labels_has_no_loss(settings):
    task = {"data__path": "", "data__task": "selective_copying", "data__pairs": 2}
    task |= {"data__vocabulary": 12, "train__seq_len": 40, "train__steps": 1}
    config = settings(**task)
    train(config)
    told = summary(config)
    assert told["val_labels_by_position"][0] == 0
    assert told["val_loss_by_position"][0] is None
    assert told["val_loss_by_position"][-1] > 0


@pytest.mark.cluster
def test_loss_by_position_does_not_depend_on_the_split(settings):
    one = settings("one", **PACKED)
    train(one)
    expected = summary(one)
    splits = {
        "sp2": (2, {"parallel__sp": 2}),
        "zigzag": (2, {"parallel__sp": 2, "parallel__placement": "zigzag"}),
        "dp2": (2, {}),
        "tp2": (2, {"parallel__tp": 2}),
        "dp2sp2": (4, {"parallel__sp": 2}),
    }
    for name, (ranks, split) in splits.items():
        shared = settings(name, **PACKED, **split)
        run(ranks, shared)
        told = summary(shared)
        assert told["val_labels_by_position"] == expected["val_labels_by_position"]
        actual, wanted = (torch.tensor(x["val_loss_by_position"]) for x in (told, expected))
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-9, msg=name)
        assert told["val_accuracy"] == expected["val_accuracy"]
