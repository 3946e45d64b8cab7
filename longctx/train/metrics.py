"""The numbers of a run: one JSON line a step, a readable log, the console and, if asked, W&B."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from longctx.errors import OutsideError
from longctx.train.checkpoint import sync_path
from longctx.train.progress import Progress

METRICS_FILE = "metrics.jsonl"
LOG_FILE = "log.txt"
WANDB_FLUSH_SECONDS = 1.0
MOST_ELEMENTS = 64


@dataclass(frozen=True)
class LogConfig:
    """The `[log]` table."""

    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Whether metrics also go to W&B: not at all, to files for `wandb sync`, or to its server."""
    project: str = "longctx"
    """The W&B project."""


class MetricsLog:
    """Appends to `metrics.jsonl` and `log.txt` of a run directory; one process of a run makes it.

    A row has `step`, `loss`, `tokens` (seen since the first step), `seconds`, `tokens_per_second`,
    `mfu`, `grad_norm`, `lr`, `peak_memory_bytes`, `exchange_bytes` and `exchange_calls`, and may
    have more, lists too. Rows after `resume_step` are dropped at the start, so each step is there
    once.
    """

    def __init__(
        self,
        run_dir: Path,
        config: LogConfig,
        run_name: str,
        resolved_config: dict,
        resume_step: int,
    ) -> None:
        run_dir = Path(run_dir)
        self._path = run_dir / METRICS_FILE
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            _drop_rows_after(self._path, resume_step)
            self._metrics = self._path.open("a", encoding="utf-8")
            self._log = (run_dir / LOG_FILE).open("a", encoding="utf-8")
            sync_path(run_dir)
        except OSError as error:
            raise OutsideError(f"{run_dir}: cannot write the metrics: {error.strerror}") from error
        self._progress = Progress(_last_step(resolved_config), resume_step)
        self._wandb_run: Any = None
        if config.wandb != "disabled":
            self._mirror(lambda: self._start_wandb(run_dir, config, run_name, resolved_config))

    def step(self, row: dict) -> None:
        """Log the metrics of one step; they are on the disk when this returns."""
        try:
            self._metrics.write(json.dumps(_finite(row), allow_nan=False) + "\n")
            self._metrics.flush()
            os.fsync(self._metrics.fileno())
        except OSError as error:
            raise OutsideError(f"{self._path}: cannot write: {error.strerror}") from error
        self._write_log(self._progress.step(row))
        if self._wandb_run is not None:
            self._mirror(lambda: self._wandb_run.log(_flat(row), step=row["step"]))

    def info(self, text: str) -> None:
        """Tell the user something, on the console and in `log.txt`."""
        self._progress.print(text)
        self._write_log(text)

    def warn(self, text: str) -> None:
        """Warn the user, on the console and in `log.txt`."""
        self.info(f"warning: {text}")

    def close(self) -> None:
        """Show the last step and close files, console and W&B."""
        self._write_log(self._progress.close())
        if self._wandb_run is not None:
            self._mirror(lambda: self._wandb_run.finish())
        self._metrics.close()
        self._log.close()

    def _write_log(self, text: str | None) -> None:
        if text is None:
            return
        try:
            self._log.write(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {text}\n")
            self._log.flush()
        except OSError as error:
            raise OutsideError(f"{self._log.name}: cannot write: {error.strerror}") from error

    def _start_wandb(
        self, run_dir: Path, config: LogConfig, run_name: str, resolved_config: dict
    ) -> None:
        import wandb

        settings: dict[str, Any] = {"console": "off"}
        if "x_transaction_log_flush_interval" in wandb.Settings.model_fields:
            settings["x_transaction_log_flush_interval"] = WANDB_FLUSH_SECONDS
        self._wandb_run = wandb.init(
            mode=config.wandb,
            dir=run_dir,
            project=config.project,
            name=run_name,
            config=resolved_config,
            settings=wandb.Settings(**settings),
        )

    def _mirror(self, call: Callable[[], None]) -> None:
        """Call W&B; if it fails in any way, warn and train on without it."""
        try:
            call()
        except Exception as error:
            self._wandb_run = None
            reason = " ".join(str(error).split())
            self.warn(f"W&B failed and is off for the rest of the run: {reason}")


class SilentLog:
    """The log of processes that leave the talking to the first one."""

    def step(self, row: dict) -> None:
        """Nothing."""

    def info(self, text: str) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that is either complete or not there; non-finite numbers become null."""
    path = Path(path)
    try:
        text = json.dumps(_finite(content), allow_nan=False, indent=1) + "\n"
        _replace(path, text.encode())
    except OSError as error:
        raise OutsideError(f"{path}: cannot write: {error.strerror}") from error


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".partial-{path.name}")
    try:
        temporary.write_bytes(content)
        sync_path(temporary)
        temporary.replace(path)
        sync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flat(row: dict) -> dict:
    """What W&B gets of a row: of a list the first elements, each under a name of its own."""
    flat = {}
    for name, value in row.items():
        if isinstance(value, list):
            flat |= {f"{name}/{i}": element for i, element in enumerate(value[:MOST_ELEMENTS])}
        elif name != "step":
            flat[name] = value
    return flat


def _drop_rows_after(path: Path, step: int) -> None:
    """Keep the whole lines of steps up to `step`; a killed run leaves later and torn ones."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _is_row_up_to(line, step)]
    if kept != lines:
        _replace(path, b"".join(kept))


def _is_row_up_to(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, TypeError, KeyError):
        return False


def _last_step(resolved_config: dict) -> int | None:
    """The step at which `[train]` ends, which may be earlier than the end of its schedule."""
    train = resolved_config.get("train", {})
    return train.get("stop_after") or train.get("steps")


def _finite(value: Any) -> Any:
    """The value with every NaN and infinity in it replaced by None, which JSON can hold."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
