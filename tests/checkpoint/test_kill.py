"""A process may be killed at any moment: a good checkpoint is there and the next save works."""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longctx.checkpoint import CheckpointConfig, Checkpoints, latest, open_checkpoint, whole
from tests.checkpoint.crews import save, tensors_of

pytestmark = pytest.mark.alone


def fork(work: Callable[[], None]) -> int:
    """Runs `work` in a child; the child's number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        work()
        code = 0
    finally:
        os._exit(code)


CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def die_at(change: int) -> None:
    """Kills this process when it asks the system for a change to files, for that many times."""
    left = change

    def hook(name: str, arguments: tuple) -> None:
        nonlocal left
        if name in CHANGES or (name == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def check(folder: Path, possible: set[int]) -> None:
    """The newest checkpoint is of one of these steps, and whole."""
    checkpoint = open_checkpoint(latest(folder))
    step = checkpoint.state["step"]
    assert step in possible
    for name, tensor in tensors_of(step).items():
        assert torch.equal(checkpoint.read(name), tensor), name


def test_a_kill_before_any_change_to_files_leaves_a_good_checkpoint(tmp_path):
    code, change = -1, 0
    while code:
        change += 1
        assert change < 300
        folder = tmp_path / str(change)
        save(folder, 1)

        def work(folder=folder, change=change):
            die_at(change)
            save(folder, 2, keep=1)
            save(folder, 2, keep=1)

        code = os.waitpid(fork(work), 0)[1]
        assert code in (0, signal.SIGKILL)
        check(folder, {1, 2})
        save(folder, 3, keep=1)
        check(folder, {3})
        assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-3"]
    assert change > 20


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_kill_at_a_random_moment_leaves_a_good_checkpoint(tmp_path, asynchronous):
    def train(folder: Path) -> None:
        checkpoints = Checkpoints(folder, CheckpointConfig(asynchronous=asynchronous))
        weights = torch.zeros(100_000)
        for step in range(1, 10_000):
            checkpoints.settle()
            weights.fill_(step)
            checkpoints.save(step, [whole("model/w", weights)], {})

    reached = []
    for seed in range(10):
        folder = tmp_path / str(seed)
        pid = fork(lambda folder=folder: train(folder))
        deadline = time.monotonic() + 20
        while not (folder / "latest").exists():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(random.Random(seed).uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        checkpoint = open_checkpoint(latest(folder))
        step = checkpoint.state["step"]
        assert torch.equal(checkpoint.read("model/w"), torch.full((100_000,), float(step)))
        reached.append(step)
    assert len(set(reached)) > 1
    assert list(tmp_path.glob("*/.partial-step-*")), "no kill came in the middle of a save"


def test_a_process_that_ends_during_a_save_leaves_the_last_good_one(tmp_path):
    save(tmp_path, 1)

    def work():
        checkpoints = Checkpoints(tmp_path, CheckpointConfig())
        checkpoints.save(2, [whole("model/w", torch.zeros(5_000_000))], {})

    assert os.waitpid(fork(work), 0)[1] == 0
    check(tmp_path, {1})


def test_the_pointer_to_the_newest_is_mended(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "latest").write_text("step-1\n")
    (tmp_path / ".partial-latest").write_text("step-2\n")
    Checkpoints(tmp_path, CheckpointConfig())
    assert (tmp_path / "latest").read_text() == "step-2\n"
    assert not (tmp_path / ".partial-latest").exists()
