import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longctx.config import to_toml
from longctx.launch.ports import free_port
from tests.cluster.test_local_launch import ROOT, wait_for_steps
from tests.train.conftest import corpus, rows, settings  # noqa: F401
from tests.train.processes import run

STEPS = {"train__steps": 40, "checkpoint__every": 5, "parallel__timeout_seconds": 20}


def torchrun(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *words],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )


def workers(launcher: int) -> list[int]:
    """The processes that torchrun started."""
    found = subprocess.run(["pgrep", "-P", str(launcher)], capture_output=True, text=True)
    return sorted(map(int, found.stdout.split()))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def start(config, folder: Path, *options: str) -> subprocess.Popen[str]:
    file = folder / f"{config.run.path.name}.toml"
    file.write_text(to_toml(config))
    shape = ("--standalone", "--nproc-per-node", "2", *options)
    return torchrun(*shape, "-m", "longctx", "train", str(file))


def test_a_killed_rank_is_started_again_and_nothing_is_lost(settings, rows, tmp_path):  # noqa: F811
    expected = settings("whole", parallel__sp=2, **STEPS)
    run(2, expected)
    config = settings("killed", parallel__sp=2, **STEPS)
    process = start(config, tmp_path, "--max-restarts", "1")
    wait_for_steps(config.run.path, 12)
    os.kill(workers(process.pid)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    log = (config.run.path / "log.txt").read_text()
    assert log.count("resumed at step") == 1, log
    figures = [[(row["step"], row["loss"]) for row in rows(x)] for x in (expected, config)]
    assert figures[0] == figures[1]
    assert rows(expected)[-1]["val_loss"] == rows(config)[-1]["val_loss"]


@pytest.mark.parametrize("steps", [0, 3], ids=["starting", "training"])
def test_no_worker_outlives_torchrun(settings, tmp_path, steps):  # noqa: F811
    config = settings(parallel__sp=2, train__steps=100_000)
    process = start(config, tmp_path)
    while len(workers(process.pid)) < 2:
        time.sleep(0.01)
    wait_for_steps(config.run.path, steps)
    orphans = workers(process.pid)
    assert len(orphans) == 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while any(map(alive, orphans)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, orphans))


def test_hosts_that_counted_different_numbers_of_restarts_meet(tmp_path):
    mark, result = tmp_path / "mark", tmp_path / "result"
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}")
    shape = ("--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "1", "--rdzv-id", "7")
    ways = ("--local-addr", "127.0.0.1", "--monitor-interval", "0.2")
    program = ("-m", "tests.cluster.meet", str(mark), str(result))
    hosts = [f"--rdzv-conf=is_host={is_first},last_call_timeout=2" for is_first in (1, 0)]
    processes = [torchrun(*shape, *meeting, host, *ways, *program) for host in hosts]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    counts = sorted(result.with_suffix(f".{rank}").read_text() for rank in range(2))
    assert counts == ["0", "1"]
