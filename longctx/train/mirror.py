"""Another place that gets a run's numbers, in a thread of its own: a slow or dead one delays no
step."""

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Protocol

FLUSH_SECONDS = 1
FINISH_SECONDS = 10.0
"""How long the end of a run waits for a mirror."""
MOST_WAITING = 10_000
"""Rows that wait for a mirror; more are dropped and counted."""
MOST_ELEMENTS = 64
THREAD = "mirror of metrics"


class Sink(Protocol):
    """Takes rows; may wait, and raise anything."""

    place: str
    """Where the rows are to be seen."""
    trouble: str
    """What the user should know about that, or empty."""

    def log(self, row: dict) -> None:
        """Takes a row."""

    def finish(self, failed: bool) -> None:
        """Takes note that there are no more, and whether because the run failed."""


class Mirror:
    """Sends rows to a sink that `start` makes. Nothing here waits or raises, but for `close`, which
    waits a little."""

    def __init__(self, name: str, start: Callable[[], Sink], when_late: str = "") -> None:
        self._name, self._start, self._when_late = name, start, when_late
        self._error, self._news, self._dropped = "", "", 0
        self._begun, self._failed = False, False
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

    def news(self) -> str:
        """Where the rows are to be seen, once, or empty."""
        news, self._news = self._news, ""
        return news

    def close(self, failed: bool = False) -> None:
        """Lets the sink take what waits, for a few seconds."""
        self._failed = failed
        self._closing.set()
        with contextlib.suppress(queue.Full):
            self._rows.put_nowait(None)
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            late = self._when_late if self._begun else "; it had not begun and has no rows"
            self._error = f"{self._name} did not finish in {FINISH_SECONDS:g} s{late}"
        elif self._dropped:
            self._error = self._error or f"{self._name} was too slow for {self._dropped} rows"

    def _complain(self, trouble: str) -> None:
        self._error = " ".join(f"{self._name} {trouble}".split()) if trouble else ""

    def _work(self) -> None:
        try:
            sink = self._start()
            self._begun = True
            self._news = f"{self._name}: {sink.place}"
            self._complain(sink.trouble)
            try:
                while (row := self._rows.get()) is not None:
                    sink.log(row)
                    if self._closing.is_set() and self._rows.empty():
                        break
            finally:  # a sink that is left open could keep the program from ending
                sink.finish(self._failed)
        except Exception as error:
            kind = type(error).__name__
            self._complain(f"failed and is off for the rest of the run: {kind}: {error}")


def is_stuck() -> bool:
    """Whether a mirror that was given up would keep the program from ending, which it waits for."""
    return any(thread.name == THREAD for thread in threading.enumerate())


def flat(row: dict) -> dict:
    """A row without lists: of each the first elements, each under a name of its own."""
    numbers = {}
    for name, value in row.items():
        if isinstance(value, list):
            numbers |= {f"{name}/{i}": element for i, element in enumerate(value[:MOST_ELEMENTS])}
        else:
            numbers[name] = value
    return numbers
