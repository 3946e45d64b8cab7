"""What faults cost a step of `tiny`: python docs/results/fault_overhead.py [PAIRS].

Steps with and without guard, watchdog, norm of the update and replica check alternate in one
process. Where other work makes times vary by more than a percent, the CPU time of the machinery
inside those steps says more.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from longctx.data import build_loaders
from longctx.model.decoder import Decoder, initialise
from longctx.parallel.update_norm import UpdateNorm
from longctx.sequence.ledger import Ledger
from longctx.sequence.local import LocalView
from longctx.train.guard import FaultsConfig, Guard
from longctx.train.optim import build_optimizer
from longctx.train.replicas import check_replicas
from longctx.train.settings import load_settings
from longctx.train.signals import StopRequest
from longctx.train.watchdog import Watchdog

CHECK_EVERY = 100


class Run:
    """A model of `tiny` with its data, optimizer and fault machinery."""

    def __init__(self) -> None:
        self.settings = load_settings("tiny")
        train = self.settings.train
        loaders = build_loaders(self.settings.data, train.seq_len, train.batch_size, 0)
        self.loader = loaders.train
        self.model = Decoder(self.settings.model, loaders.vocab_size)
        initialise(self.model, 0)
        self.optimizer = build_optimizer(self.model, self.settings.optim)
        self.guard = Guard(FaultsConfig())
        parameters = list(self.model.parameters())
        self.norm = UpdateNorm(parameters, [1.0] * len(parameters))
        self.spent: list[float] = []

    def step(self, number: int, dog: Watchdog | None) -> tuple[float, float]:
        """Wall and CPU seconds of a step, with the machinery if there is a watchdog."""
        wall, cpu = time.perf_counter(), time.thread_time()
        spent = self.timed(lambda: dog and dog.beat(number))
        batch = self.loader.batch(number)
        view = LocalView(batch.documents, self.settings.train.seq_len, torch.device("cpu"))
        view = view.keyed(0, number, batch.sequence_ids)
        losses = self.model(batch.tokens_BT, batch.labels_BT, view)
        loss = losses.cross_entropy / batch.labels_BT.numel()
        (loss + sum(losses.mixers.values())).backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        figures = {"loss": loss.item(), "grad_norm": grad_norm.item()}
        if dog:
            spent += self.timed(lambda: self.guard.judge(number, figures))
            spent += self.timed(self.norm.before)
        self.optimizer.step()
        if dog:
            self.spent.append(spent + self.timed(lambda: self.norm.squared().sqrt().item()))
        self.optimizer.zero_grad()
        return time.perf_counter() - wall, time.thread_time() - cpu

    def pair(self, number: int, dog: Watchdog) -> list[tuple[float, float]]:
        """Times of the same batch without and with the machinery; each is first in turn."""
        order = (None, dog) if number % 2 else (dog, None)
        times = {is_guarded: self.step(number, is_guarded) for is_guarded in order}
        return [times[None], times[dog]]

    def timed(self, action: Callable[[], object]) -> float:
        """CPU seconds of a call."""
        started = time.thread_time()
        action()
        return time.thread_time() - started

    def check(self) -> float:
        """CPU seconds of comparing the weights of this process with themselves."""
        weights = dict(self.model.named_parameters())
        return self.timed(lambda: check_replicas(weights, lambda x: [x, x], [range(2)]))


def main(pairs: int) -> None:
    """Prints the medians and their ratios."""
    torch.set_num_threads(1)
    run, mesh = Run(), SimpleNamespace(rank=0, size=1, ledger=Ledger())
    with tempfile.TemporaryDirectory() as folder:
        dog = Watchdog(FaultsConfig(), Path(folder), mesh, StopRequest())
        with dog:
            for number in range(5):
                run.step(number, dog)
            timed = [run.pair(number, dog) for number in range(pairs)]
    check = statistics.median(run.check() for _ in range(9)) / CHECK_EVERY
    inside = statistics.median(run.spent) + check
    step = statistics.median(without[1] for without, _ in timed)
    print(
        f"the machinery inside a step: {1e6 * inside:.0f} us of CPU time, {inside / step:.3%} of it"
    )
    for i, name in enumerate(("wall clock", "CPU time")):
        plain = statistics.median(without[i] for without, _ in timed)
        guarded = statistics.median(with_faults[i] for _, with_faults in timed) + check
        print(
            f"{name}: {1e3 * plain:.2f} ms a step without, {1e3 * guarded:.2f} ms with, "
            f"ratio {guarded / plain:.4f}"
        )


main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
