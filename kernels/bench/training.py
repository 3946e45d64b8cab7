"""Times the training step of the packaged preset `tiny`, as `longctx train` reports it."""

import contextlib
import io
import json
import tempfile
from pathlib import Path

from report import Section, table
from sizes import Sizes
from timing import ROUNDS_PER_REPEAT, Timing, note, sample

from longctx.config import apply_overrides
from longctx.train.settings import Settings, load_settings
from longctx.train.trainer import train


def tiny(sizes: Sizes) -> Settings:
    """The preset on the CPU, for a few steps without evaluation; the first is not counted."""
    options = ["--train.device", "cpu", "--train.stop_after", str(sizes.train_steps + 1)]
    options += ["--eval.every", "0", "--eval.sequences", "1", *sizes.train_options]
    return apply_overrides(load_settings("tiny"), options, "cpu.py")


def time_training(settings: Settings, sizes: Sizes) -> Section:
    """Seconds and tokens per second of a step: data, forward, backward and optimizer."""
    for _ in range(ROUNDS_PER_REPEAT if sizes.is_judged else 1):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            _, is_quiet = sample(lambda: _train(settings, run))  # noqa: B023
            lines = (run / "metrics.jsonl").read_text().splitlines()
            parameters = json.loads((run / "summary.json").read_text())["parameters"]
        if is_quiet:
            break
    steps = tuple(json.loads(line)["seconds"] for line in lines[1:])
    timing = Timing(steps, disturbed=not is_quiet)
    tokens = settings.train.seq_len * settings.train.batch_size
    row = [
        "tiny",
        f"{parameters:,}",
        f"{settings.train.batch_size} x {settings.train.seq_len}",
        f"{timing.seconds * 1e3:.0f}",
        f"{tokens / timing.seconds:,.0f}",
    ]
    header = ["preset", "parameters", "batch", "ms per step", "tokens/s"]
    return Section(
        "Training step: data, forward, backward, optimizer",
        [table(header, [row]), note({"step": timing})],
    )


def _train(settings: Settings, run: Path) -> None:
    """One run whose console output is not shown."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train(apply_overrides(settings, ["--run.dir", str(run)], "cpu.py"))
