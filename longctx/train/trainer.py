"""The training loop."""

import contextlib
import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from longctx.config import to_dict
from longctx.data import Batch, Loader, Loaders, build_loaders, num_valid, split
from longctx.model.decoder import Decoder, Losses, initialise
from longctx.sequence.view import LocalView
from longctx.train import checkpoint
from longctx.train.curves import draw_loss
from longctx.train.environment import describe
from longctx.train.hardware import peak_flops, peak_memory_bytes
from longctx.train.metrics import MetricsLog, write_json
from longctx.train.optim import build_optimizer, clip_gradients, learning_rate
from longctx.train.run_directory import open_run, write_config
from longctx.train.settings import DTYPES, Settings
from longctx.train.signals import StopRequest


def train(settings: Settings) -> str:
    """Trains, or goes on with, the run of these settings; the signal that stopped it, or ""."""
    device = settings.train.resolve_device()
    loaders = build_loaders(
        settings.data, settings.train.seq_len, settings.train.batch_size, settings.run.seed
    )
    resumed = open_run(settings, loaders.fingerprint)
    trainer = Trainer(settings, loaders, device)
    if resumed:
        trainer.load(resumed)
    elif settings.run.init_from:
        checkpoint.load_model(checkpoint.resolve(settings.run.init_from), trainer.model)
    write_config(settings)
    return trainer.run()


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Trainer:
    """Model, optimizer and progress of one run."""

    def __init__(self, settings: Settings, loaders: Loaders, device: torch.device):
        self.settings, self.loaders, self.device = settings, loaders, device
        self.precision = settings.train.resolve_precision(device)
        self.model = Decoder(settings.model, loaders.vocab_size)
        initialise(self.model, settings.run.seed)
        self.model.to(device, torch.float64 if self.precision == "fp64" else torch.float32)
        self.optimizer = build_optimizer(self.model, settings.optim)
        self.progress = Progress()
        self.peak_flops, self.peak_source = peak_flops(device, DTYPES[self.precision])

    def run(self) -> str:
        """Steps until the end, `stop_after` or a signal; every way out leaves a checkpoint."""
        settings, progress = self.settings, self.progress
        last = min(settings.train.stop_after or math.inf, settings.train.steps)
        folder = settings.run.path
        resolved = to_dict(settings)
        log = MetricsLog(folder, settings.log, settings.run.name, resolved, progress.step)
        try:
            write_json(folder / "environment.json", describe())
            self._introduce(log)
            with StopRequest() as stop:
                saved = progress.step
                while progress.step < last and not stop.requested:
                    log.step(self.step())
                    if settings.checkpoint.every and not progress.step % settings.checkpoint.every:
                        self.save()
                        saved = progress.step
                if saved != progress.step:
                    self.save()
            if stop.requested:
                log.warn(f"{stop.requested}: saved step {progress.step}; the same command resumes")
            else:
                self._conclude(log)
            return stop.requested
        finally:
            log.close()

    def step(self) -> dict[str, Any]:
        """One optimizer step; its metrics."""
        config, progress = self.settings.train, self.progress
        started = time.perf_counter()
        batch = self.loaders.train.batch(progress.step)
        valid, flops = max(1, num_valid(batch)), 0
        sums: dict[str, torch.Tensor] = {}
        self.model.train()
        for micro in split(batch, config.micro_batch or config.batch_size):
            losses, micro_flops = self._forward(micro)
            share = len(micro.sequence_ids) / len(batch.sequence_ids)
            terms = {"loss": losses.cross_entropy / valid}
            terms |= {f"{name}_loss": loss * share for name, loss in losses.mixers.items()}
            sum(terms.values()).backward()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.detach()
            flops += micro_flops
        grad_norm = clip_gradients(self.model, self.settings.optim)
        progress.step += 1
        lr = learning_rate(self.settings.optim, progress.step, config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        figures = {name: value.item() for name, value in sums.items()}
        figures["grad_norm"] = grad_norm.item()
        seconds = time.perf_counter() - started
        return self._metrics(figures, lr, batch.tokens_BT.numel(), seconds, 3 * flops)

    def _metrics(
        self, figures: dict[str, float], lr: float, tokens: int, seconds: float, flops: int
    ) -> dict[str, Any]:
        progress, every = self.progress, self.settings.eval.every
        progress.tokens += tokens
        progress.seconds += seconds
        row = {
            "step": progress.step,
            "tokens": progress.tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": flops / seconds / self.peak_flops,
            "lr": lr,
            "peak_memory_bytes": peak_memory_bytes(self.device),
            "exchange_bytes": 0,
            "exchange_calls": 0,
        }
        row |= figures
        if progress.step == self.settings.train.steps or (every and not progress.step % every):
            row["val_loss"] = self.evaluate(self.loaders.validation)
        return row

    @torch.no_grad()
    def evaluate(self, loader: Loader) -> float:
        """Mean loss over the held-out sequences, in nats a token."""
        self.model.eval()
        total, valid, left = 0.0, 0, self.settings.eval.sequences
        step = 0
        while left > 0:
            micro = next(split(loader.batch(step), left))
            total += self._forward(micro)[0].cross_entropy.item()
            valid += num_valid(micro)
            left -= len(micro.sequence_ids)
            step += 1
        return total / max(1, valid)

    def _forward(self, batch: Batch) -> tuple[Losses, int]:
        """Losses of a batch and the FLOPs of computing them."""
        view = LocalView(batch.documents_BT.to(self.device))
        autocast: Any = contextlib.nullcontext()
        if self.precision == "bf16":
            autocast = torch.autocast(self.device.type, torch.bfloat16)
        with autocast:
            losses = self.model(
                batch.tokens_BT.to(self.device), batch.labels_BT.to(self.device), view
            )
        return losses, sum(self.model.flops(view.positions_BT.flatten() + 1).values())

    def save(self) -> None:
        """Writes a checkpoint and removes old ones."""
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

    def load(self, path) -> None:
        """Goes back to a checkpoint: weights, optimizer, random state and place in the data."""
        state = checkpoint.load_state(path)
        checkpoint.load_model(path, self.model)
        checkpoint.load_optimizer(path, self.model, self.optimizer)
        checkpoint.load_random(path)
        self.progress = Progress(state["step"], state["tokens"], state["seconds"])

    def _introduce(self, log: MetricsLog) -> None:
        train_config = self.settings.train
        log.info(
            f"{self.settings.run.path}: {self.model.num_parameters():,} parameters, "
            f"{train_config.steps} steps of {train_config.batch_size} x {train_config.seq_len} "
            f"tokens, {self.precision} on {self.device.type}; MFU against "
            f"{self.peak_flops / 1e9:,.0f} GFLOP/s ({self.peak_source})"
        )
        if self.progress.step:
            log.info(f"resumed at step {self.progress.step}")

    def _conclude(self, log: MetricsLog) -> None:
        """Writes the summary and the picture."""
        folder, progress = self.settings.run.path, self.progress
        val_loss = self.evaluate(self.loaders.validation)
        entropy = self.loaders.unigram_entropy
        summary = {
            "step": progress.step,
            "val_loss": val_loss,
            "unigram_entropy": entropy,
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
            "parameters": self.model.num_parameters(),
            "precision": self.precision,
            "device": self.device.type,
        }
        write_json(folder / "summary.json", summary)
        draw_loss(folder, entropy)
        log.info(
            f"validation loss {val_loss:.4f} nats a token; "
            f"byte-unigram entropy of the held-out text {entropy:.4f}; results in {folder}"
        )
