"""Makes folders as studies leave them, without a training."""

import json
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from longctx.study.results import Results, Row
from tests.report.made import ENVIRONMENT

RATIOS = ("none", "all")
WIDTHS = (32, 48, 64, 96)
RATES = (0.001, 0.003, 0.01)
_numbers = count()
FLOOR, FACTOR, EXPONENT = 1.2, 60.0, 0.16


def loss_of(ratio: str, off: float, flops: float) -> float:
    """What a made run comes to."""
    return (FLOOR + FACTOR * flops**-EXPONENT) * (1 + 0.03 * RATIOS.index(ratio)) * off


def make_study(folder: Path, **changes: Any) -> Results:
    """A study of two ratios, four sizes, two durations and three learning rates, all done."""
    noise = np.random.default_rng(3)
    rows = []
    for ratio in RATIOS:
        for width in WIDTHS:
            for steps in (100, 300):
                for rate in RATES:
                    values = {
                        "ratio": ratio,
                        "model.width": width,
                        "train.steps": steps,
                        "optim.lr": rate,
                    }
                    off = 1 + 0.02 * abs(RATES.index(rate) - 1) + 0.002 * noise.standard_normal()
                    loss = partial(loss_of, ratio, off)
                    row = make_row(folder, values, loss, rate == RATES[1])
                    write_run(row.run_dir, steps, row.summary["flops"] / steps, loss)
                    rows.append(row)
    axes = ("ratio", "model.width", "train.steps", "optim.lr")
    command = "longctx study ratios.toml --study.workers 2"
    made = {"name": "ratios", "command": command, "axes": axes, "over": ("optim.lr",)}
    return Results(**{**made, "rows": tuple(rows), "plot": "val_loss"} | changes)


def make_row(
    folder: Path, values: dict[str, Any], loss: Callable[[float], float], best: bool = False
) -> Row:
    """A cell that is done."""
    width, steps = values.get("model.width", 32), values.get("train.steps", 20)
    parameters = 12 * 8 * width**2
    each = 6.0 * parameters * 2048
    config = {"train.seq_len": 512, "train.batch_size": 4, "optim.lr": 0.003} | values
    name = f"{next(_numbers)}-{steps}"
    summary = {"val_loss": loss(each * steps), "seconds": 30.0, "parameters": parameters}
    summary |= {"tokens": 2048 * steps, "flops": each * steps}
    return Row(name, values, "done", 1, "", best, 1, config, summary, folder / name)


def write_run(
    folder: Path, steps: int, flops: float, loss: Callable[[float], float], seconds: float = 0.5
) -> None:
    """The files of a finished run."""
    lines = []
    for step in range(1, steps + 1, 10):
        line = {"step": step, "tokens": 2048 * step, "flops": flops * step, "seconds": seconds}
        line |= {"tokens_per_second": 2048 / seconds, "peak_memory_bytes": 1 << 28}
        lines.append(json.dumps(line | {"loss": 3.0, "val_loss": loss(flops * step)}))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "config.toml").write_text(f'[run]\nname = "{folder.name}"\n')
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
