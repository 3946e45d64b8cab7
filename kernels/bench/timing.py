"""Medians of interleaved samples, without those that other programs disturbed."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from report import DISTURBED

TASKS = Path("/proc/self/task")
WAIT_LIMIT = 0.1
ROUNDS_PER_REPEAT = 3


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, each sample a mean over a few calls."""

    samples: tuple[float, ...]
    dropped: int = 0
    """Samples left out because other programs held the cores."""
    disturbed: bool = False
    """Too few samples were quiet, so none was left out."""

    @property
    def seconds(self) -> float:
        """Median of the samples."""
        return median(self.samples)

    @property
    def spread(self) -> float:
        """Distance between the extremes, as a share of the median."""
        return (max(self.samples) - min(self.samples)) / self.seconds


def interleave(
    operations: Mapping[str, Callable[[], object]],
    repeats: int,
    calls: Mapping[str, int] | None = None,
) -> dict[str, Timing]:
    """Times all operations in turn, every other round backwards, so that drift cancels.

    A round that is not counted comes first. Rounds go on until each operation has `repeats`
    quiet samples or there have been ROUNDS_PER_REPEAT times as many rounds.
    """
    calls = calls or {}
    quiet: dict[str, list[float]] = {name: [] for name in operations}
    loud: dict[str, list[float]] = {name: [] for name in operations}
    for operation in operations.values():
        operation()
    for count in range(ROUNDS_PER_REPEAT * repeats):
        missing = [name for name in operations if len(quiet[name]) < repeats]
        if not missing:
            break
        for name in missing if count % 2 else reversed(missing):
            seconds, is_quiet = sample(operations[name], calls.get(name, 1))
            (quiet if is_quiet else loud)[name].append(seconds)
    return {name: _timing(quiet[name], loud[name], repeats) for name in operations}


def _timing(quiet: list[float], loud: list[float], repeats: int) -> Timing:
    if len(quiet) >= min(3, repeats):
        return Timing(tuple(quiet), len(loud))
    return Timing((*quiet, *loud), disturbed=True)


def sample(operation: Callable[[], object], calls: int = 1) -> tuple[float, bool]:
    """Seconds of a call, and whether our threads had the cores nearly whenever they could run."""
    waited, started = _seconds_waited(), time.perf_counter()
    for _ in range(calls):
        operation()
    seconds = time.perf_counter() - started
    return seconds / calls, _seconds_waited() - waited <= WAIT_LIMIT * seconds


def _seconds_waited() -> float:
    """How long our threads have been ready to run without a core (Linux; elsewhere 0)."""
    nanoseconds = 0
    for task in os.listdir(TASKS) if TASKS.is_dir() else ():
        try:
            nanoseconds += int((TASKS / task / "schedstat").read_text().split()[1])
        except (OSError, IndexError):  # the thread has ended, or the kernel does not count
            continue
    return nanoseconds / 1e9


def note(timings: Mapping[str, Timing]) -> str:
    """How far to trust these numbers, as a sentence."""
    if any(timing.disturbed for timing in timings.values()):
        return DISTURBED
    dropped = sum(timing.dropped for timing in timings.values())
    widest = max(timing.spread for timing in timings.values())
    kept = min(len(timing.samples) for timing in timings.values())
    return (
        f"Medians of {kept} samples; {dropped} disturbed ones left out; "
        f"largest spread (max - min) / median {widest:.0%}."
    )
