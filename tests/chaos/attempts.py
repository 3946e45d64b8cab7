"""Starts trainings, finds their processes and kills them.

A training costs seconds to start because every process imports torch. Most attempts are therefore
forked from this process, which has imported everything; others are real ones.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from longctx.cli import main
from longctx.launch.ports import free_port
from longctx.orphans import LAUNCHER, signal_when_parent_dies

ROOT = Path(__file__).parents[2]
MARK = "LONGCTX_CHAOS"
SECONDS_FOR_OTHERS = 10.0
STARTERS = ("fork", "torchrun", "local")


@dataclass(frozen=True)
class Process:
    """A running process, from /proc."""

    pid: int
    parent: int
    session: int


class Attempt:
    """One start of a training on several processes, as a launcher does it."""

    def __init__(self, starter: str, ranks: int, words: Sequence[str], console: Path):
        self.mark, self.starter, self.ranks = uuid.uuid4().hex, starter, ranks
        self.code: int | None = None
        self._trainers: list[int] = []
        if starter == "fork":
            self.pid = _fork(console, lambda: _launch(ranks, ["train", *words]))
        else:
            self.pid = self._start(starter, words, console)

    def _start(self, starter: str, words: Sequence[str], console: Path) -> int:
        bin_folder = Path(sys.executable).parent
        command = [str(ROOT / "launch" / "local.sh"), "-n", str(self.ranks), *words]
        if starter == "torchrun":
            launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
            program = ("-m", "longctx", "train", *words)
            command = [sys.executable, *launcher, str(self.ranks), *program]
        environment = {MARK: self.mark, "PATH": f"{bin_folder}:{os.environ['PATH']}"}
        with console.open("ab") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return process.pid

    def poll(self) -> int | None:
        """The launcher's exit code, or None while it runs."""
        if self.code is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if done else None
        return self.code

    def members(self) -> list[Process]:
        """All processes of this attempt that are alive."""
        mark = f"{MARK}={self.mark}".encode()
        return [p for p in _processes() if p.session == self.pid or mark in _read(p.pid, "environ")]

    def find_trainers(self) -> None:
        """Looks for the processes that train, so that a kill need not."""
        members = self.members()
        children = [p.pid for p in members if p.parent == self.pid]
        if self.ranks == 1:
            children = [p.pid for p in members if p.pid == self.pid]
        elif self.starter != "fork":
            children = [pid for pid in children if b"longctx\0train\0" in _read(pid, "cmdline")]
        self._trainers = children

    def kill(self, kind: str, rng: random.Random) -> str:
        """SIGKILL to a random rank, the launcher or all; the kind that it came to."""
        if not self._trainers:
            self.find_trainers()
        if kind == "rank" and not self._trainers:
            kind = "launcher"
        targets = {"rank": self._trainers, "launcher": [self.pid]}
        if kind != "all":
            _kill(rng.choice(targets[kind]))
            return kind
        for pid in sorted({self.pid, *self._trainers}, key=lambda _: rng.random()):
            _kill(pid)
        while members := self.members():
            for process in members:
                _kill(process.pid)
        return kind


def forked(work: Callable[[], int], console: Path) -> int:
    """The exit code of a function in a forked process, whose output goes to a file."""
    return os.waitstatus_to_exitcode(os.waitpid(_fork(console, work), 0)[1])


def _fork(console: Path, work: Callable[[], int]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)  # first of all: else the child of a threaded parent hangs
        os.setsid()
        signal_when_parent_dies(signal.SIGKILL)
        output = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
        code = work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _launch(ranks: int, argv: list[str]) -> int:
    """Does what torchrun does: starts the ranks and ends them all soon after one has failed."""
    if ranks == 1:
        return main(argv)
    os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", LAUNCHER: str(os.getpid())}
    children = {_fork_rank(rank, argv) for rank in range(ranks)}
    code, deadline = 0, float("inf")
    while children:
        done, status = os.waitpid(-1, os.WNOHANG)
        if done:
            children.discard(done)
            code = code or os.waitstatus_to_exitcode(status)
            if code:
                deadline = min(deadline, time.monotonic() + SECONDS_FOR_OTHERS)
        elif time.monotonic() > deadline:
            for child in children:
                _kill(child)
        else:
            time.sleep(0.01)
    return code % 256


def _fork_rank(rank: int, argv: list[str]) -> int:
    child = os.fork()
    if child:
        return child
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    code = 1
    try:
        code = main(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _processes() -> list[Process]:
    """Every process that is no zombie."""
    found = []
    for folder in os.listdir("/proc"):
        if not folder.isdigit():
            continue
        try:
            fields = Path("/proc", folder, "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] not in "ZX":
            found.append(Process(int(folder), int(fields[1]), int(fields[3])))
    return found


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
