"""The training loop."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from longctx.checkpoint import (
    Address,
    Checkpoints,
    latest,
    random_boxes,
)
from longctx.config import to_dict
from longctx.data import Batch, Loaders, Prefetch
from longctx.errors import OutsideError
from longctx.model.decoder import Losses
from longctx.parallel import Mesh, world_size
from longctx.parallel.mesh import is_first_here
from longctx.parallel.variables import record_exchanges
from longctx.train.determinism import (
    make_deterministic,
    naming_nondeterminism,
)
from longctx.train.engines import build_engine
from longctx.train.evaluate import evaluate
from longctx.train.guard import Guard
from longctx.train.hardware import (
    forget_peak_memory,
    keep_freed_memory,
    peak_flops,
    peak_memory_bytes,
)
from longctx.train.metrics import MetricsLog, SilentLog
from longctx.train.optim import learning_rate
from longctx.train.prepare import prepare
from longctx.train.profile import Profiler
from longctx.train.replicas import check_replicas
from longctx.train.reports import conclude, open_log
from longctx.train.router_health import router_health
from longctx.train.run_directory import finished, write_config
from longctx.train.settings import DTYPES, Settings
from longctx.train.signals import StopRequest
from longctx.train.starting import Progress, start
from longctx.train.sums import Sums, on_host
from longctx.train.watchdog import Watchdog


def train(settings: Settings, stop: StopRequest | None = None) -> str:
    """Trains, or goes on with, the run of these settings; the signal that stopped it, or ""."""
    if stop is None:
        with StopRequest() as stop:
            return train(settings, stop)
    device, split, loaders, resumed, initial = prepare(settings, world_size())
    if resumed and finished(settings):
        if is_first_here():
            print(f"{settings.run.path}: finished before, so there is nothing to do", flush=True)
        return ""
    record_exchanges()
    torch.manual_seed(settings.run.seed)
    if settings.train.deterministic:
        make_deterministic()
    if device.type == "cpu":
        keep_freed_memory()
    mesh = Mesh(split, device, settings.parallel.timeout_seconds)
    trainer = Trainer(settings, loaders, mesh, stop)
    start(trainer, resumed, initial)
    if mesh.rank == 0:
        write_config(settings, loaders.tokenizer)
    with naming_nondeterminism(), mesh.told_by_rank():
        stopped_by = trainer.run()
    mesh.close()
    return stopped_by


class Trainer:
    """Model, optimizer and progress of one run, on one of its processes."""

    def __init__(self, settings: Settings, loaders: Loaders, mesh: Mesh, stop: StopRequest):
        self.settings, self.loaders, self.mesh, self.device = settings, loaders, mesh, mesh.device
        self.stop = stop
        self.precision = settings.train.resolve_precision(self.device)
        self.engine = build_engine(settings, loaders.vocab_size, mesh)
        self.model = self.engine.model
        self.crew = mesh.crew()
        self.checkpoints = Checkpoints(settings.checkpoints, settings.checkpoint, self.crew)
        self.segments = mesh.segments(settings.train.seq_len)
        self.progress = Progress()
        self._evaluated: tuple[int, dict[str, Any]] = (-1, {})
        self.guard = Guard(settings.faults, self._last_good)
        self.profiler = Profiler(settings.log, settings.run.path, mesh, self.model)
        self.ranges = mesh.ledger.ranges
        self.num_parameters = self.model.num_parameters()
        self.peak_flops, self.peak_source = peak_flops(self.device, DTYPES[self.precision])

    def run(self) -> str:
        """Steps until the end, `stop_after` or a signal, each of which leaves a checkpoint."""
        settings, progress = self.settings, self.progress
        last = min(settings.train.stop_after or math.inf, settings.train.steps)
        log, stopped, self.saved = open_log(self), False, progress.step
        watchdog = Watchdog(settings.faults, settings.run.path, self.mesh, self.stop)
        ahead = contextlib.closing(self._read_ahead())
        with contextlib.closing(log), ahead, watchdog, self.checkpoints:
            while progress.step < last and not stopped:
                watchdog.beat(progress.step + 1)
                with self.profiler.step(progress.step + 1, log, watchdog):
                    stopped = self._round(log, watchdog)
                if failure := self.checkpoints.failure():
                    log.warn(f"{failure}; training goes on")
            watchdog.beat(progress.step, "last checkpoint")
            if self.saved != progress.step:
                self.save()
            self.checkpoints.wait()
            if stopped:
                signal = self.stop.requested or "a signal to another process"
                log.warn(f"{signal}: saved step {progress.step}; the same command resumes")
                return signal
            watchdog.beat(progress.step, "evaluation")
            conclude(self, log)
            return ""

    def _round(self, log: MetricsLog | SilentLog, watchdog: Watchdog) -> bool:
        """A step, and what is due after it; whether any process was asked to stop."""
        settings, progress = self.settings, self.progress
        row, stopped = self.step(log)
        if self._ends(settings.eval.every) or progress.step == settings.train.steps:
            watchdog.beat(progress.step, "evaluation")
            with self.ranges("evaluation"):
                row |= self.evaluate()
        log.step(row)
        if self._ends(settings.faults.check_replicas_every):
            self._check_replicas()
        if self._ends(settings.checkpoint.every):
            watchdog.beat(progress.step, "checkpoint")
            with self.ranges("checkpoint"):
                self._try_to_save(log)
        return stopped

    def evaluate(self) -> dict[str, Any]:
        """What `evaluate` tells of the weights after the last step, computed once."""
        if self._evaluated[0] != self.progress.step:
            self._evaluated = self.progress.step, evaluate(self)
        return self._evaluated[1]

    def _read_ahead(self) -> Prefetch:
        ahead, pin = self.settings.data.prefetch, self.device.type == "cuda"
        loader = self.loaders.train
        self.batches = Prefetch(loader, self._schedule(), self.segments, ahead, pin)
        return self.batches

    def _ends(self, every: int) -> bool:
        """Whether a round of so many steps, 0 meaning none, has just ended."""
        return bool(every) and self.progress.step % every == 0

    def step(self, log: MetricsLog | SilentLog) -> tuple[dict[str, Any], bool]:
        """One optimizer step: its metrics, and whether any process was asked to stop."""
        config, progress, mesh = self.settings.train, self.progress, self.mesh
        started = time.perf_counter()
        forget_peak_memory(self.device)
        mesh.ledger.clear()
        sums, statistics = Sums(mesh), []
        left_out = self.settings.data.skips(progress.step + 1)
        if not left_out:
            statistics = self._add_gradients(sums)
        sums.flag("stop", bool(self.stop.requested))
        gradient_norm = {} if left_out else {"grad_norm": self.engine.gradient_norm()}
        totals = sums.over_processes()
        measured = {name: totals.pop(name) for name in statistics}
        figures = on_host(totals | gradient_norm)
        progress.step += 1
        lr = learning_rate(self.settings.optim, progress.step, config.steps)
        if left_out:
            log.warn(f"step {progress.step}: left out by data.skip_steps")
        else:
            figures |= self._update(figures, measured, lr, log)
        stopped = figures.pop("stop") > 0
        tokens = 0 if left_out else config.batch_size * config.seq_len
        return self._metrics(figures | {"lr": lr}, tokens, time.perf_counter() - started), stopped

    def _add_gradients(self, sums: Sums) -> list[str]:
        """Runs this process's share of the batch; the names of the routers' statistics."""
        mesh, loader = self.mesh, self.loaders.train
        ids = loader.ids(self.progress.step)
        valid = max(1, loader.num_valid(ids))
        self.model.train()
        for micro in self._micro_batches(ids):
            with self.ranges("data"):
                batch = self.batches.next()
            losses, flops = self.forward(batch)
            share = len(micro) / len(ids) / mesh.split.sp
            terms = {"loss": losses.cross_entropy / valid}
            terms |= {f"{name}_loss": loss * share for name, loss in losses.mixers.items()}
            with self.ranges("backward"):
                self.engine.backward(sum(terms.values()))
            sums.add(terms | {"flops": torch.tensor(float(flops))})
            sums.add(losses.statistics)
        return list(losses.statistics)

    def _micro_batches(self, ids: Sequence[int]) -> list[Sequence[int]]:
        """This process's share of a step's sequences, a forward and backward pass at a time."""
        rows = len(ids) // self.mesh.split.dp
        mine = ids[self.mesh.dp_rank * rows : (self.mesh.dp_rank + 1) * rows]
        size = self.settings.train.micro_batch or rows
        return [mine[i : i + size] for i in range(0, len(mine), size)]

    def _schedule(self) -> Iterator[Sequence[int]]:
        """Micro-batches from the next step on."""
        for step in range(self.progress.step, self.settings.train.steps):
            if not self.settings.data.skips(step + 1):
                yield from self._micro_batches(self.loaders.train.ids(step))

    def _update(
        self,
        figures: dict[str, Any],
        statistics: dict[str, torch.Tensor],
        lr: float,
        log: MetricsLog | SilentLog,
    ) -> dict[str, Any]:
        """Changes the weights unless the step is bad; what else there is to log of it."""
        step, config = self.progress.step, self.settings.train
        verdict = self.guard.judge(step, {name: figures[name] for name in ("loss", "grad_norm")})
        if verdict.reason:
            ids = self.loaders.train.ids(step - 1)
            log.warn(f"step {step}: {verdict.reason} (sequences {ids[0]} to {ids[-1]})")
        if not verdict.apply:
            self.engine.discard()
            return {}
        self.checkpoints.settle()
        with self.ranges("optimizer"):
            told = {"update_norm": self.engine.update(lr)}
        told |= self.model.adapt(statistics, config.batch_size * config.seq_len)
        return router_health(on_host(told))

    def _metrics(self, figures: dict[str, Any], tokens: int, seconds: float) -> dict[str, Any]:
        progress, traffic = self.progress, self.mesh.ledger.total()
        progress.tokens += tokens
        progress.seconds += seconds
        flops = 3 * figures.pop("flops", 0.0)
        progress.flops += flops
        return {
            "step": progress.step,
            "loss": None,  # of a step that is left out
            "grad_norm": None,
            "tokens": progress.tokens,
            "seconds": seconds,
            "data_seconds": self.batches.take_waited(),
            "tokens_per_second": tokens / seconds,
            "flops": progress.flops,
            "mfu": flops / seconds / (self.peak_flops * self.mesh.size),
            "peak_memory_bytes": peak_memory_bytes(self.device),
            "exchange_bytes": traffic.received,
            "exchange_calls": traffic.calls,
            "skipped": self.guard.skipped,
        } | figures

    def forward(self, batch: Batch) -> tuple[Losses, int]:
        """This process's share of the losses of a batch, and the FLOPs of computing it."""
        settings, device = self.settings, self.device
        view = self.mesh.view(batch.documents, settings.train.seq_len)
        view = view.keyed(settings.run.seed, self.progress.step, batch.sequence_ids)
        autocast: Any = contextlib.nullcontext()
        if self.precision == "bf16":
            # A cache would keep the rounded weights of all layers until the end.
            autocast = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
        with autocast, self.ranges("forward"):
            tokens_BT, labels_BT = (
                x.to(device, non_blocking=True) for x in (batch.tokens_BT, batch.labels_BT)
            )
            losses = self.model(tokens_BT, labels_BT, view)
        return losses, sum(self.model.flops(view.positions_BT.flatten() + 1).values())

    def _try_to_save(self, log: MetricsLog | SilentLog) -> None:
        """Returns when all processes are done with a checkpoint, or write it in the background."""
        try:
            self.save()
            self.saved = self.progress.step
        except OutsideError as error:
            log.warn(f"{error}; training goes on")

    def save(self) -> None:
        """Makes a checkpoint of now; on the disk when the file system is done with it."""
        progress = self.progress
        state = {
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "flops": progress.flops,
            "guard": self.guard.state(),
            "data": self.loaders.state(progress.step),
            "data_fingerprint": self.loaders.fingerprint,
            "tokenizer": self.loaders.tokenizer.fingerprint,
            "vocab_size": self.loaders.vocab_size,
            "config": to_dict(self.settings),
        }
        boxes = self.engine.boxes() + random_boxes(self.mesh.rank)
        self.checkpoints.save(progress.step, boxes, state)

    def _last_good(self) -> Address | None:
        """The newest checkpoint, also if it is still being written."""
        with contextlib.suppress(OutsideError):
            self.checkpoints.wait()
        return latest(self.settings.checkpoints)

    def _check_replicas(self) -> None:
        groups = self.engine.replicas()
        parts, mesh = self.engine.weights(), self.mesh
        weights = {name: part.local.to(mesh.device) for name, part in parts.items()}
        check_replicas(weights, mesh.gather, groups)
