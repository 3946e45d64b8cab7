"""A study of real trainings is killed half way, with all that it started, and started again."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
CELLS = """
[checkpoint]
every = 10
[[study.cells]]
name = "short"
train.steps = 4
[[study.cells]]
name = "long"
train.steps = 200
[[study.cells]]
name = "wide"
train.steps = 2
parallel.sp = 2
"""


def start(file: str, output: Path) -> subprocess.Popen:
    """A study in a process group of its own."""
    with output.open("ab") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "longctx", "study", file, "--study.workers", "2"],
            stdout=said,
            stderr=said,
            cwd=output.parent,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )


def steps(cell: Path) -> list[int]:
    file = cell / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def contents(cell: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in cell.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_study_that_was_killed_half_way_repeats_no_finished_cell(write, tmp_path):
    file, out, said = write(CELLS), tmp_path / "out", tmp_path / "said.txt"
    short, long, wide = (out / name for name in ("short", "long", "wide"))
    study = start(file, said)
    deadline = time.monotonic() + 120
    while not (short / "summary.json").exists() or len(steps(long)) < 25:
        assert study.poll() is None, said.read_text()
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.02)
    os.killpg(study.pid, signal.SIGKILL)
    study.wait()
    assert 25 <= len(steps(long)) < 200
    before = contents(short)
    assert start(file, said).wait(240) == 0, said.read_text()
    assert contents(short) == before
    assert steps(short) == [1, 2, 3, 4]
    assert steps(long) == list(range(1, 201))
    assert (long / "log.txt").read_text().count("resumed at step") == 1
    assert json.loads((wide / "summary.json").read_text())["processes"] == 2
    assert steps(wide) == [1, 2]
    with (out / "study.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    told = [(row["cell"], row["status"], row["attempts"], row["processes"]) for row in rows]
    assert told == [
        ("short", "done", "1", "1"),
        ("long", "done", "1", "1"),
        ("wide", "done", "1", "2"),
    ]
    assert (out / "study.html").stat().st_size > 1000
    assert "3 cells, 1 of them finished before" in said.read_text()
