import os
import signal
import time

import pytest

from longctx.cli import main
from longctx.config import decode
from longctx.errors import InputError
from longctx.train.prepare import prepare
from longctx.train.settings import Settings
from longctx.train.trainer import train
from tests.train.processes import exit_codes, run, start

pytestmark = pytest.mark.alone

STEPS = {"train__steps": 20, "train__seq_len": 63, "train__batch_size": 2}
DOUBLE = STEPS | {"train__precision": "fp64"}
SPLITS = {
    "zigzag": {"parallel__placement": "zigzag"},
    "scan and ring": {"parallel__prefix": "scan", "parallel__stream": "ring"},
    "heads": {"parallel__heads": 2, "parallel__prefix": "ulysses"},
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
def test_losses_do_not_depend_on_the_split(settings, rows, split):
    expected = settings("one", **DOUBLE)
    train(expected)
    for sp in (2, 4):
        shared = settings(f"sp{sp}", parallel__sp=sp, **DOUBLE, **split)
        run(sp, shared)
        for a, b in zip(rows(expected), rows(shared), strict=True):
            assert abs(a["loss"] - b["loss"]) < 1e-9
            assert abs(a["grad_norm"] - b["grad_norm"]) < 1e-9
        assert all(row["exchange_calls"] > 0 < row["exchange_bytes"] for row in rows(shared))


def test_single_precision_losses_stay_close(settings, rows):
    expected, shared = settings("one", **STEPS), settings("sp2", parallel__sp=2, **STEPS)
    train(expected)
    run(2, shared)
    differences = [abs(a["loss"] - b["loss"]) for a, b in zip(rows(expected), rows(shared))]
    assert max(differences[:5]) < 1e-5
    assert max(differences) < 1e-3


def test_replicas_share_the_batch_and_normalise_by_all_valid_tokens(settings, rows):
    quiet = {"model__mixers.S.balance_weight": 0.0, "train__precision": "fp64"}
    expected, shared = settings("one", **quiet), settings("dp2sp2", parallel__sp=2, **quiet)
    train(expected)
    run(4, shared)
    for a, b in zip(rows(expected), rows(shared), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-9
    assert abs(rows(expected)[-1]["val_loss"] - rows(shared)[-1]["val_loss"]) < 1e-9


def test_dropout_and_router_noise_do_not_depend_on_the_split(settings, rows):
    noisy = DOUBLE | {"model__dropout": 0.2, "model__mixers.S.router_noise": 0.5}
    expected, shared = settings("one", **noisy), settings("sp2", parallel__sp=2, **noisy)
    quiet = settings("quiet", **DOUBLE)
    for config in (expected, quiet):
        train(config)
    run(2, shared)
    for a, b in zip(rows(expected), rows(shared), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-9
    assert rows(expected)[5]["loss"] != rows(quiet)[5]["loss"]


def test_two_equal_runs_are_equal_bit_for_bit(settings, rows):
    runs = [settings(name, parallel__sp=2, **STEPS) for name in ("first", "second")]
    for config in runs:
        run(2, config)
    first, second = ([row["loss"] for row in rows(config)] for config in runs)
    assert first == second


def test_a_run_may_go_on_under_another_split(settings, rows):
    whole = settings("whole", **DOUBLE)
    train(whole)
    run(4, settings("parts", parallel__sp=4, train__stop_after=7, **DOUBLE))
    run(2, settings("parts", parallel__sp=2, train__stop_after=13, **DOUBLE))
    train(settings("parts", **DOUBLE))
    for a, b in zip(rows(whole), rows(settings("parts")), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-9


def test_a_signal_to_one_process_stops_and_saves_all(settings, rows):
    config = settings(parallel__sp=2, train__steps=100_000)
    children = start(2, config)
    while not (config.run.path / "metrics.jsonl").exists() or not rows(config):
        time.sleep(0.02)
    os.kill(children[1], signal.SIGTERM)
    assert exit_codes(children) == [75, 75]
    saved = (config.run.path / "checkpoints" / f"step-{rows(config)[-1]['step']}").is_dir()
    assert saved


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hangs"])
def test_a_lost_rank_ends_the_job_and_is_told(settings, rows, number, capfd):
    config = settings(parallel__sp=2, train__steps=100_000, parallel__timeout_seconds=3)
    children = start(2, config)
    while not (config.run.path / "metrics.jsonl").exists() or len(rows(config)) < 3:
        time.sleep(0.02)
    os.kill(children[1], number)
    assert exit_codes(children[:1], seconds=20) == [1]
    os.kill(children[1], signal.SIGKILL)
    exit_codes(children[1:])
    message = capfd.readouterr().err
    assert "rank 0" in message
    assert "parallel.timeout_seconds" in message


REFUSED = {
    "sp does not divide": ({"parallel.sp": 3}, 4, "parallel.sp = 3 does not divide the 4"),
    "dp": ({"parallel.dp": 3, "parallel.sp": 2}, 4, "parallel.dp = 3"),
    "batch": ({"train.batch_size": 3}, 2, "train.batch_size = 3"),
    "heads do not divide sp": ({"parallel.sp": 4, "parallel.heads": 3}, 4, "parallel.heads = 3"),
    "heads": ({"parallel.sp": 16, "parallel.heads": 16}, 16, "layer 3"),
    "too few tokens": ({"parallel.sp": 4, "train.seq_len": 5}, 4, "5 tokens"),
    "mirror": ({"parallel.sp": 4, "parallel.placement": "mirror"}, 4, "even Ulysses group"),
}


@pytest.mark.parametrize(("changes", "processes", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_an_impossible_split_is_refused_before_anything_is_sent(
    settings, changes, processes, words
):
    config = settings(**{key.replace(".", "__", 1): value for key, value in changes.items()})
    with pytest.raises(InputError, match=words):
        prepare(config, processes)
    assert not config.run.path.exists()


def test_a_vocabulary_that_is_too_small_to_share_is_refused():
    tables = {
        "data": {"task": "mqar", "pairs": 2, "answers": 2, "vocabulary": 12},
        "model": {
            "width": 32,
            "pattern": "S",
            "mixers": {"S": {"kind": "softmax", "num_heads": 16}},
        },
        "train": {"seq_len": 12, "batch_size": 1},
        "parallel": {"tp": 16},
    }
    with pytest.raises(InputError, match="vocab_size = 12: fewer than the 16 processes"):
        prepare(decode(Settings, tables, file="test"), 16)


def test_only_the_first_process_of_a_host_tells_a_mistake(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    argv = ["train", "tiny", "--parallel.sp", "3"]
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert main(argv) == 2
        assert capsys.readouterr().err.count("\n") == lines


def test_check_tells_how_a_run_would_be_split(capsys):
    assert main(["check", "tiny", "4", "--parallel.sp", "4"]) == 0
    assert "zigzag" in capsys.readouterr().out
