"""Real ranks for tests: forked processes joined by gloo.

Forking and connecting costs more than most cases, so hand one group a list of cases.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

FORK = multiprocessing.get_context("fork")
SECONDS_FOR_OTHERS = 3.0
"""How long the others may take to end once one rank has failed."""
KILLED = "still running after another rank failed; killed"


@dataclass
class Outcome:
    """How one rank ended."""

    pid: int
    value: Any = None
    error: str = ""
    """Traceback, or how the process died; empty if it returned."""


def run_gloo(
    ranks: int, work: Callable[..., Any], *arguments: Any, timeout: float = 60
) -> list[Any]:
    """`work(rank, *arguments)` on every rank of a group; the results in order of ranks.

    After `timeout` seconds a child prints the stacks of its threads and ends.
    """
    outcomes = fork_ranks(ranks, work, arguments, timeout=timeout)
    failed = [f"rank {rank}: {o.error}" for rank, o in enumerate(outcomes) if o.error]
    if failed:
        raise AssertionError(f"{len(failed)} of {ranks} ranks failed\n" + "\n".join(failed))
    return [outcome.value for outcome in outcomes]


def fork_ranks(
    ranks: int,
    work: Callable[..., Any],
    arguments: Sequence[Any] = (),
    timeout: float = 60,
    patience: float = SECONDS_FOR_OTHERS,
    doomed: Sequence[int] = (),
) -> list[Outcome]:
    """How every rank ended; whoever goes on for `patience` after a failure is killed.

    Nobody waits for `doomed` ranks: they are killed when all others have ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        started = [
            _fork(rank, ranks, (work, *arguments), (Path(folder), timeout)) for rank in range(ranks)
        ]
        outcomes = [Outcome(process.pid) for process, _ in started]
        try:
            _listen([receiver for _, receiver in started], outcomes, patience, doomed)
        finally:
            _end(started, outcomes)
        for rank, outcome in enumerate(outcomes):
            stacks = _stacks_file(Path(folder), rank)
            if outcome.error and stacks.exists():
                outcome.error += "\n" + stacks.read_text()
    return outcomes


def _fork(rank: int, ranks: int, call: tuple, limits: tuple) -> tuple[Any, Connection]:
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_child, args=(rank, ranks, call, limits, sender), daemon=True)
    process.start()
    sender.close()
    return process, receiver


def _listen(
    receivers: list[Connection], outcomes: list[Outcome], patience: float, doomed: Sequence[int]
) -> None:
    """Takes what the ranks send until all have ended, or one failed `patience` seconds ago."""
    waiting, lost = dict(zip(receivers, outcomes)), {receivers[rank] for rank in doomed}
    deadline = None
    while waiting:
        left = None if deadline is None else deadline - time.monotonic()
        has_time = waiting.keys() - lost and (left is None or left > 0)
        ready = wait(list(waiting), left) if has_time else []
        if not ready:
            for outcome in waiting.values():
                outcome.error = KILLED
            return
        for receiver in ready:
            outcome = waiting.pop(receiver)
            try:
                outcome.value, outcome.error = pickle.loads(receiver.recv_bytes())
            except EOFError:
                outcome.error = "ended without a result"
            if outcome.error and deadline is None:
                deadline = time.monotonic() + patience


def _end(started: list[tuple[Any, Connection]], outcomes: list[Outcome]) -> None:
    for (process, receiver), outcome in zip(started, outcomes):
        process.join(0 if outcome.error == KILLED else SECONDS_FOR_OTHERS)
        if process.is_alive():
            process.kill()
            process.join()
        if process.exitcode and not outcome.error:
            outcome.error = "returned, then failed to leave its group"
        if process.exitcode and outcome.error:
            outcome.error += f" (exit code {process.exitcode})"
        receiver.close()
        process.close()


def _stacks_file(folder: Path, rank: int) -> Path:
    return folder / f"stacks-of-rank-{rank}"


def _child(rank: int, ranks: int, call: tuple, limits: tuple, sender: Connection) -> None:
    torch.set_num_threads(1)  # first of all: else the child of a threaded parent hangs
    folder, timeout = limits
    work, *arguments = call
    code = 1
    with open(_stacks_file(folder, rank), "w") as stacks:
        faulthandler.dump_traceback_later(timeout, exit=True, file=stacks)
        try:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(str(folder / "store"), ranks),
                rank=rank,
                world_size=ranks,
                timeout=timedelta(seconds=timeout),
            )
            message = pickle.dumps((work(rank, *arguments), ""))
            dist.barrier()
            dist.destroy_process_group()
            code = 0
        except BaseException:
            message = pickle.dumps((None, traceback.format_exc()))
        with contextlib.suppress(BrokenPipeError):
            sender.send_bytes(message)
        faulthandler.cancel_dump_traceback_later()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads may abort an ordinary exit
