"""What W&B and TensorBoard are told, by packages that keep it."""

import contextlib
import sys

import pytest

from longctx import cli
from longctx.train import mirror, trainer
from longctx.train.metrics import LogConfig, MetricsLog
from longctx.train.mirror import flat
from longctx.train.redaction import HIDDEN
from longctx.train.wandb_run import position_table
from tests.train.fake_wandb import FakeRun

RESOLVED = {"train": {"steps": 9}, "checkpoint": {"dir": "s3://me:hunter2@bucket"}}


def log_rows(folder, config, rows, resume_step=0) -> None:
    log = MetricsLog(folder, config, "tiny", RESOLVED, resume_step)
    for row in rows:
        log.step(row)
    log.close()


def test_wandb_gets_rows_under_the_step_of_the_run(tmp_path, monkeypatch):
    run = FakeRun().install(monkeypatch)
    rows = [{"step": 3, "loss": 2.0, "load": [0.5, 0.25]}, {"step": 4, "loss": float("nan")}]
    log_rows(tmp_path, LogConfig(wandb="offline"), rows, resume_step=2)
    assert run.metrics == [("step", None), ("*", "step")]
    assert run.rows == [
        {"step": 3, "loss": 2.0, "load/0": 0.5, "load/1": 0.25},
        {"step": 4, "loss": None},
    ]


def test_of_a_long_list_a_mirror_gets_the_first_elements():
    assert len(flat({"step": 1, "long": [1.0] * 100})) == 1 + mirror.MOST_ELEMENTS


def test_wandb_gets_what_the_config_says_and_no_secret(tmp_path, monkeypatch):
    run = FakeRun().install(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["train", "--x.api_key", "hunter2"])
    config = LogConfig("offline", project="p", group="g", tags=("a", "b"), job_type="cell")
    log_rows(tmp_path, config, [])
    options = run.options
    assert (options["mode"], options["project"], options["entity"]) == ("offline", "p", None)
    assert (options["group"], options["tags"], options["job_type"]) == ("g", ("a", "b"), "cell")
    assert options["config"]["checkpoint"]["dir"] == f"s3://{HIDDEN}@bucket"
    assert options["config"]["train"] == RESOLVED["train"]
    assert sys.argv == ["train", "--x.api_key", HIDDEN]


def test_a_run_directory_keeps_the_id_of_its_run(tmp_path, monkeypatch):
    run = FakeRun().install(monkeypatch)
    ids = []
    for folder, mode in (("a", "offline"), ("a", "online"), ("b", "offline")):
        log_rows(tmp_path / folder, LogConfig(wandb=mode), [])
        ids.append(run.options["id"])
    assert ids[0] == ids[1] != ids[2]
    assert "resume" not in run.options


def test_evaluations_bring_tables(tmp_path, monkeypatch):
    run = FakeRun().install(monkeypatch)
    row = {"step": 1, "router/0/load": [0.5], "router/0/load_min": 0.5}
    evaluated = {"val_loss": 1.0, "val_loss_by_position": [2.0, None, 1.5]}
    evaluated["val_labels_by_position"] = [7, 0, 9]
    log_rows(tmp_path, LogConfig(wandb="offline"), [row, row | evaluated | {"step": 2}])
    first, second = run.rows
    assert "loss_by_position" not in first
    assert "router_health" not in first
    expected = [["from_position", "loss", "labels"], [0, 2.0, 7], [32, 1.5, 9]]
    assert second["loss_by_position"] == position_table(evaluated) == expected
    assert second["router_health"][1][:3] == ["0", "load", 0.5]


@pytest.mark.parametrize("trouble", ["no key", "no server"])
def test_without_a_server_wandb_writes_files_and_warns_once(tmp_path, monkeypatch, capsys, trouble):
    modes = []

    def init():
        modes.append(run.options["mode"])
        if run.options["mode"] == "online":
            raise ConnectionError("no\nroute")

    run = FakeRun(init=init).install(monkeypatch, has_key=trouble == "no server")
    log_rows(tmp_path, LogConfig(wandb="online"), [{"step": 1}, {"step": 2}])
    assert modes == (["offline"] if trouble == "no key" else ["online", "offline"])
    assert [row["step"] for row in run.rows] == [1, 2]
    shown = capsys.readouterr().out
    assert shown.count("warning") == 1
    why = {"no key": "there is no API key: run `wandb login`", "no server": "no route"}[trouble]
    assert "warning: W&B writes files for `wandb sync`, as no server took the run" in shown
    assert why in shown
    assert "W&B: wandb/offline-run\n" in shown


def test_without_tensorboard_there_is_one_warning_that_says_what_to_install(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log_rows(tmp_path, LogConfig(tensorboard=True), [{"step": 1}, {"step": 2}])
    shown = capsys.readouterr().out
    assert shown.count("warning: TensorBoard failed") == 1
    assert "pip install 'longctx[tensorboard]'" in shown


def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def rows(steps):
        return [{"step": s, "loss": float(s), "none": None, "load": [0.5, 0.25]} for s in steps]

    log_rows(tmp_path, LogConfig(tensorboard=True), rows(range(1, 6)))
    log_rows(tmp_path, LogConfig(tensorboard=True), rows(range(4, 8)), resume_step=3)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(s, s) for s in range(1, 8)]
    assert [e.value for e in board.Scalars("load/1")] == [0.25] * 7
    config = board.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "bucket" in config
    assert "hunter2" not in config


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_wandb_learns_whether_the_run_failed(tmp_path, monkeypatch, error):
    run = FakeRun().install(monkeypatch)
    log = MetricsLog(tmp_path, LogConfig(wandb="offline"), "tiny", RESOLVED, 0)
    with contextlib.suppress(RuntimeError, KeyboardInterrupt), contextlib.closing(log):
        if error:
            raise error
    assert run.exit_code == int(error is not None)


def test_a_mirror_that_hangs_does_not_keep_a_failed_run_alive(monkeypatch, capsys):
    def fails(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(trainer, "train", fails)
    monkeypatch.setattr(cli, "_leave", sys.exit)
    with pytest.raises(RuntimeError):
        cli.main(["train", "tiny"])
    monkeypatch.setattr(mirror, "is_stuck", lambda: True)
    with pytest.raises(SystemExit, match="1"):
        cli.main(["train", "tiny"])
    assert "RuntimeError: out of memory" in capsys.readouterr().err


def test_a_mirror_that_fails_leaves_no_run_of_wandb_open(tmp_path, monkeypatch, capsys):
    def fails() -> None:
        raise ValueError("no such row")

    run = FakeRun(log=fails).install(monkeypatch)
    log_rows(tmp_path, LogConfig(wandb="offline"), [{"step": 1}])
    assert run.exit_code == 0
    assert capsys.readouterr().out.count("warning: W&B failed") == 1
