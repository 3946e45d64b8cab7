import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def launch(folder: Path, *options: str) -> subprocess.Popen[str]:
    small = ("--train.seq_len", "64", "--model.width", "32", "--eval.sequences", "2")
    words = ["launch/local.sh", "-n", "2", "tiny", "--run.dir", str(folder), *small, *options]
    return subprocess.Popen(
        words,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )


def workers(folder: Path) -> list[int]:
    """Processes that train into `folder`, without the launcher."""
    found = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True)
    lines = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in found.stdout.split()}
    return sorted(pid for pid, line in lines.items() if "longctx\0train" in line)[-2:]


def wait_for_steps(folder: Path, count: int) -> None:
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_two_local_processes_share_a_sequence(tmp_path):
    folder = tmp_path / "run"
    process = launch(folder, "--parallel.sp", "2", "--train.steps", "5")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert json.loads((folder / "summary.json").read_text())["processes"] == 2


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hangs"])
def test_a_lost_process_ends_the_job_and_leaves_none_behind(tmp_path, number):
    folder = tmp_path / "run"
    options = ("--parallel.sp", "2", "--train.steps", "100000", "--parallel.timeout_seconds", "5")
    process = launch(folder, *options)
    wait_for_steps(folder, 3)
    os.kill(workers(folder)[-1], number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "parallel.timeout_seconds" in output
    assert workers(folder) == []


def test_a_mistake_is_told_once_before_anything_starts(tmp_path):
    process = launch(tmp_path / "run", "--parallel.sp", "3")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert output.count("\n") == 1
    assert "parallel.sp = 3" in output
    assert not (tmp_path / "run").exists()
