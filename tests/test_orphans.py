import os
import signal
import subprocess
import time
from collections.abc import Callable

import pytest

from longctx.orphans import LAUNCHER, die_with_parent

pytestmark = pytest.mark.alone

SURVIVED = 3


def fork(work: Callable[[], int]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = work()
        finally:
            os._exit(code)
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def worker_of_a_killed_launcher(environment: Callable[[int], dict[str, str]]) -> bool:
    """Whether a worker, which called die_with_parent, outlives its launcher by 5 seconds."""
    reader, writer = os.pipe()

    def worker() -> int:
        os.close(reader)
        os.environ |= environment(os.getppid())
        die_with_parent()
        os.write(writer, b".")
        time.sleep(60)
        return 0

    def launcher() -> int:
        fork(worker)
        time.sleep(60)
        return 0

    started = fork(launcher)
    os.close(writer)
    assert os.read(reader, 1) == b"."
    os.kill(started, signal.SIGKILL)
    assert exit_code(started) == -signal.SIGKILL
    os.set_blocking(reader, False)
    deadline = time.monotonic() + (5 if environment(0) else 0.5)
    try:
        while time.monotonic() < deadline:
            try:
                # The end of the pipe: nobody holds its other side any more.
                if os.read(reader, 1) == b"":
                    return False
            except BlockingIOError:
                time.sleep(0.01)
        return True
    finally:
        os.close(reader)


@pytest.mark.parametrize(
    "environment",
    [lambda parent: {LAUNCHER: str(parent)}, lambda _: {"TORCHELASTIC_RUN_ID": "none"}],
    ids=["named", "torchrun"],
)
def test_a_worker_dies_with_its_launcher(environment):
    assert not worker_of_a_killed_launcher(environment)


def test_a_process_without_a_launcher_outlives_its_parent():
    assert worker_of_a_killed_launcher(lambda _: {})


def test_a_worker_that_lost_its_launcher_before_it_asked_ends():
    def work() -> int:
        os.environ[LAUNCHER] = str(os.getpid())
        die_with_parent()
        return SURVIVED

    assert exit_code(fork(work)) == 128 + signal.SIGKILL


@pytest.mark.parametrize(
    ("program", "code"), [(["sleep", "30"], 128 + signal.SIGKILL), ([], SURVIVED)]
)
def test_a_worker_of_torchrun_knows_whether_its_parent_is_one(monkeypatch, program, code):
    adopter = subprocess.Popen(program) if program else None
    parent = adopter.pid if adopter else os.getpid()

    def work() -> int:
        os.setsid()
        os.environ["TORCHELASTIC_RUN_ID"] = "none"
        monkeypatch.setattr(os, "getppid", lambda: parent)
        die_with_parent()
        return SURVIVED

    try:
        assert exit_code(fork(work)) == code
    finally:
        if adopter:
            adopter.kill()
            adopter.wait()


def test_the_name_of_the_launcher_is_not_handed_on():
    def work() -> int:
        os.environ[LAUNCHER] = str(os.getppid())
        die_with_parent()
        return SURVIVED if LAUNCHER not in os.environ else 0

    assert exit_code(fork(work)) == SURVIVED
