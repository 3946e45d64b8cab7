import csv
import json
import sys

import pytest

from longctx.cli import main
from longctx.config import apply_overrides
from longctx.study import run as study_run
from longctx.study.design import load_study
from longctx.train.trainer import train

AXES = """
[study.variants.mixer]
full = {}
window = { model = { mixers = { M = { window = 3 } } } }
[study.grid]
run.seed = [0]
"""

# Plays a training: fails as often as a file says, or has its study stopped by a signal.
STUB = """
import json, os, signal, sys, time, tomllib
from pathlib import Path
folder = Path(sys.argv[1]).parent
with open(sys.argv[1], "rb") as file:
    config = tomllib.load(file)
with open(folder / "starts.txt", "a") as file:
    file.write("x")
print("the stub was here", flush=True)
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
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Puts a stub in place of training; the folder of the study."""
    (tmp_path / "stub.py").write_text(STUB)
    command = (sys.executable, "-S", "-E", str(tmp_path / "stub.py"))
    monkeypatch.setattr(study_run, "TRAIN", command)
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def table(folder) -> list[dict[str, str]]:
    with (folder / "study.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def starts(folder) -> dict[str, int]:
    return {path.parent.name: len(path.read_text()) for path in folder.glob("*/starts.txt")}


def test_a_study_trains_its_cells_and_goes_on_with_an_interrupted_one(write, tmp_path):
    file, folder = write(AXES), tmp_path / "out"
    started, fresh = load_study(file).cells
    stopped = apply_overrides(started.settings, ["--train.stop_after", "2"], "test")
    train(stopped)
    assert main(["study", file, "--study.workers", "2"]) == 0
    for cell in (started, fresh):
        path = cell.settings.run.path
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        assert ("resumed at step 2" in (path / "log.txt").read_text()) == (cell is started)
    for row, cell in zip(table(folder), (started, fresh), strict=True):
        summary = json.loads((cell.settings.run.path / "summary.json").read_text())
        assert row == {
            "cell": cell.name,
            "mixer": cell.values["mixer"],
            "run.seed": "seed0",
            "status": "done",
            **{name: str(summary[name]) for name in list(row)[4:]},
        }
        assert {"val_accuracy", "val_loss", "parameters", "tokens", "seconds"} < set(row)
    assert (folder / "study.png").stat().st_size > 1000


def test_finished_cells_are_not_run_again(write, stub, capsys):
    file = write(AXES)
    assert main(["study", file]) == 0
    assert main(["study", file]) == 0
    assert starts(stub) == {"full-seed0": 1, "window-seed0": 1}
    assert "2 cells, 2 of them finished before" in capsys.readouterr().out
    assert [row["status"] for row in table(stub)] == ["done", "done"]


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
    (stub / "failures.json").unlink()
    assert main(["study", file]) == 0
    assert starts(stub) == {"full-seed0": 3, "window-seed0": 1}


def test_a_signal_stops_cells_and_the_same_command_goes_on(write, stub):
    (stub / "stop").touch()
    file = write(AXES)
    assert main(["study", file]) == 75
    assert starts(stub) == {"full-seed0": 1}
    assert [row["status"] for row in table(stub)] == ["interrupted", "not run"]
    (stub / "stop").unlink()
    assert main(["study", file]) == 0
    assert starts(stub) == {"full-seed0": 2, "window-seed0": 1}


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
