"""What mirrors cost a step, and loss by position an evaluation:
python docs/results/tracking.py [STEPS].

A mirror is on for 10 steps, then off for 10, and so on, in one run; the first two of each ten are
left out, in which the other ten's rows may still be on their way.
"""

import contextlib
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import wandb

from longctx.config import apply_overrides
from longctx.train import evaluate, trainer
from longctx.train.metrics import MetricsLog
from longctx.train.settings import load_settings

BLOCK, LEFT_OUT = 10, 2
SMALL = "--train.seq_len 256 --train.batch_size 2 --eval.every 0 --eval.sequences 8"


def ratios(folder: Path, steps: int, options: str) -> tuple[float, float]:
    """Of the medians of steps with and without mirrors: wall clock, and CPU of the main thread."""
    marks: list[tuple[float, float]] = []
    log_row = MetricsLog.step

    def step(log: MetricsLog, row: dict) -> None:
        mirrors = log._mirrors
        if row["step"] // BLOCK % 2:
            log._mirrors = []
        log_row(log, row)
        log._mirrors = mirrors
        marks.append((time.perf_counter(), time.thread_time()))

    words = f"{SMALL} --train.steps {steps} --run.dir {folder} {options}".split()
    MetricsLog.step = step
    try:
        trainer.train(apply_overrides(load_settings("tiny"), words, "tracking"))
    finally:
        MetricsLog.step = log_row
    spent: dict[bool, list[tuple[float, ...]]] = {True: [], False: []}
    for number, (before, after) in enumerate(zip(marks, marks[1:]), 2):
        if number % BLOCK >= LEFT_OUT and number > BLOCK:
            is_on = not number // BLOCK % 2
            spent[is_on].append(tuple(b - a for a, b in zip(before, after)))
    wall, cpu = (
        statistics.median(x[i] for x in spent[True]) / statistics.median(x[i] for x in spent[False])
        for i in range(2)
    )
    return wall, cpu


@contextlib.contextmanager
def server(listens: bool) -> Iterator[None]:
    """An address of W&B where nobody is, or nobody answers."""
    wandb.teardown()  # it keeps the address that it saw first
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        if listens:
            listener.listen(64)
        os.environ["WANDB_BASE_URL"] = f"http://127.0.0.1:{listener.getsockname()[1]}"
        os.environ["WANDB_API_KEY"] = "a" * 40
        yield
        del os.environ["WANDB_BASE_URL"], os.environ["WANDB_API_KEY"]


def share_of_positions(folder: Path) -> float:
    """Of the time of an evaluation, the part that loss by position takes."""
    spent = {"_sums": 0.0, "evaluate": 0.0}

    def timed(module: Any, name: str) -> None:
        function: Callable = getattr(module, name)

        def run(*arguments: Any) -> Any:
            started = time.thread_time()
            try:
                return function(*arguments)
            finally:
                spent[name] += time.thread_time() - started

        setattr(module, name, run)

    timed(evaluate, "_sums")
    timed(trainer, "evaluate")
    words = f"{SMALL} --train.steps 6 --eval.every 1 --run.dir {folder}".split()
    trainer.train(apply_overrides(load_settings("tiny"), words, "tracking"))
    return spent["_sums"] / spent["evaluate"]


def main(steps: int) -> None:
    """Prints a line for each."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder, lines = Path(name), []
        for label, options in (("no mirror", ""), ("TensorBoard", "--log.tensorboard true")):
            lines.append((label, ratios(folder / label.replace(" ", "-"), steps, options)))
        lines.append(("W&B offline", ratios(folder / "off", steps, "--log.wandb offline")))
        for label in ("dead", "hung"):
            with server(label == "hung"):
                found = ratios(folder / label, steps, "--log.wandb online")
            lines.append((f"W&B online, {label} server", found))
        for label, (wall, cpu) in lines:
            print(f"{label}: wall clock {wall:.3f}, CPU of the main thread {cpu:.3f}")
        print(f"loss by position: {share_of_positions(folder / 'eval'):.2%} of an evaluation")


main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
