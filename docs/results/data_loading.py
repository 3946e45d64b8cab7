"""Reading batches beside training `tiny`: python docs/results/data_loading.py [ROUNDS].

Rounds of reading and rounds of training steps alternate in one process, so other work on the
machine disturbs both. CPU seconds are those of the thread that reads or trains.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from longctx.data import DataConfig, Loader, Prefetch, build_loaders
from longctx.data.tokenize import TokenizeConfig, tokenize
from longctx.model.decoder import Decoder, initialise
from longctx.sequence.local import LocalView
from longctx.train.optim import build_optimizer
from longctx.train.settings import load_settings

READ_STEPS, TRAIN_STEPS = 100, 4


class Run:
    """A model of `tiny` and its optimizer."""

    def __init__(self, vocab_size: int) -> None:
        self.settings = load_settings("tiny")
        self.model = Decoder(self.settings.model, vocab_size)
        initialise(self.model, 0)
        self.optimizer = build_optimizer(self.model, self.settings.optim)

    def train(self, batches: Prefetch) -> None:
        """Some steps."""
        for _ in range(TRAIN_STEPS):
            batch = batches.next()
            view = LocalView(batch.documents, self.settings.train.seq_len, torch.device("cpu"))
            view = view.keyed(0, 0, batch.sequence_ids)
            losses = self.model(batch.tokens_BT, batch.labels_BT, view)
            loss = losses.cross_entropy / batch.labels_BT.numel()
            (loss + sum(losses.mixers.values())).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()


def timed(action: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.thread_time()
    action()
    return time.perf_counter() - wall, time.thread_time() - cpu


def read(loader: Loader, first: int) -> None:
    """What a process of its own does for some steps, but for the model."""
    for step in range(first, first + READ_STEPS):
        loader.num_valid(loader.ids(step))
        loader.batch(step)


def main(rounds: int) -> None:
    """Prints tokens a second, their ratios, and the share of steps that waits for data."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        tokens = str(Path(scratch) / "tokens")
        tokenize("", TokenizeConfig(output=tokens))
        configs = {
            "in memory, concat": DataConfig(),
            "in memory, best_fit": DataConfig(packing="best_fit"),
            "folder of tokens, concat": DataConfig(tokens),
            "folder of tokens, best_fit": DataConfig(tokens, packing="best_fit"),
        }
        train = load_settings("tiny").train
        every = {
            name: build_loaders(config, train.seq_len, train.batch_size, seed=0)
            for name, config in configs.items()
        }
        compare({name: loaders.train for name, loaders in every.items()}, Run(258), rounds)


def compare(loaders: dict[str, Loader], run: Run, rounds: int) -> None:
    """Rounds of reading, and of training with data that are read ahead and that are not."""
    train, loader = run.settings.train, next(iter(loaders.values()))
    schedule = [loader.ids(step) for step in range(TRAIN_STEPS * (rounds + 1))]
    segments = [(0, train.seq_len)]
    ahead = {n: Prefetch(loader, schedule, segments, n) for n in (0, 2)}
    steps: dict[int, list[tuple[float, float]]] = {n: [] for n in ahead}
    waits: dict[int, list[float]] = {n: [] for n in ahead}
    reads: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
    for number in range(rounds + 1):
        for name, each in loaders.items():
            reads[name].append(timed(partial(read, each, number * READ_STEPS)))
        for n, batches in ahead.items():
            batches.take_waited()
            steps[n].append(timed(partial(run.train, batches)))
            waits[n].append(batches.take_waited())
    size = train.batch_size * train.seq_len
    trained = [
        size * TRAIN_STEPS / statistics.median(pair[i] for pair in steps[2][1:]) for i in (0, 1)
    ]
    print(f"tiny trains at {trained[0]:,.0f} tokens/s ({trained[1]:,.0f} a CPU second)")
    for name, pairs in reads.items():
        rates = [
            size * READ_STEPS / statistics.median(pair[i] for pair in pairs[1:]) for i in (0, 1)
        ]
        print(
            f"{name}: {rates[0]:,.0f} tokens/s ({rates[1]:,.0f} a CPU second), "
            f"{rates[0] / trained[0]:,.0f} (CPU {rates[1] / trained[1]:,.0f}) times as many"
        )
    for n in ahead:
        shares = [wait / step[0] for wait, step in zip(waits[n][1:], steps[n][1:])]
        print(
            f"{n} micro-batches ahead: {statistics.median(shares):.4%} of a step waits for data, "
            f"at most {max(shares):.4%}"
        )


main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
