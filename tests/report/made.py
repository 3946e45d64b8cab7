"""Makes folders as runs leave them, without a training."""

import json
from pathlib import Path
from typing import Any

CONFIG = """[run]
name = {name}
dir = ""

[model]
width = {width}
pattern = "LLLS"

[optim]
lr = 0.002
"""
ENVIRONMENT = {
    "time": "2030-01-02T03:04:05+00:00",
    "command": ["longctx", "train", "tiny"],
    "longctx": "0.1.0",
    "torch": "2.13.0",
    "cpu": "a processor",
    "devices": [],
    "git": {"commit": "0123456789abcdef", "dirty": True},
}


def row(step: int, **more: Any) -> dict[str, Any]:
    """A line of metrics."""
    return {
        "step": step,
        "loss": 2 + 3 / step,
        "tokens": 100 * step,
        "seconds": 0.5,
        "tokens_per_second": 200.0 + step % 3,
        "mfu": 0.25,
        "grad_norm": 1.0 + 0.1 * (step % 5),
        "lr": 1e-3 / step,
        "peak_memory_bytes": 3 << 30,
        "exchange_bytes": 1 << 20,
        "exchange_calls": 7,
        "data_seconds": 0.005,
        "skipped": int(step > 30),
        "router/3/load": [0.25, 0.5, 0.125 * (step % 2), 0.125],
        "router/3/entropy": 1.2,
    } | more


def evaluated(step: int) -> dict[str, Any]:
    """What an evaluation adds to it."""
    means = [2.5, 2.25, None, 2.0 + 1 / step]
    return {"val_loss": 2.2 + 3 / step, "val_accuracy": 0.4, "val_loss_by_position": means}


def make_run(folder: Path, name: str = "one", width: int = 64, steps: int = 60) -> Path:
    """A finished run in this folder."""
    folder.mkdir(parents=True)
    rows = [row(n, **(evaluated(n) if n % 20 == 0 else {})) for n in range(1, steps + 1)]
    (folder / "config.toml").write_text(CONFIG.format(name=json.dumps(name), width=width))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    summary = {"step": steps, "val_loss": 2.25, "val_accuracy": 0.4, "tokens_per_second": 200.5}
    summary |= {"device": "cpu", "processes": 2, "precision": "fp32", "parameters": 238_976}
    (folder / "summary.json").write_text(json.dumps(summary))
    log = "2030-01-02T03:04:05Z started\n2030-01-02T03:04:06Z warning: the loss jumped\n"
    (folder / "log.txt").write_text(log)
    return folder
