"""What a run says at its beginning and writes at its end."""

from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from longctx.config import to_dict
from longctx.model.cache import cache_bytes
from longctx.train.curves import draw_loss
from longctx.train.environment import describe, write_changes
from longctx.train.metrics import MetricsLog, SilentLog, write_json
from longctx.train.run_directory import SUMMARY_FILE

if TYPE_CHECKING:
    from longctx.train.trainer import Trainer


def open_log(trainer: "Trainer") -> MetricsLog | SilentLog:
    """The log, with a first line on what this run is."""
    settings, mesh, step = trainer.settings, trainer.mesh, trainer.progress.step
    split = mesh.split
    if mesh.rank:
        return SilentLog()
    folder, config = settings.run.path, settings.train
    log = MetricsLog(folder, settings.log, settings.run.name, to_dict(settings), step)
    write_json(folder / "environment.json", describe() | {"parallel": asdict(split)})
    write_changes(folder)
    log.info(
        f"{folder}: {trainer.num_parameters:,} parameters, {config.steps} steps of "
        f"{config.batch_size} x {config.seq_len} tokens, {trainer.precision} on "
        f"{mesh.device.type}, {settings.memory}; MFU against {trainer.peak_flops / 1e9:,.0f} "
        f"GFLOP/s a process ({trainer.peak_source})"
    )
    if mesh.size > 1:
        log.info(f"{mesh.size} processes: {split}")
    if trainer.loaders.skipped:
        log.warn(f"data.bad_rows: {trainer.loaders.skipped:,} rows without text were left out")
    if step:
        log.info(f"resumed at step {step}")
    return log


def conclude(trainer: "Trainer", log: MetricsLog | SilentLog) -> None:
    """Writes the summary and the picture."""
    settings, progress, mesh = trainer.settings, trainer.progress, trainer.mesh
    results, cached = trainer.evaluate(), _cache_bytes_per_token(trainer)
    if mesh.rank:
        return
    folder, entropy = settings.run.path, trainer.loaders.unigram_entropy
    summary = {
        "step": progress.step,
        **results,
        "unigram_entropy": entropy,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "flops": progress.flops,
        "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
        "skipped": trainer.guard.skipped,
        "parameters": trainer.num_parameters,
        "cache_bytes_per_token": cached,
        "precision": trainer.precision,
        "device": mesh.device.type,
        "processes": mesh.size,
    }
    write_json(folder / SUMMARY_FILE, summary)
    draw_loss(folder, entropy)
    log.info(
        f"validation loss {results['val_loss']:.4f} nats a label, accuracy "
        f"{results['val_accuracy']:.4f}; unigram entropy of the held-out labels {entropy:.4f}; "
        f"results in {folder}"
    )


@torch.no_grad()
def _cache_bytes_per_token(trainer: "Trainer") -> float | None:
    """What generation remembers of a whole sequence; not asked of a model that is spread."""
    split = trainer.mesh.split
    if split.sp > 1 or split.tp > 1 or split.engine != "none":
        return None
    tokens_BT = trainer.loaders.validation.batch(0).tokens_BT[:1].to(trainer.mesh.device)
    cached = cache_bytes(trainer.model.eval(), tokens_BT)
    return cached / tokens_BT.shape[1] if cached is not None else None
