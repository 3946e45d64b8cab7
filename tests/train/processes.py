"""Runs a training on several forked processes, as a launcher would start them."""

import faulthandler
import os
import sys
import time
from collections.abc import Callable

import torch

from longctx.launch.ports import free_port
from longctx.train.settings import Settings
from longctx.train.trainer import train


def start(
    ranks: int, settings: Settings, before: Callable[[int], None] = lambda rank: None
) -> list[int]:
    """Forks `ranks` processes that train; their process numbers."""

    def work(rank: int) -> int:
        before(rank)
        return 75 if train(settings) else 0

    return start_work(ranks, work)


def start_work(ranks: int, work: Callable[[int], int | None]) -> list[int]:
    """Forks `ranks` processes that do this work, whose result is their exit code."""
    port, children = free_port(), []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            _work_and_leave(rank, ranks, port, work)
        children.append(child)
    return children


def _work_and_leave(rank, ranks, port, work) -> None:
    code = 1
    try:
        torch.set_num_threads(1)
        faulthandler.dump_traceback_later(60, exit=True)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        code = work(rank) or 0
    except BaseException as error:
        sys.stderr.write(f"rank {rank}: {type(error).__name__}: {error}\n")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def exit_codes(children: list[int], seconds: float = 60) -> list[int]:
    """Waits for processes; a minus sign before the signal that ended one."""
    codes, deadline = [], time.monotonic() + seconds
    for child in children:
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes.append(os.waitstatus_to_exitcode(status))
                break
            time.sleep(0.02)
        else:
            os.kill(child, 9)
            os.waitpid(child, 0)
            raise TimeoutError(f"process {child} did not end within {seconds} s; others: {codes}")
    return codes


def run(ranks: int, settings: Settings) -> None:
    """Trains on `ranks` processes to the end."""
    assert exit_codes(start(ranks, settings)) == [0] * ranks


def run_work(ranks: int, work: Callable[[int], int | None]) -> None:
    """Does this work on `ranks` processes, which must all succeed."""
    assert exit_codes(start_work(ranks, work)) == [0] * ranks
