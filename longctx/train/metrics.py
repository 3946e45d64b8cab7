"""The numbers of a run: a JSON line a step, a readable log, the console and, if asked, mirrors."""

import contextlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

from longctx.config.steps import range_of_steps
from longctx.errors import OutsideError
from longctx.files import sync_path, write_whole
from longctx.train.board import Board
from longctx.train.lines import Lines
from longctx.train.mirror import Mirror
from longctx.train.progress import Progress
from longctx.train.redaction import redact
from longctx.train.wandb_run import LATE, WandbRun

METRICS_FILE = "metrics.jsonl"
LOG_FILE = "log.txt"


@dataclass(frozen=True)
class LogConfig:
    """The `[log]` table."""

    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Whether metrics also go to W&B: not at all, to files for `wandb sync`, or to its server."""
    project: str = "longctx"
    """The W&B project."""
    entity: str = ""
    """The W&B user or team that owns the project; empty is the default of the account."""
    group: str = ""
    """Runs that W&B shows together; cells of a study have its name."""
    tags: tuple[str, ...] = ()
    """Labels by which W&B finds the run."""
    job_type: str = ""
    """What kind of run it is within its group, for W&B; cells of a study are called cell."""
    tensorboard: bool = False
    """Whether metrics also go to TensorBoard files, in tensorboard/ of the run directory."""
    profile_steps: tuple[str, ...] = ()
    """Steps that a profile is written of, such as 10-12, into the run's folder `profile`."""

    def __post_init__(self) -> None:
        for text in self.profile_steps:
            range_of_steps(text, "log.profile_steps")

    def profiles(self, step: int) -> bool:
        """Whether a profile of this step, which counts from 1, is wanted."""
        return any(step in range_of_steps(text, "log.profile_steps") for text in self.profile_steps)


class MetricsLog:
    """Appends to `metrics.jsonl` and `log.txt` of a run directory; one process of a run makes it.

    A row has `step`, `loss`, `tokens` (seen since the first step), `seconds`, `tokens_per_second`,
    `mfu`, `grad_norm`, `lr`, `peak_memory_bytes`, `exchange_bytes` and `exchange_calls`, and may
    have more, lists too; docs/tracking.md explains all. Rows after `resume_step` are dropped at the
    start, so each step is there once. A disk that cannot be written at the start is an error; later
    it is a warning.
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
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            _drop_rows_after(run_dir / METRICS_FILE, resume_step)
            self._metrics = Lines(run_dir / METRICS_FILE, sync=True)
            self._log = Lines(run_dir / LOG_FILE, sync=False)
            sync_path(run_dir)
        except OSError as error:
            raise OutsideError(f"{run_dir}: cannot write the metrics: {error.strerror}") from error
        self._troubles = {lines.path: "" for lines in (self._metrics, self._log)}
        self._progress = Progress(_last_step(resolved_config), resume_step)
        self._mirrors: list[Mirror] = []
        if config.wandb != "disabled":
            start_run = partial(WandbRun, run_dir, config, run_name, resolved_config)
            self._mirrors.append(Mirror("W&B", start_run, LATE))
        if config.tensorboard:
            start_board = partial(Board, run_dir, resolved_config, resume_step)
            self._mirrors.append(Mirror("TensorBoard", start_board))

    def step(self, row: dict) -> None:
        """Log the metrics of one step; they are on the disk, if it works, when this returns."""
        finite = _finite(row)
        self._metrics.append(json.dumps(finite, allow_nan=False))
        self._show(lambda: self._progress.step(row))
        for mirror in self._mirrors:
            mirror.log(finite)
        self._warn_of_troubles()

    def info(self, text: str) -> None:
        """Tell the user something, but no secrets, on the console and in `log.txt`."""
        text = redact(text)
        self._show(lambda: self._progress.print(text))
        self._write_log(text)

    def warn(self, text: str) -> None:
        """Warn the user, on the console and in `log.txt`."""
        self.info(f"warning: {text}")

    def close(self) -> None:
        """Show the last step and close files, console and mirrors, which learn of an exception that
        ends the run."""
        error = sys.exc_info()[1]
        self._show(self._progress.close)
        if error:
            self._write_log(redact(f"warning: ended by {type(error).__name__}: {error}"))
        for mirror in self._mirrors:
            mirror.close(failed=error is not None)
        self._warn_of_troubles()
        self._metrics.close()
        if self._metrics.lost:
            self.warn(f"{self._metrics.path}: {self._metrics.lost} rows are lost")
        self._log.close()

    def _show(self, show: Callable[[], str | None]) -> None:
        """On the console, which may be a file on a full disk or a pipe that nobody reads."""
        line = None
        with contextlib.suppress(OSError):
            line = show()
        if line is not None:
            self._write_log(line)

    def _write_log(self, text: str) -> None:
        self._log.append(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {text}")

    def _warn_of_troubles(self) -> None:
        """Once when a disk or mirror fails, and once when the disk is back."""
        for lines in (self._metrics, self._log):
            before, now = self._troubles[lines.path], lines.trouble
            self._troubles[lines.path] = now
            if now and not before:
                self.warn(f"{lines.path}: cannot write: {now}; training goes on, lines wait")
            elif before and not now:
                self.info(f"{lines.path}: can be written again; {lines.lost} lines are lost")
        for mirror in self._mirrors:
            if news := mirror.news():
                self.info(news)
            if complaint := mirror.complaint():
                self.warn(complaint)


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
        write_whole(path, text.encode())
    except OSError as error:
        raise OutsideError(f"{path}: cannot write: {error.strerror}") from error


def _drop_rows_after(path: Path, step: int) -> None:
    """Keep the whole lines of steps up to `step`; a killed run leaves later and torn ones."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _is_row_up_to(line, step)]
    if kept != lines:
        write_whole(path, b"".join(kept))


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
