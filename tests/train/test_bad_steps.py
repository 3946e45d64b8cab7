"""What a whole run does about steps that are not finite, left out, or differ between replicas."""

import math
import threading
import time

import pytest
import torch

from longctx.checkpoint import open_checkpoint, saving
from longctx.data.loader import Loader
from longctx.errors import InputError, OutsideError
from longctx.train import trainer as trainer_module
from longctx.train.trainer import train
from tests.train.processes import exit_codes, start

TEN = {"train__steps": 10, "eval__every": 0}


@pytest.fixture
def poison(monkeypatch):
    """Makes the losses of these steps NaN."""

    def make(*steps: int) -> None:
        forward = trainer_module.Trainer.forward

        def poisoned(self, batch):
            losses, flops = forward(self, batch)
            if self.model.training and self.progress.step + 1 in steps:
                losses = losses._replace(cross_entropy=losses.cross_entropy * math.nan)
            return losses, flops

        monkeypatch.setattr(trainer_module.Trainer, "forward", poisoned)

    return make


def weights(config, step: int) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(config.run.path / f"checkpoints/step-{step}")
    return {n: checkpoint.read(n) for n in checkpoint.names if not n.startswith("random")}


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(settings, rows, poison):
    config = settings(checkpoint__every=1, checkpoint__keep=10, **TEN)
    poison(4)
    train(config)
    assert [row["skipped"] for row in rows(config)] == [0] * 3 + [1] * 7
    assert rows(config)[3]["loss"] is None
    before, after = weights(config, 3), weights(config, 4)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert math.isfinite(rows(config)[-1]["loss"])
    log = (config.run.path / "log.txt").read_text()
    assert "step 4: loss is nan" in log
    assert "sequences 12 to 15" in log


def test_a_run_of_bad_steps_ends_with_the_last_good_checkpoint(settings, rows, poison):
    config = settings(checkpoint__every=2, faults__max_skipped=3, **TEN)
    poison(5, 6, 7, 8)
    with pytest.raises(OutsideError, match=r"step 7: .* 3 in a row .* checkpoint: .*step-6"):
        train(config)
    assert len(rows(config)) == 6


def test_counts_of_bad_steps_survive_a_resume(settings, rows, poison):
    config = settings(train__stop_after=4, **TEN)
    poison(3)
    train(config)
    train(settings(**TEN))
    assert rows(config)[-1]["skipped"] == 1


def test_left_out_steps_pass_without_training(settings, rows):
    config = settings("left", data__skip_steps="3-4", **TEN)
    train(settings("left", train__stop_after=2, **TEN))
    train(config)
    table = rows(config)
    assert [row["step"] for row in table] == list(range(1, 11))
    assert [row["loss"] is None for row in table] == [False] * 2 + [True] * 2 + [False] * 6
    assert table[3]["tokens"] == table[1]["tokens"]
    assert [row["skipped"] for row in table] == [0] * 10
    whole = settings("whole", **TEN)
    train(whole)
    assert table[1]["loss"] == rows(whole)[1]["loss"]
    assert table[4]["lr"] == rows(whole)[4]["lr"]
    assert table[4]["loss"] != rows(whole)[4]["loss"]


def test_a_disk_that_is_full_for_a_while_does_not_end_a_run(settings, rows, monkeypatch):
    for asynchronous in (True, False):
        config = settings(
            f"full {asynchronous}",
            checkpoint__every=2,
            checkpoint__asynchronous=asynchronous,
            **TEN,
        )
        write, calls = saving.write_shard, []

        def sometimes(*arguments, write=write, calls=calls):
            calls.append(1)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
            return write(*arguments)

        monkeypatch.setattr(saving, "write_shard", sometimes)
        train(config)
        monkeypatch.setattr(saving, "write_shard", write)
        log = (config.run.path / "log.txt").read_text()
        assert "disk is full" in log
        assert "training goes on" in log
        assert len(rows(config)) == 10
        assert (config.run.path / "checkpoints/step-10").is_dir()


def test_a_deterministic_run_repeats_itself(settings, rows):
    runs = [settings(name, train__deterministic="true", **TEN) for name in ("first", "second")]
    try:
        for config in runs:
            train(config)
    finally:
        torch.use_deterministic_algorithms(False)
    first, second = ([row["loss"] for row in rows(config)] for config in runs)
    assert first == second
    ends = [weights(config, 10) for config in runs]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.alone
def test_replicas_that_differ_end_the_run(settings, capfd):
    config = settings(faults__check_replicas_every=2, parallel__engine="none", **TEN)

    def damage(rank: int) -> None:
        step = trainer_module.Trainer.step

        def damaged(self, log):
            if rank == 1 and self.progress.step == 3:
                self.model.norm.weight.data[0] += 1e-3
            return step(self, log)

        trainer_module.Trainer.step = damaged

    assert exit_codes(start(2, config, damage)) == [1, 1]
    message = capfd.readouterr().err
    assert "norm.weight" in message
    assert "ranks 0-1" in message


@pytest.mark.cluster
def test_data_that_one_process_cannot_read_is_told_by_it(settings, capfd):
    config = settings(**TEN)

    def damage(rank: int) -> None:
        def fails(self, ids, segments):
            if rank == 1 and ids[0] >= 12:
                raise InputError("shard-3.bin: changed since it was tokenised")
            return read(self, ids, segments)

        read, Loader.read = Loader.read, fails

    assert exit_codes(start(2, config, damage)) == [1, 1]
    assert "rank 1: shard-3.bin: changed since it was tokenised" in capfd.readouterr().err


def test_an_error_that_ends_a_run_is_in_its_log_and_costs_no_checkpoint(settings, monkeypatch):
    def fails(self, ids, segments):
        if ids[0] >= 8:
            raise InputError("s3://me:hunter2@store: changed since it was tokenised")
        return read(self, ids, segments)

    def slowly(*arguments):
        time.sleep(0.3)
        return write(*arguments)

    read, write = Loader.read, saving.write_shard
    monkeypatch.setattr(Loader, "read", fails)
    monkeypatch.setattr(saving, "write_shard", slowly)
    config = settings(checkpoint__every=2, **TEN)
    with pytest.raises(InputError):
        train(config)
    text = (config.run.path / "log.txt").read_text()
    assert "warning: ended by InputError: s3://[redacted]@store: changed since" in text
    assert (config.run.path / "checkpoints/step-2").is_dir()
    assert not [x.name for x in threading.enumerate() if x.name in ("read ahead", "watchdog")]
