import errno
import io
import json
import math
import os
import shutil
import sys
import threading
import time

import pytest

from longctx.errors import OutsideError
from longctx.train import lines, mirror, progress
from longctx.train.curves import draw_loss
from longctx.train.metrics import LogConfig, MetricsLog, write_json
from tests.train.fake_wandb import FakeRun

CONFIG = {"train": {"steps": 9, "stop_after": 0}}


def row(step: int, **more) -> dict:
    return {"step": step, "loss": 3.0 - 0.1 * step, "tokens": 64 * step, **more}


def open_log(run_dir, resume_step: int = 0, wandb: str = "disabled") -> MetricsLog:
    return MetricsLog(run_dir, LogConfig(wandb=wandb), "tiny", CONFIG, resume_step)


def write_steps(run_dir, steps, resume_step: int = 0) -> None:
    log = open_log(run_dir, resume_step)
    for step in steps:
        log.step(row(step))
    log.close()


def read_rows(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_row_is_on_disk_when_step_returns(tmp_path):
    log = open_log(tmp_path)
    log.step(row(1, balance_loss=0.5))
    assert read_rows(tmp_path) == [row(1, balance_loss=0.5)]
    log.close()


def test_resume_has_each_step_once(tmp_path):
    write_steps(tmp_path, [1, 2, 3, 4])
    write_steps(tmp_path, [3, 4, 5], resume_step=2)
    assert [r["step"] for r in read_rows(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_run_from_the_start_drops_all_rows(tmp_path):
    write_steps(tmp_path, [1, 2])
    write_steps(tmp_path, [1])
    assert read_rows(tmp_path) == [row(1)]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3}', "3\n", "\0\0\0"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    write_steps(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    write_steps(tmp_path, [3], resume_step=3)
    assert [r["step"] for r in read_rows(tmp_path)] == [1, 2, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.txt", "metrics.jsonl"]


def test_non_finite_numbers_become_null(tmp_path):
    log = open_log(tmp_path)
    log.step(row(1, grad_norm=math.nan, parts=[math.inf, 1.0]))
    log.close()
    assert read_rows(tmp_path)[0]["grad_norm"] is None
    assert read_rows(tmp_path)[0]["parts"] == [None, 1.0]
    write_json(tmp_path / "summary.json", {"val_loss": -math.inf})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"val_loss": None}


def test_a_failed_write_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"tokens": 1})

    def fail(_path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutsideError, match=r"summary\.json: .*No space left"):
        write_json(path, {"tokens": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
    assert json.loads(path.read_text()) == {"tokens": 1}


def test_console_and_log_show_first_and_last_step_and_messages(tmp_path, capsys):
    log = open_log(tmp_path)
    log.info("starting")
    for step in range(1, 8):
        log.step(row(step, tokens_per_second=1234.5, mfu=0.25, peak_memory_bytes=2**31))
    log.warn("odd")
    log.close()
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "starting"
    assert shown[1].startswith(
        "step 1/9  loss 2.9000  1,234 tok/s  MFU 25.0%  2.00 GiB  ETA 0:00:0"
    )
    assert shown[2] == "warning: odd"
    assert shown[3].startswith("step 7/9  loss 2.3000")
    logged = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in logged] == shown


def test_a_terminal_gets_a_bar_and_the_log_its_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    log = open_log(tmp_path)
    assert log._progress._bar.tasks[0].total == 9
    log.step(row(1, loss_of_nothing=None))
    log.step(row(2))
    assert log._progress._bar.tasks[0].completed == 2
    assert "loss 2.8000" in log._progress._bar.tasks[0].fields["numbers"]
    log.close()
    assert (tmp_path / "log.txt").read_text().count("step ") == 2


def test_lines_wait_two_seconds(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = progress.Progress(last_step=None, resume_step=0)
    lines = []
    for step in range(1, 7):
        lines.append(shown.step(row(step)))
        now[0] += 0.75
    assert [line is not None for line in lines] == [True, False, False, True, False, False]
    assert shown.step(row(7, val_loss=1.0)).startswith("step 7  val_loss 1.0000  loss 2.3000")


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_failing_wandb_warns_once_and_training_goes_on(tmp_path, monkeypatch, capsys, broken):
    def fail():
        raise BrokenPipeError(f"{broken} broke")

    FakeRun(**{broken: fail}).install(monkeypatch)
    log = open_log(tmp_path, wandb="offline")
    log.step(row(1))
    log.step(row(2))
    log.close()
    assert len(read_rows(tmp_path)) == 2
    assert capsys.readouterr().out.count("warning: W&B failed") == 1
    assert f"{broken} broke" in (tmp_path / "log.txt").read_text()


@pytest.mark.alone
@pytest.mark.parametrize("slow", ["log", "finish", "init"])
def test_a_wandb_that_hangs_delays_neither_steps_nor_the_end(tmp_path, monkeypatch, capsys, slow):
    answers = threading.Event()
    run = FakeRun(**{slow: lambda: answers.wait(60)}).install(monkeypatch)
    monkeypatch.setattr(mirror, "FINISH_SECONDS", 0.3)
    monkeypatch.setattr(mirror, "MOST_WAITING", 5)
    started = time.monotonic()
    log = open_log(tmp_path, wandb="online")
    for step in range(1, 40):
        log.step(row(step))
    assert time.monotonic() - started < 2
    log.close()
    assert time.monotonic() - started < 3
    assert len(read_rows(tmp_path)) == 39
    what = "it had not begun" if slow == "init" else "`wandb sync` sends"
    assert f"warning: W&B did not finish in 0.3 s; {what}" in capsys.readouterr().out
    assert mirror.is_stuck()
    assert len(run.rows) == {"log": 1, "init": 0}.get(slow, len(run.rows))
    answers.set()
    log._mirrors[0]._thread.join()
    assert not mirror.is_stuck()


def test_rows_that_wandb_is_too_slow_for_are_counted(tmp_path, monkeypatch, capsys):
    gate = threading.Event()
    run = FakeRun(init=lambda: gate.wait(5)).install(monkeypatch)
    monkeypatch.setattr(mirror, "MOST_WAITING", 5)
    log = open_log(tmp_path, wandb="online")
    for step in range(1, 13):
        log.step(row(step))
    gate.set()
    log.close()
    assert [row["step"] for row in run.rows] == [1, 2, 3, 4, 5]
    assert "warning: W&B was too slow for 7 rows" in capsys.readouterr().out


def test_a_missing_wandb_warns(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    open_log(tmp_path, wandb="online").close()
    assert "warning: W&B failed" in capsys.readouterr().out


class Disk:
    """Lets writes to a file fail halfway, as a full disk does."""

    def __init__(self, monkeypatch) -> None:
        self.full, self._write = False, os.write
        monkeypatch.setattr(lines.os, "write", self._half)

    def _half(self, file, content):
        if not self.full:
            return self._write(file, content)
        self._write(file, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_training_goes_on_without_a_disk_and_rows_are_written_when_it_is_back(
    tmp_path, monkeypatch, capsys
):
    log, disk = open_log(tmp_path), Disk(monkeypatch)
    log.step(row(1))
    disk.full = True
    for step in range(2, 6):
        log.step(row(step))
        assert len(read_rows(tmp_path)) == 1
    disk.full = False
    log.step(row(6))
    log.step(row(7))
    log.close()
    assert [r["step"] for r in read_rows(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    shown = capsys.readouterr().out
    assert shown.count("metrics.jsonl: cannot write: No space left on device") == 1
    assert shown.count("log.txt: cannot write: No space left on device") == 1
    assert shown.count("metrics.jsonl: can be written again; 0 lines are lost") == 1
    assert "metrics.jsonl: cannot write" in (tmp_path / "log.txt").read_text()


def test_a_run_directory_that_vanishes_and_comes_back(tmp_path, capsys):
    folder = tmp_path / "run"
    log = open_log(folder)
    log.step(row(1))
    folder.rename(tmp_path / "away")
    log.step(row(2))
    shutil.rmtree(tmp_path / "away")
    log.step(row(3))
    assert "cannot write: No such file or directory" in capsys.readouterr().out
    folder.mkdir()
    log.step(row(4))
    log.close()
    assert [r["step"] for r in read_rows(folder)] == [3, 4]
    assert "can be written again" in (folder / "log.txt").read_text()


def test_memory_holds_the_newest_rows_and_the_end_tells_how_many_are_lost(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(lines, "MOST_WAITING", 3)
    log, disk = open_log(tmp_path), Disk(monkeypatch)
    disk.full = True
    for step in range(1, 6):
        log.step(row(step))
    log.close()
    assert "metrics.jsonl: 5 rows are lost" in capsys.readouterr().out
    log, disk.full = open_log(tmp_path), True
    for step in range(1, 6):
        log.step(row(step))
    disk.full = False
    log.step(row(6))
    log.close()
    assert [r["step"] for r in read_rows(tmp_path)] == [4, 5, 6]
    assert "metrics.jsonl: 3 rows are lost" in capsys.readouterr().out


def test_a_console_that_nobody_reads_stops_nothing(tmp_path, monkeypatch):
    class Closed(io.StringIO):
        def write(self, _text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Closed())
    write_steps(tmp_path, [1, 2])
    assert len(read_rows(tmp_path)) == 2


def test_a_disk_that_cannot_be_written_at_the_start_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutsideError, match="cannot write the metrics"):
        open_log(tmp_path / "file")


def test_the_loss_curve_is_drawn(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    assert draw_loss(tmp_path, 2.5) is None
    log = open_log(tmp_path)
    for step in range(1, 41):
        log.step(row(step, val_loss=3.0 if step % 10 == 0 else None))
    log.step(row(41, loss=math.nan) | {"loss": math.nan})
    log.close()
    assert image.imread(draw_loss(tmp_path, 2.5)).shape[:2] == (600, 1000)


def test_no_matplotlib_means_one_line_and_no_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_steps(tmp_path, [1])
    assert draw_loss(tmp_path, None) is None
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "loss.png").exists()
