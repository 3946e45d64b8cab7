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
    small += ("--data.path", str(ROOT / "docs" / "adr"))
    words = ["launch/local.sh", "-n", "2", "tiny", "--run.dir", str(folder), *small, *options]
    return subprocess.Popen(
        words,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        # A shell ignores this for ever if these tests run in the background of another.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def workers(folder: Path) -> list[int]:
    """Processes that train into `folder`, without the launcher."""
    found = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True)
    lines = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in found.stdout.split()}
    return sorted(pid for pid, line in lines.items() if "longctx\0train" in line)[-2:]


def processes_of(folder: Path) -> set[int]:
    """Processes whose command names `folder`."""
    found = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True)
    return set(map(int, found.stdout.split()))


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


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_the_launcher_stops_the_run_after_it_saved(tmp_path, number):
    folder = tmp_path / "run"
    process = launch(folder, "--parallel.sp", "2", "--train.steps", "100000")
    wait_for_steps(folder, 3)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert (folder / "checkpoints" / f"step-{last}").is_dir()


def test_a_second_interrupt_ends_a_run_that_hangs(tmp_path):
    folder = tmp_path / "run"
    process = launch(folder, "--parallel.sp", "2", "--train.steps", "100000")
    wait_for_steps(folder, 3)
    os.kill(workers(folder)[-1], signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 130, output
    assert workers(folder) == []


@pytest.mark.parametrize("steps", [0, 3], ids=["checking", "training"])
def test_no_process_outlives_a_killed_launcher(tmp_path, steps):
    folder = tmp_path / "run"
    process = launch(folder, "--parallel.sp", "2", "--train.steps", "100000")
    if steps:
        wait_for_steps(folder, steps)
    while not (started := processes_of(folder) - {process.pid}):
        time.sleep(0.05)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 3
    while processes_of(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of(folder) == set(), started


def test_a_mistake_is_told_once_before_anything_starts(tmp_path):
    process = launch(tmp_path / "run", "--parallel.sp", "3")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert output.count("\n") == 1
    assert "parallel.sp = 3" in output
    assert not (tmp_path / "run").exists()
