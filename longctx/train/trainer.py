"""The training loop."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from longctx.config import to_dict
from longctx.data import Loader, Loaders, build_loaders
from longctx.errors import InputError
from longctx.model.cache import cache_bytes
from longctx.model.decoder import Decoder, Losses, initialise
from longctx.parallel import Mesh, Split, resolve, world_size
from longctx.train import checkpoint
from longctx.train.curves import draw_loss
from longctx.train.environment import describe
from longctx.train.hardware import keep_freed_memory, peak_flops, peak_memory_bytes
from longctx.train.metrics import MetricsLog, SilentLog, write_json
from longctx.train.optim import build_optimizer, clip_gradients, learning_rate
from longctx.train.run_directory import SUMMARY_FILE, open_run, write_config
from longctx.train.settings import DTYPES, Settings
from longctx.train.signals import StopRequest
from longctx.train.sums import Sums, on_host


def train(settings: Settings) -> str:
    """Trains, or goes on with, the run of these settings; the signal that stopped it, or ""."""
    device, split, loaders, resumed = prepare(settings, world_size())
    if device.type == "cpu":
        keep_freed_memory()
    mesh = Mesh(split, device, settings.parallel.timeout_seconds)
    trainer = Trainer(settings, loaders, mesh)
    if resumed:
        trainer.load(resumed)
    elif settings.run.init_from:
        checkpoint.load_model(checkpoint.resolve(settings.run.init_from), trainer.model)
    if mesh.rank == 0:
        write_config(settings)
    stopped_by = trainer.run()
    mesh.close()
    return stopped_by


class Prepared(NamedTuple):
    """What is known before processes speak to each other."""

    device: torch.device
    split: Split
    loaders: Loaders
    resumed: Path | None


def prepare(settings: Settings, processes: int) -> Prepared:
    """Refuses what cannot run on this many processes, before anything is written or sent."""
    config = settings.train
    device = config.resolve_device()
    _check_backends(settings, device)
    split = resolve(settings.parallel, settings.model.layers, processes, config.seq_len)
    if config.batch_size % split.dp:
        raise InputError(
            f"train.batch_size = {config.batch_size} is not a multiple of the {split.dp} replicas "
            "(processes / parallel.sp)"
        )
    loaders = build_loaders(settings.data, config.seq_len, config.batch_size, settings.run.seed)
    return Prepared(device, split, loaders, open_run(settings, loaders.fingerprint))


def _check_backends(settings: Settings, device: torch.device) -> None:
    for letter, mixer in settings.model.mixers.items():
        try:
            mixer.on(settings.model.backend).check_device(device)
        except ValueError as error:
            raise InputError(f"model.mixers.{letter}: {error}") from None


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Trainer:
    """Model, optimizer and progress of one run, on one of its processes."""

    def __init__(self, settings: Settings, loaders: Loaders, mesh: Mesh):
        self.settings, self.loaders, self.mesh, self.device = settings, loaders, mesh, mesh.device
        self.precision = settings.train.resolve_precision(self.device)
        self.model = Decoder(settings.model, loaders.vocab_size)
        initialise(self.model, settings.run.seed)
        self.model.to(self.device, torch.float64 if self.precision == "fp64" else torch.float32)
        self.optimizer = build_optimizer(self.model, settings.optim)
        self.segments = mesh.segments(settings.train.seq_len)
        self.progress = Progress()
        self.peak_flops, self.peak_source = peak_flops(self.device, DTYPES[self.precision])

    def run(self) -> str:
        """Steps until the end, `stop_after` or a signal; every way out leaves a checkpoint."""
        settings, progress = self.settings, self.progress
        last = min(settings.train.stop_after or math.inf, settings.train.steps)
        every = settings.checkpoint.every
        log, stopped, saved = self._open_log(), False, progress.step
        try:
            with StopRequest() as stop:
                while progress.step < last and not stopped:
                    row, stopped = self.step(stop)
                    log.step(row)
                    if every and progress.step % every == 0:
                        self.save()
                        saved = progress.step
                if saved != progress.step:
                    self.save()
            if stopped:
                signal = stop.requested or "a signal to another process"
                log.warn(f"{signal}: saved step {progress.step}; the same command resumes")
                return signal
            self._conclude(log)
            return ""
        finally:
            log.close()

    def step(self, stop: StopRequest) -> tuple[dict[str, Any], bool]:
        """One optimizer step: its metrics, and whether any process was asked to stop."""
        config, progress, mesh = self.settings.train, self.progress, self.mesh
        started = time.perf_counter()
        mesh.ledger.clear()
        loader = self.loaders.train
        ids = loader.ids(progress.step)
        valid = max(1, loader.num_valid(ids))
        rows = len(ids) // mesh.split.dp
        mine = ids[mesh.dp_rank * rows : (mesh.dp_rank + 1) * rows]
        sums = Sums()
        self.model.train()
        for micro in _chunks(mine, config.micro_batch or rows):
            losses, flops = self._forward(loader, micro)
            share = len(micro) / len(ids) / mesh.split.sp
            terms = {"loss": losses.cross_entropy / valid}
            terms |= {f"{name}_loss": loss * share for name, loss in losses.mixers.items()}
            sum(terms.values()).backward()
            sums.add(terms | {"flops": torch.tensor(float(flops))})
            sums.add(losses.statistics)
        mesh.sum_gradients(self.model)
        grad_norm = clip_gradients(self.model, self.settings.optim)
        progress.step += 1
        lr = learning_rate(self.settings.optim, progress.step, config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        sums.add({"stop": torch.tensor(float(bool(stop.requested)))})
        totals = sums.over_processes(mesh)
        statistics = {name: totals.pop(name) for name in losses.statistics}
        totals |= self.model.adapt(statistics, config.batch_size * config.seq_len)
        figures = on_host(totals | {"grad_norm": grad_norm}) | {"lr": lr}
        stopped = figures.pop("stop") > 0
        return self._metrics(figures, time.perf_counter() - started), stopped

    def _metrics(self, figures: dict[str, Any], seconds: float) -> dict[str, Any]:
        progress, config = self.progress, self.settings.train
        every, traffic = self.settings.eval.every, self.mesh.ledger.total()
        tokens = config.batch_size * config.seq_len
        progress.tokens += tokens
        progress.seconds += seconds
        rate = 3 * figures.pop("flops") / seconds
        row = {
            "step": progress.step,
            "tokens": progress.tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": rate / (self.peak_flops * self.mesh.size),
            "peak_memory_bytes": peak_memory_bytes(self.device),
            "exchange_bytes": traffic.received,
            "exchange_calls": traffic.calls,
        }
        row |= figures
        if progress.step == config.steps or (every and progress.step % every == 0):
            row |= self.evaluate()
        return row

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Over the labels of the held-out sequences: the mean loss in nats, and the share that is
        the most likely token."""
        self.model.eval()
        mesh, config, loader = self.mesh, self.settings.train, self.loaders.validation
        ids = range(self.settings.eval.sequences)
        total = torch.zeros(2, dtype=torch.float64)
        mine = ids[mesh.dp_rank :: mesh.split.dp]
        for micro in _chunks(mine, config.micro_batch or config.batch_size // mesh.split.dp):
            losses = self._forward(loader, micro)[0]
            total += torch.stack((losses.cross_entropy.double(), losses.correct.double())).cpu()
        total = mesh.sum(total.to(self.device), "evaluation") / max(1, loader.num_valid(ids))
        return dict(zip(("val_loss", "val_accuracy"), total.tolist()))

    def _forward(self, loader: Loader, ids: Sequence[int]) -> tuple[Losses, int]:
        """This process's share of the losses of sequences, and the FLOPs of computing it."""
        settings, device = self.settings, self.device
        batch = loader.read(ids, self.segments)
        view = self.mesh.view(batch.documents, settings.train.seq_len)
        view = view.keyed(settings.run.seed, self.progress.step, batch.sequence_ids)
        autocast: Any = contextlib.nullcontext()
        if self.precision == "bf16":
            autocast = torch.autocast(device.type, torch.bfloat16)
        with autocast:
            losses = self.model(batch.tokens_BT.to(device), batch.labels_BT.to(device), view)
        return losses, sum(self.model.flops(view.positions_BT.flatten() + 1).values())

    def save(self) -> None:
        """Writes a checkpoint and removes old ones; one process does it for all."""
        if self.mesh.rank:
            return
        folder, progress = self.settings.run.path, self.progress
        state = {
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "data_fingerprint": self.loaders.fingerprint,
            "vocab_size": self.loaders.vocab_size,
            "config": to_dict(self.settings),
        }
        checkpoint.save(folder, progress.step, self.model, self.optimizer, state)
        checkpoint.prune(folder, self.settings.checkpoint.keep)

    def load(self, path: Path) -> None:
        """Goes back to a checkpoint: weights, optimizer, random state and place in the data."""
        state = checkpoint.load_state(path)
        checkpoint.load_model(path, self.model)
        checkpoint.load_optimizer(path, self.model, self.optimizer)
        checkpoint.load_random(path)
        self.progress = Progress(state["step"], state["tokens"], state["seconds"])

    def _open_log(self) -> MetricsLog | SilentLog:
        """The log, with a first line on what this run is."""
        settings, split = self.settings, self.mesh.split
        if self.mesh.rank:
            return SilentLog()
        folder, config = settings.run.path, settings.train
        resolved = to_dict(settings)
        log = MetricsLog(folder, settings.log, settings.run.name, resolved, self.progress.step)
        write_json(folder / "environment.json", describe() | {"parallel": asdict(split)})
        log.info(
            f"{folder}: {self.model.num_parameters():,} parameters, {config.steps} steps of "
            f"{config.batch_size} x {config.seq_len} tokens, {self.precision} on "
            f"{self.device.type}; MFU against {self.peak_flops / 1e9:,.0f} GFLOP/s a process "
            f"({self.peak_source})"
        )
        if self.mesh.size > 1:
            way = split.transports
            log.info(
                f"{self.mesh.size} processes: dp {split.dp} x sp {split.sp}, {split.placement}, "
                f"prefix {way.prefix}, stream {way.stream}, heads {way.heads}"
            )
        if self.progress.step:
            log.info(f"resumed at step {self.progress.step}")
        return log

    @torch.no_grad()
    def _cache_bytes_per_token(self) -> float | None:
        """What generation remembers of a whole sequence; not asked of one that is split."""
        if self.mesh.split.sp > 1:
            return None
        tokens_BT = self.loaders.validation.batch(0).tokens_BT[:1].to(self.device)
        cached = cache_bytes(self.model.eval(), tokens_BT)
        return cached / tokens_BT.shape[1] if cached is not None else None

    def _conclude(self, log: MetricsLog | SilentLog) -> None:
        """Writes the summary and the picture."""
        folder, progress = self.settings.run.path, self.progress
        results = self.evaluate()
        if self.mesh.rank:
            return
        entropy = self.loaders.unigram_entropy
        summary = {
            "step": progress.step,
            **results,
            "unigram_entropy": entropy,
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
            "parameters": self.model.num_parameters(),
            "cache_bytes_per_token": self._cache_bytes_per_token(),
            "precision": self.precision,
            "device": self.device.type,
            "processes": self.mesh.size,
        }
        write_json(folder / SUMMARY_FILE, summary)
        draw_loss(folder, entropy)
        log.info(
            f"validation loss {results['val_loss']:.4f} nats a label, accuracy "
            f"{results['val_accuracy']:.4f}; unigram entropy of the held-out labels {entropy:.4f}; "
            f"results in {folder}"
        )


def _chunks(ids: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (ids[i : i + size] for i in range(0, len(ids), size))
