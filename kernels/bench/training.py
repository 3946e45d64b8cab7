"""Times the training step of the packaged preset `tiny`."""

import torch
from report import Section, table
from sizes import Sizes
from timing import interleave, note

from longctx.config import apply_overrides
from longctx.data import build_loaders
from longctx.train.settings import Settings, load_settings
from longctx.train.trainer import Trainer


def tiny(sizes: Sizes) -> Settings:
    """The preset, on the CPU, without evaluations between steps."""
    options = ("--train.device", "cpu", "--eval.every", "0", *sizes.train_options)
    return apply_overrides(load_settings("tiny"), options, "cpu.py")


def time_training(settings: Settings, sizes: Sizes) -> Section:
    """Seconds and tokens per second of a step: data, forward, backward and optimizer."""
    train = settings.train
    loaders = build_loaders(settings.data, train.seq_len, train.batch_size, settings.run.seed)
    trainer = Trainer(settings, loaders, torch.device("cpu"))
    timings = interleave({"step": trainer.step}, sizes.train_steps)
    seconds, tokens = timings["step"].seconds, train.seq_len * train.batch_size
    row = [
        "tiny",
        f"{trainer.model.num_parameters():,}",
        f"{train.batch_size} x {train.seq_len}",
        f"{seconds * 1e3:.0f}",
        f"{tokens / seconds:,.0f}",
    ]
    header = ["preset", "parameters", "batch", "ms per step", "tokens/s"]
    return Section(
        "Training step: data, forward, backward, optimizer",
        [table(header, [row]), note(timings)],
    )
