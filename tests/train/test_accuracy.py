"""The share of right answers on held-out data."""

import json

import pytest
import torch

from longctx.data import IGNORE, build_loaders
from longctx.eval.generate import load_model
from longctx.model import loss as loss_module
from longctx.sequence.local import LocalView
from longctx.train.trainer import train
from tests.model.test_loss import LargestTensor, example
from tests.train.processes import run

TASK = {
    "data__path": "",
    "data__task": "mqar",
    "data__pairs": 2,
    "data__answers": 2,
    "data__vocabulary": 12,
    "train__seq_len": 19,
    "train__precision": "fp64",
    "model__init_std": 0.15,
    "optim__lr": 0.01,
    "eval__sequences": 20,
}
TEXT = {"train__precision": "fp64", "optim__lr": 0.01}
COPYING = TASK | {"data__task": "selective_copying"}


def by_hand(settings) -> tuple[float, float]:
    """Accuracy and loss of a finished run, from all logits of one sequence after the other."""
    model = load_model(str(settings.run.path)).double()
    config = settings.train
    loader = build_loaders(
        settings.data, config.seq_len, config.batch_size, settings.run.seed
    ).validation
    correct, losses = [], []
    for index in range(settings.eval.sequences):
        batch = loader.read([index], [(0, config.seq_len)])
        x_BTD, view = model.embedding(batch.tokens_BT), LocalView(batch.documents, config.seq_len)
        for block in model.blocks:
            x_BTD, *_ = block(x_BTD, view)
        logits_TV, labels_T = model.head(model.norm(x_BTD))[0], batch.labels_BT[0]
        asked = labels_T != IGNORE
        correct += (logits_TV.argmax(-1) == labels_T)[asked].tolist()
        losses += torch.nn.functional.cross_entropy(
            logits_TV[asked], labels_T[asked], reduction="none"
        ).tolist()
    return sum(correct) / len(correct), sum(losses) / len(losses)


def summary(settings) -> dict:
    return json.loads((settings.run.path / "summary.json").read_text())


@pytest.mark.parametrize("task", [TASK, COPYING, TEXT], ids=["mqar", "selective_copying", "text"])
def test_accuracy_is_the_share_of_labels_with_the_largest_logit(settings, rows, task):
    config = settings(**task, train__steps=12)
    train(config)
    accuracy, loss = by_hand(config)
    assert 0 < accuracy < 1
    assert rows(config)[-1]["val_accuracy"] == summary(config)["val_accuracy"]
    assert summary(config)["val_accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert summary(config)["val_loss"] == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("task", [TASK, COPYING], ids=["mqar", "selective_copying"])
def test_accuracy_does_not_depend_on_the_split(settings, rows, task):
    quiet = task | {"model__mixers.S.balance_weight": 0.0}
    expected = settings("one", **quiet)
    train(expected)
    splits = {"sp2": (2, {"parallel__sp": 2}), "dp2sp2": (4, {"parallel__sp": 2})}
    for name, (ranks, split) in splits.items():
        shared = settings(name, **quiet, **split)
        run(ranks, shared)
        assert summary(shared)["val_accuracy"] == summary(expected)["val_accuracy"]
        for a, b in zip(rows(expected), rows(shared), strict=True):
            assert abs(a["loss"] - b["loss"]) < 1e-9
            assert a.get("val_accuracy") == b.get("val_accuracy")


def test_a_stopped_run_of_a_task_goes_on_bit_for_bit(settings, rows):
    whole = settings("whole", **TASK)
    train(whole)
    train(settings("parts", **TASK, train__stop_after=3))
    train(settings("parts", **TASK))
    names = ("loss", "grad_norm", "val_loss", "val_accuracy")
    for a, b in zip(rows(whole), rows(settings("parts")), strict=True):
        assert [a.get(name) for name in names] == [b.get(name) for name in names]


def test_labels_are_scored_without_all_logits_at_once(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 50 * 8)
    hidden_MD, weight_VD, labels_M = example()
    logits_MV = hidden_MD @ weight_VD.T
    labels_M[1::3] = logits_MV.argmax(-1)[1::3]
    right_M = logits_MV.argmax(-1) == labels_M
    expected_M = torch.nn.functional.cross_entropy(logits_MV, labels_M, reduction="none")
    with LargestTensor() as largest:
        loss_M, correct_M = loss_module.score_labels(hidden_MD, weight_VD, labels_M)
    assert torch.equal(correct_M, right_M)
    assert right_M.sum() >= 12
    torch.testing.assert_close(loss_M, expected_M, rtol=0, atol=1e-10)
    assert largest.elements <= weight_VD.numel()
    nothing_M = torch.full_like(labels_M, IGNORE)
    for scores in loss_module.score_labels(hidden_MD, weight_VD, nothing_M):
        assert not scores.any()
