"""W&B beside a run: in a thread of its own, so that a slow or dead server delays no step."""

import contextlib
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

FLUSH_SECONDS = 1.0
FINISH_SECONDS = 10.0
"""How long the end of a run waits for W&B."""
MOST_WAITING = 10_000
"""Rows that wait for W&B; more are dropped and counted."""
MOST_ELEMENTS = 64
THREAD = "wandb mirror"


class Mirror:
    """Sends rows to a W&B run that `start` makes. Nothing here waits or raises, but for `close`,
    which waits a little."""

    def __init__(self, start: Callable[[], Any]) -> None:
        self._start, self._error, self._dropped = start, "", 0
        self._rows: queue.Queue[dict | None] = queue.Queue(MOST_WAITING)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name=THREAD, daemon=True)
        self._thread.start()

    def log(self, row: dict) -> None:
        """Hands over a row."""
        if not self._thread.is_alive():
            return
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._dropped += 1

    def complaint(self) -> str:
        """What went wrong since it was last asked, in words, or empty."""
        error, self._error = self._error, ""
        return error

    def close(self) -> None:
        """Lets W&B take what waits, for a few seconds."""
        self._closing.set()
        with contextlib.suppress(queue.Full):
            self._rows.put_nowait(None)
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            self._error = (
                f"W&B did not finish in {FINISH_SECONDS:g} s; `wandb sync` sends what is in wandb/"
            )
        elif self._dropped:
            self._error = self._error or f"W&B was too slow for {self._dropped} rows"

    def _work(self) -> None:
        try:
            run = self._start()
            while (row := self._rows.get()) is not None:
                run.log(_flat(row), step=row["step"])
                if self._closing.is_set() and self._rows.empty():
                    break
            run.finish()
        except Exception as error:
            reason = " ".join(str(error).split())
            name = type(error).__name__
            self._error = f"W&B failed and is off for the rest of the run: {name}: {reason}"


def is_stuck() -> bool:
    """Whether a W&B that was given up would keep the program from ending, which it waits for."""
    return any(thread.name == THREAD for thread in threading.enumerate())


def start_wandb(mode: str, folder: Path, project: str, name: str, config: dict) -> Any:
    """A W&B run that leaves the console alone."""
    import wandb

    settings: dict[str, Any] = {"console": "off"}
    if "x_transaction_log_flush_interval" in wandb.Settings.model_fields:
        settings["x_transaction_log_flush_interval"] = FLUSH_SECONDS
    return wandb.init(
        mode=mode,
        dir=folder,
        project=project,
        name=name,
        config=config,
        settings=wandb.Settings(**settings),
    )


def _flat(row: dict) -> dict:
    """What W&B gets of a row: of a list the first elements, each under a name of its own."""
    flat = {}
    for name, value in row.items():
        if isinstance(value, list):
            flat |= {f"{name}/{i}": element for i, element in enumerate(value[:MOST_ELEMENTS])}
        elif name != "step":
            flat[name] = value
    return flat
