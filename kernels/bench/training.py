"""Times the training step of the packaged preset `tiny`."""

import tempfile

from report import Section, table
from sizes import Sizes
from timing import interleave, note

from longctx.config import apply_overrides
from longctx.parallel import Mesh
from longctx.train.settings import Settings, load_settings
from longctx.train.trainer import Trainer, prepare


def tiny(sizes: Sizes) -> Settings:
    """The preset, on the CPU, without evaluations between steps."""
    options = ("--train.device", "cpu", "--eval.every", "0", *sizes.train_options)
    return apply_overrides(load_settings("tiny"), options, "cpu.py")


def time_training(settings: Settings, sizes: Sizes) -> Section:
    """Seconds and tokens per second of a step: data, forward, backward and optimizer."""
    trainer = _trainer(settings)
    timings = interleave({"step": trainer.step}, sizes.train_steps)
    seconds = timings["step"].seconds
    tokens = settings.train.seq_len * settings.train.batch_size
    row = [
        "tiny",
        f"{trainer.model.num_parameters():,}",
        f"{settings.train.batch_size} x {settings.train.seq_len}",
        f"{seconds * 1e3:.0f}",
        f"{tokens / seconds:,.0f}",
    ]
    header = ["preset", "parameters", "batch", "ms per step", "tokens/s"]
    return Section(
        "Training step: data, forward, backward, optimizer",
        [table(header, [row]), note(timings)],
    )


def _trainer(settings: Settings) -> Trainer:
    """A fresh run; only its steps are taken, so its folder is not needed any more."""
    with tempfile.TemporaryDirectory() as folder:
        settings = apply_overrides(settings, ["--run.dir", f"{folder}/run"], "cpu.py")
        device, split, loaders, _ = prepare(settings, processes=1)
    return Trainer(settings, loaders, Mesh(split, device, settings.parallel.timeout_seconds))
