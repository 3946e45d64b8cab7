import csv
import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from longctx.cli import main
from longctx.study import locks
from longctx.study import run as study_run
from longctx.study.design import load_study
from longctx.study.gpus import Gpus
from longctx.study.outcomes import Outcomes
from longctx.study.results import read_results
from longctx.train.run_directory import write_config

AXES = """
[study.variants.mixer]
full = {}
window = { model = { mixers = { M = { window = 3 } } } }
[study.grid]
run.seed = [0]
"""

# Plays a training: fails as often as a file says, or has its study stopped by a signal.
STUB = """
import json, os, shutil, signal, sys, time, tomllib
from pathlib import Path
folder = Path(sys.argv[1]).parent
with open(sys.argv[1], "rb") as file:
    config = tomllib.load(file)
with open(folder / "starts.txt", "a") as file:
    file.write("x")
print("the stub was here", flush=True)
held = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
(folder / "holds_lock").write_text(str(str(folder.parent.resolve() / ".lock") in held))
(folder / "gpus").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
failures = folder.parent / "failures.json"
if failures.exists():
    left = json.loads(failures.read_text()).get(folder.name, 0)
    if left >= len((folder / "starts.txt").read_text()):
        sys.exit("some reason")
if (folder.parent / "stop").exists():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(30)
figures = {"val_accuracy": 0.5, "val_loss": 1.25, "parameters": 10, "tokens": 20, "seconds": 2.0,
           "tokens_per_second": 10.0, "step": config["train"]["steps"]}
(folder / "summary.json").write_text(json.dumps(figures))
if (folder.parent / "gone").exists():
    shutil.rmtree(folder)
    sys.exit(3)
if (folder.parent / "abort").exists():
    os.abort()
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Puts a stub in place of training; the folder of the study."""
    (tmp_path / "stub.py").write_text(STUB)
    command = (sys.executable, "-S", "-E", str(tmp_path / "stub.py"))
    monkeypatch.setattr(study_run, "TRAIN", command)
    monkeypatch.setattr(study_run, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(study_run, "write_report", lambda results, folder: None)
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def table(folder) -> list[dict[str, str]]:
    with (folder / "study.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def starts(folder) -> dict[str, int]:
    return {path.parent.name: len(path.read_text()) for path in folder.glob("*/starts.txt")}


def test_finished_cells_are_not_run_again(write, stub, capsys):
    file = write(AXES)
    assert main(["study", file]) == 0
    assert main(["study", file]) == 0
    assert starts(stub) == {"full-seed0": 1, "window-seed0": 1}
    assert "2 cells, 2 of them finished before" in capsys.readouterr().out
    assert {path.read_text() for path in stub.glob("*/holds_lock")} == {"True"}
    assert [row["status"] for row in table(stub)] == ["done", "done"]


def test_cells_that_run_side_by_side_get_gpus_of_their_own(write, stub, monkeypatch):
    monkeypatch.setattr(study_run, "visible_gpus", lambda: ("4", "GPU-7"))
    assert main(["study", write(AXES), "--study.workers", "2"]) == 0
    assert {path.read_text() for path in stub.glob("*/gpus")} == {"4", "GPU-7"}


def test_a_cell_gets_the_gpus_that_the_fewest_others_use():
    gpus = Gpus("abc")
    first, second = gpus.take(2), gpus.take(2)
    assert (first, second) == (("a", "b"), ("c", "a"))
    assert gpus.take(4) == ("b", "c", "a")
    gpus.give_back(first)
    assert gpus.take(1) == ("b",)
    assert Gpus(()).take(2) == ()


def test_cells_that_come_to_a_study_later_are_run(write, stub):
    assert main(["study", write(AXES)]) == 0
    assert main(["study", write(AXES.replace("[0]", "[0, 1]"))]) == 0
    assert set(starts(stub).values()) == {1}
    assert len(table(stub)) == len(starts(stub)) == 4


def test_a_cell_that_fails_once_is_tried_again(write, stub, capsys):
    (stub / "failures.json").write_text('{"full-seed0": 1}')
    assert main(["study", write(AXES)]) == 0
    assert starts(stub) == {"full-seed0": 2, "window-seed0": 1}
    assert [row["status"] for row in table(stub)] == ["done", "done"]
    assert "full-seed0: tried again after it failed (exit code 1: some" in capsys.readouterr().out


def test_a_cell_that_came_to_its_end_is_done_however_its_process_ends(write, stub, capsys):
    (stub / "abort").touch()
    assert main(["study", write(AXES)]) == 0
    assert starts(stub) == {"full-seed0": 1, "window-seed0": 1}
    assert [(row["status"], row["attempts"]) for row in table(stub)] == [("done", "1")] * 2
    assert "it came to its end, and then signal SIGABRT: the stub" in capsys.readouterr().out


def test_a_cell_whose_folder_is_taken_away_has_failed_and_is_tried_once_more(write, stub, capsys):
    (stub / "gone").touch()
    assert main(["study", write(AXES)]) == 1
    assert capsys.readouterr().out.count("failed (exit code 3; ") == 4
    assert [(row["status"], row["attempts"]) for row in table(stub)] == [("failed", "2")] * 2
    assert len((stub / "full-seed0" / "failures.txt").read_text().splitlines()) == 2
    (stub / "gone").unlink()
    assert main(["study", write(AXES), "--study.retry_failed", "true"]) == 0


@pytest.mark.parametrize("text", ["[]", "null", '{"step": null}', '{"step": 4}'])
def test_a_summary_without_what_it_should_have_stops_no_study(text, write):
    cell = load_study(write(AXES)).cells[0]
    write_config(cell.settings)
    (cell.settings.run.path / "summary.json").write_text(text)
    outcomes = Outcomes(load_study(write(AXES)), "")
    assert outcomes.status(cell) == ("done" if "4" in text else "not run")
    assert study_run._figures({"val_loss": None, "val_accuracy": "x"}) == "no figures"
    assert (
        study_run._figures({"val_loss": 1.25, "val_accuracy": 0.5}) == "accuracy 0.500, loss 1.2500"
    )


def test_a_cell_that_fails_twice_is_recorded_and_the_others_are_run(write, stub, capsys):
    (stub / "failures.json").write_text('{"full-seed0": 9}')
    file = write(AXES)
    assert main(["study", file]) == 1
    captured = capsys.readouterr()
    assert captured.err == "longctx: cells that failed: full-seed0\n"
    assert "the stub was here" in (stub / "full-seed0" / "console.txt").read_text()
    assert str(stub / "full-seed0" / "console.txt") in captured.out
    assert starts(stub) == {"full-seed0": 2, "window-seed0": 1}
    statuses = [(row["status"], row["val_accuracy"]) for row in table(stub)]
    assert statuses == [("failed", ""), ("done", "0.5")]
    assert [row["attempts"] for row in table(stub)] == ["2", "1"]
    assert "some reason; all it said" in table(stub)[0]["error"]


def test_a_cell_that_failed_twice_is_left_alone_until_it_is_to_be_retried(write, stub, capsys):
    (stub / "failures.json").write_text('{"full-seed0": 2}')
    file = write(AXES)
    assert main(["study", file]) == 1
    assert main(["study", file]) == 1
    assert "1 failed 2 times (--study.retry_failed true tries them" in capsys.readouterr().out
    assert starts(stub) == {"full-seed0": 2, "window-seed0": 1}
    assert main(["study", file, "--study.retry_failed", "true"]) == 0
    assert starts(stub) == {"full-seed0": 3, "window-seed0": 1}
    assert [row["status"] for row in table(stub)] == ["done", "done"]


def test_failures_count_across_commands(write, stub):
    (stub / "failures.json").write_text('{"full-seed0": 9}')
    file = write(AXES)
    cell = load_study(file).cells[0]
    write_config(cell.settings)
    Outcomes(load_study(file), "").note_failure(cell, "exit code 1: the disk\nwas full")
    assert main(["study", file]) == 1
    assert starts(stub) == {"full-seed0": 1, "window-seed0": 1}
    assert [row.attempts for row in read_results(stub).rows] == [2, 1]


def test_a_signal_stops_cells_and_the_same_command_goes_on(write, stub):
    (stub / "stop").touch()
    file = write(AXES)
    assert main(["study", file]) == 75
    assert starts(stub) == {"full-seed0": 1}
    assert [row["status"] for row in table(stub)] == ["interrupted", "not run"]
    (stub / "stop").unlink()
    assert main(["study", file]) == 0
    assert starts(stub) == {"full-seed0": 2, "window-seed0": 1}


def test_a_second_study_in_a_folder_is_refused_and_told_which_is_there(
    write, stub, capsys, monkeypatch
):
    monkeypatch.setattr(locks, "PATIENCE", 0)
    with locks.locked(stub):
        assert main(["study", write(AXES)]) == 2
    said = capsys.readouterr().err
    assert f"longctx study (process {os.getpid()} on {socket.gethostname()}) still" in said
    assert said.count("\n") == 1
    assert not starts(stub)
    assert main(["study", write(AXES)]) == 0


def test_a_full_disk_is_one_line(write, stub, capsys, monkeypatch):
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", refuse)
    assert main(["study", write(AXES)]) == 1
    assert capsys.readouterr().err == f"longctx: {stub}: cannot write: No space left on device\n"
    assert not starts(stub)


def test_a_study_waits_for_cells_that_one_that_was_killed_left_behind(write, stub, capsys):
    owner = subprocess.Popen(["true"])
    owner.wait()
    with locks.locked(stub) as held:
        os.ftruncate(held, 0)
        os.pwrite(held, f"process {owner.pid} on {socket.gethostname()}".encode(), 0)
        cell = subprocess.Popen(["sleep", "0.4"], pass_fds=[held])
    assert main(["study", write(AXES)]) == 0
    assert cell.poll() == 0
    assert f"waiting until cells that process {owner.pid}" in capsys.readouterr().out


def test_workers_are_processes_and_a_cell_that_needs_more_runs_alone(write):
    study = load_study(write("[study.grid]\nparallel.sp = [1, 2, 4]\n"), ["--study.workers", "3"])
    one, two, four = study.cells
    runner = study_run.Runner(study, Outcomes(study, ""), 0)
    assert runner._has_room(four)
    runner._running = [study_run.Job(one, None)]
    assert [runner._has_room(cell) for cell in study.cells] == [True, True, False]
    runner._running = [study_run.Job(two, None)]
    assert [runner._has_room(cell) for cell in study.cells] == [True, False, False]
    command = study_run._command(four)
    assert command[-3:] == ["-n", "4", str(four.settings.run.path / "config.toml")]
    assert Path(command[-4]).name == "local.sh"
    assert Path(command[-4]).is_file()


def swept(write, axes: str, *losses: float) -> Outcomes:
    """A study of which the first cells are done, with these losses."""
    study = load_study(write(f'[study.grid]\n{axes}\n[study.best]\nover = ["optim.lr"]\n'))
    for cell, loss in zip(study.cells, losses, strict=False):
        write_config(cell.settings)
        summary = {"step": 4, "val_loss": loss, "val_accuracy": 0.5}
        (cell.settings.run.path / "summary.json").write_text(json.dumps(summary))
    return Outcomes(study, "")


def best(outcomes: Outcomes) -> list[bool]:
    return [row.is_best for row in outcomes.results().rows]


def fail(outcomes: Outcomes, number: int) -> None:
    cell = outcomes._study.cells[number]
    write_config(cell.settings)
    for _ in range(2):
        outcomes.note_failure(cell, "it diverged")


def test_the_best_of_a_sweep_is_marked_once_all_of_it_is_over(write):
    axes = "model.width = [16, 32]\noptim.lr = [0.1, 0.2, 0.3]"
    outcomes = swept(write, axes, float("nan"), 1.0, 2.0, 3.0, 2.5)
    assert best(outcomes) == [False, True, *[False] * 4]
    fail(outcomes, 5)
    assert best(outcomes) == [False, True, False, False, True, False]


def test_the_best_of_a_sweep_is_so_for_all_seeds_together(write):
    axes = "run.seed = [0, 1]\noptim.lr = [0.1, 0.2, 0.3]"
    outcomes = swept(write, axes, 1.0, 1.3, 0.5, 2.0, 1.5)
    assert not any(best(outcomes))
    fail(outcomes, 5)
    assert best(outcomes) == [False, True, False] * 2  # 0.3 diverged once, 0.1 has a lucky seed


@pytest.mark.usefixtures("stub")
def test_how_long_the_rest_takes_is_told(write, capsys):
    assert main(["study", write(AXES)]) == 0
    first, second = capsys.readouterr().out.splitlines()[1:3]
    assert first.endswith(" s left")
    assert not second.endswith(" left")


def test_another_run_in_the_place_of_a_cell_is_refused_before_anything_runs(write, stub, capsys):
    file = write(AXES)
    assert main(["study", file]) == 0
    before = (stub / "study.csv").read_bytes()
    assert main(["study", write("[train]\nsteps = 5\n" + AXES)]) == 2
    assert "train.steps: 4 -> 5" in capsys.readouterr().err
    assert (stub / "study.csv").read_bytes() == before
    assert set(starts(stub).values()) == {1}


def test_foreign_files_in_the_place_of_a_cell_are_left_alone(write, stub, capsys):
    (stub / "window-seed0").mkdir()
    (stub / "window-seed0" / "thesis.tex").write_text("mine")
    assert main(["study", write(AXES)]) == 2
    assert "holds files but no run" in capsys.readouterr().err
    assert [path.name for path in (stub / "window-seed0").iterdir()] == ["thesis.tex"]
    assert not starts(stub)
