"""Requests to stop: a scheduler's or a user's signal becomes a flag that the loop reads."""

import signal
import threading
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class StopRequest:
    """While this context is open, a stop signal sets `requested` instead of ending the program.

    `requested` is the name of the first signal that arrived, such as "SIGTERM", or empty, and
    `since` when that was, by the monotonic clock. Open it before anything slow. A second SIGINT
    raises KeyboardInterrupt at once. Python lets only the main thread handle signals, so in any
    other thread this context does nothing.
    """

    def __init__(self) -> None:
        self.requested = ""
        self.since = 0.0
        self._interrupts = 0
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if not self.requested:
            self.since, self.requested = time.monotonic(), signal.Signals(number).name
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
