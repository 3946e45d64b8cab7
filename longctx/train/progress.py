"""What a person sees while a run trains: a progress bar on a terminal, plain lines elsewhere."""

import math
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

SECONDS_BETWEEN_LINES = 2.0


class Progress:
    """Shows rows of metrics on the console.

    `step` and `close` return the line that a log file should get, or None when none is due. Due are
    the first row, the last one, rows with a validation loss, and one row every two seconds.
    """

    def __init__(self, last_step: int | None, resume_step: int) -> None:
        self._last_step = last_step
        self._resume_step = resume_step
        self._started = time.monotonic()
        self._next_line = self._started
        self._pending: dict | None = None
        self._console = Console(file=sys.stdout, soft_wrap=True, highlight=False, markup=False)
        self._bar = self._make_bar() if sys.stdout.isatty() else None

    def step(self, row: dict) -> str | None:
        """Show the row of one step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"], numbers=_numbers(row))
        self._pending = row
        due = time.monotonic() >= self._next_line or row.get("val_loss") is not None
        return self._line() if due else None

    def print(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self._console.print(text)

    def close(self) -> str | None:
        """Show the last row if it was not shown, and leave the terminal in order."""
        line = self._line() if self._pending is not None else None
        if self._bar is not None:
            self._bar.stop()
        return line

    def _make_bar(self) -> Bar:
        columns = (BarColumn(bar_width=10), MofNCompleteColumn(), TimeRemainingColumn())
        bar = Bar(*columns, TextColumn("{task.fields[numbers]}"), console=self._console)
        self._task = bar.add_task(
            "step", total=self._last_step, completed=self._resume_step, numbers=""
        )
        bar.start()
        return bar

    def _line(self) -> str:
        """The pending row as a line, printed unless the bar shows all of it."""
        row, self._pending = self._pending, None
        now = time.monotonic()
        self._next_line = now + SECONDS_BETWEEN_LINES
        numbers = _numbers(row)
        if row.get("val_loss") is not None:
            numbers = f"val_loss {_number(row['val_loss'], '.4f')}  {numbers}"
        line = f"step {row['step']}  {numbers}"
        if self._last_step is not None:
            seconds_per_step = (now - self._started) / max(1, row["step"] - self._resume_step)
            remaining = _clock(seconds_per_step * (self._last_step - row["step"]))
            line = f"step {row['step']}/{self._last_step}  {numbers}  ETA {remaining}"
        if self._bar is None or row.get("val_loss") is not None:
            self.print(line)
        return line


def _numbers(row: dict) -> str:
    memory = row.get("peak_memory_bytes")
    parts = (
        f"loss {_number(row.get('loss'), '.4f')}",
        f"{_number(row.get('tokens_per_second'), ',.0f')} tok/s",
        f"MFU {_number(row.get('mfu'), '.1%')}",
        f"{_number(memory and memory / 2**30, '.2f')} GiB",
    )
    return "  ".join(parts)


def _number(value: float | None, form: str) -> str:
    """A formatted number, a dash for one that is not known."""
    if value is None:
        return "-"
    return format(value, form) if math.isfinite(value) else str(value)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
