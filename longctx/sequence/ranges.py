"""Named ranges of time: what one process does, for a profile of a step."""

import contextlib
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from torch.autograd.profiler import record_function

NOTHING: AbstractContextManager[None] = contextlib.nullcontext()
STEP, LAYER, EXCHANGE = "step", "layer", "exchange"


@dataclass(eq=False)
class Range:
    """One range; in nanoseconds of `time.perf_counter_ns`."""

    kind: str
    """What it counts as, such as `layer`, `exchange` or `optimizer`."""
    name: Hashable
    """Which of its kind; its text names the range in a trace."""
    begin: int
    end: int = 0
    within: int = 0
    """How much of it other ranges take that lie directly in it."""
    top: str = ""
    """The kind of the range that it lies in, or is, directly below the step."""

    @property
    def own(self) -> int:
        """What no range within it takes."""
        return self.end - self.begin - self.within


@dataclass
class Recorded:
    """What was done between the begin and the end of a profile."""

    ranges: list[Range] = field(default_factory=list)
    """In order of their ends."""
    flights: list[Range] = field(default_factory=list)
    """Exchanges from their start until somebody has waited for them; they overlap with ranges."""


class Ranges:
    """What one process does now; remembers it only while a profile is recorded.

    Ranges nest. One thread at a time may open them: the one that trains, or the one that computes
    gradients while that one waits.
    """

    def __init__(self) -> None:
        self._recorded: Recorded | None = None
        self._open: list[Range] = []

    def __call__(self, kind: str, name: Hashable = "") -> AbstractContextManager[None]:
        """A context that counts as `kind`, and is known as `name` or as its kind."""
        return NOTHING if self._recorded is None else self._named(kind, name or kind)

    def departs(self, name: Hashable) -> Callable[[], None]:
        """Says that an exchange is on its way; call the result when it has arrived."""
        recorded = self._recorded
        if recorded is None:
            return _arrived
        flight = Range(EXCHANGE, name, time.perf_counter_ns())

        def arrives() -> None:
            flight.end = time.perf_counter_ns()
            recorded.flights.append(flight)

        return arrives

    def enter(self, kind: str, name: Hashable) -> None:
        """Begins a range that `leave`, or the end of the range around it, ends."""
        if self._recorded is not None:
            top = self._open[1].kind if len(self._open) > 1 else kind
            self._open.append(Range(kind, name, time.perf_counter_ns(), top=top))

    def leave(self, kind: str) -> None:
        """Ends the innermost range if it is of this kind."""
        if self._recorded is not None and self._open and self._open[-1].kind == kind:
            self._close(self._open[-1])

    @contextlib.contextmanager
    def record(self, name: str) -> Iterator[Recorded]:
        """Remembers all that is done in this context, which is a range of kind `step` itself."""
        assert self._recorded is None
        recorded = self._recorded = Recorded()
        try:
            with self._named(STEP, name):
                yield recorded
        finally:
            self._recorded = None

    @contextlib.contextmanager
    def _named(self, kind: str, name: Hashable) -> Iterator[None]:
        with record_function(str(name)):
            self.enter(kind, name)
            opened = self._open[-1]
            try:
                yield
            finally:
                self._close(opened)

    def _close(self, opened: Range) -> None:
        """Ends a range and those left open in it."""
        now, recorded = time.perf_counter_ns(), self._recorded
        while recorded is not None and opened in self._open:
            last = self._open.pop()
            last.end = now
            recorded.ranges.append(last)
            if self._open:
                self._open[-1].within += last.end - last.begin


def _arrived() -> None:
    """What nobody records."""
