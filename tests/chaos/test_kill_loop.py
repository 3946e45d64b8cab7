import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.run_files import Reference, problems_at_the_end, read_rows

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
KILLS = 10


def test_killed_runs_lose_nothing():
    words = ("--kills", str(KILLS), "--real", "1", "--seed", "7", "--variant", "1")
    plain = "2 --parallel.engine none --checkpoint.asynchronous false"
    variants = ("--variant", "4 --parallel.sp 2", "--variant", plain)
    command = [sys.executable, "-m", "tests.chaos", *words, *variants]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"^\| all \| \d+ \| {KILLS} \|.* 0 \|$", done.stdout, re.MULTILINE)


@pytest.fixture
def finished(tmp_path):
    """A finished run of four steps, and what it must be equal to."""
    rows = [{"step": n, "loss": 1 / n, "grad_norm": 2.0} for n in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "summary.json").write_text(json.dumps({"val_loss": 0.5}))
    (tmp_path / "checkpoints" / "step-4").mkdir(parents=True)
    return tmp_path, Reference(read_rows(tmp_path)[0], (0.5).hex())


def spoil(run: Path, how: str) -> None:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    changes = {
        "step 2 after step 2": [*lines[:2], *lines[1:]],
        "step 3 after step 1": lines[:1] + lines[2:],
        "3 steps instead of 4": lines[:-1],
        "step 4: ": [*lines[:3], lines[3].replace("0.25", "0.25000000000000006")],
    }
    metrics.write_text("".join(changes.get(how, lines)))
    if how == "validation loss":
        (run / "summary.json").write_text(json.dumps({"val_loss": 0.5000000000000001}))
    if how == "no summary.json":
        (run / "summary.json").unlink()
    if how == "left behind":
        (run / "checkpoints" / ".partial-step-3").mkdir()
    if how == "the newest checkpoint":
        (run / "checkpoints" / "step-4").rename(run / "checkpoints" / "step-3")


PROBLEMS = (
    "step 2 after step 2",
    "step 3 after step 1",
    "3 steps instead of 4",
    "step 4: ",
    "validation loss",
    "no summary.json",
    "left behind",
    "the newest checkpoint",
)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_loop_sees_what_is_wrong_with_a_run(finished, problem):
    run, reference = finished
    assert problems_at_the_end(run, reference) == []
    spoil(run, problem)
    assert any(problem in found for found in problems_at_the_end(run, reference))
