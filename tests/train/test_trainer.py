import json
import os
import signal

import pytest
import torch

from longctx.config import apply_overrides
from longctx.errors import InputError
from longctx.train import trainer as trainer_module
from longctx.train.trainer import train


@pytest.fixture
def losses(rows):
    return lambda settings: [row["loss"] for row in rows(settings)]


def test_run_directory_holds_what_is_promised(settings, rows):
    config = settings()
    assert train(config) == ""
    names = {path.name for path in config.run.path.iterdir()}
    assert {"config.toml", "metrics.jsonl", "summary.json", "environment.json", "log.txt"} <= names
    assert (config.run.path / "checkpoints" / "step-6").is_dir()
    fields = {"step", "loss", "tokens", "seconds", "tokens_per_second", "mfu", "grad_norm", "lr"}
    fields |= {"peak_memory_bytes", "exchange_bytes", "exchange_calls"}
    assert all(fields <= set(row) for row in rows(config))
    assert [row["step"] for row in rows(config) if "val_loss" in row] == [4, 6]
    summary = json.loads((config.run.path / "summary.json").read_text())
    assert summary["val_loss"] == rows(config)[-1]["val_loss"]
    assert summary["tokens"] == 6 * 4 * 48
    each = [row["mfu"] * row["seconds"] for row in rows(config)]
    totals = [row["flops"] for row in rows(config)]
    assert totals == pytest.approx([totals[0] * sum(each[: n + 1]) / each[0] for n in range(6)])
    assert summary["flops"] == totals[-1]


def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(settings, rows, losses):
    whole, parts = settings("whole"), settings("parts", train__stop_after=3)
    train(whole)
    train(parts)
    assert len(rows(parts)) == 3
    train(settings("parts"))
    assert losses(parts) == losses(whole)
    assert [row["flops"] for row in rows(parts)] == [row["flops"] for row in rows(whole)]
    file = "checkpoints/step-6/shard-00001-of-00001.safetensors"
    files = [c.run.path / file for c in (whole, parts)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_rows_after_the_checkpoint_are_written_once(settings, rows):
    config = settings(train__stop_after=3)
    train(config)
    with (config.run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    train(settings())
    assert [row["step"] for row in rows(config)] == [1, 2, 3, 4, 5, 6]


def test_a_signal_saves_and_the_same_command_goes_on(settings, monkeypatch, rows, losses):
    config, whole = settings("stopped"), settings("whole")
    step = trainer_module.Trainer.step

    def step_and_signal(self, log):
        if self.progress.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, log)

    monkeypatch.setattr(trainer_module.Trainer, "step", step_and_signal)
    assert train(config) == "SIGTERM"
    monkeypatch.undo()
    torch.set_num_threads(1)
    assert len(rows(config)) == 2
    train(config)
    train(whole)
    assert losses(config) == losses(whole)


@pytest.mark.parametrize(
    ("field", "value"),
    [("train__steps", 7), ("run__seed", 1), ("optim__lr", 0.1), ("model__mixers.L.decay", "paper")],
)
def test_another_run_in_the_directory_is_refused(settings, field, value):
    config = settings(train__stop_after=1)
    train(config)
    before = (config.run.path / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match=field.replace("__", ".")):
        train(settings(**{field: value}))
    assert (config.run.path / "metrics.jsonl").read_bytes() == before


def test_changed_data_are_refused(settings, corpus):
    train(settings(train__stop_after=1))
    (corpus / "0.txt").write_text("other text")
    with pytest.raises(InputError, match="other data"):
        train(settings())


def test_a_directory_with_other_files_is_refused(settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="holds files but no run"):
        train(settings())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_do_not_change_the_step(settings, micro_batch, rows):
    one, many = settings("one"), settings("many", train__micro_batch=micro_batch)
    options = ["--train.precision", "fp64", "--model.mixers.S.balance_weight", "0"]
    one, many = (apply_overrides(config, options, "test") for config in (one, many))
    train(one)
    train(many)
    for a, b in zip(rows(one), rows(many), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-10


def test_weights_alone_start_a_new_run(settings, losses):
    first = settings("first")
    train(first)
    train(settings("second", run__init_from=first.run.path, train__steps=1))
    assert losses(settings("second"))[0] < losses(first)[0]


def test_init_from_a_missing_run_leaves_nothing(settings, tmp_path):
    with pytest.raises(InputError, match="no checkpoint"):
        train(settings(run__init_from=tmp_path / "nowhere"))
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_lie_among_its_own_data(settings, corpus):
    config = settings(run__dir=corpus / "runs" / "one")
    with pytest.raises(InputError, match=r"run\.dir = .*: lies in data\.path"):
        train(config)
    assert not (corpus / "runs").exists()


def test_rows_that_are_left_out_are_counted_in_the_log(settings, tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = [f'{{"text": "{number} {"x" * 400}"}}\n' for number in range(20)]
    file.write_text("".join([*lines, '{"text": 7}\n', "broken\n"]))
    config = settings(data__path=file, data__bad_rows="skip", train__steps=1)
    train(config)
    log = (config.run.path / "log.txt").read_text()
    assert "2 rows without text were left out" in log


def test_a_finished_run_is_left_alone(settings, rows, monkeypatch, capsys):
    config = settings(train__steps=2)
    train(config)
    before = rows(config)
    monkeypatch.setattr(trainer_module, "Trainer", None)
    assert train(config) == ""
    assert rows(config) == before
    assert "finished before" in capsys.readouterr().out
