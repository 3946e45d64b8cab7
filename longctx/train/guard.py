"""Steps that must not change the weights: not finite, or far above the last ones."""

import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from longctx.errors import InputError, OutsideError

SMALLEST_SPREAD = 1e-6
"""Share of the mean below which a standard deviation is rounding."""


@dataclass(frozen=True)
class FaultsConfig:
    """The `[faults]` table."""

    max_skipped: int = 10
    """Skipped steps in a row after which the run ends; 0 never ends it."""
    spike_sigmas: float = 6.0
    """Standard deviations above the mean of recent steps at which a loss or a norm of the gradient
    is a spike; 0 looks for none."""
    spike_window: int = 128
    """Recent steps that a spike is measured against; half of them must have been made."""
    spike_action: Literal["warn", "skip"] = "warn"
    """Whether the update of a spike is made, with a warning, or left out."""
    hang_factor: float = 20.0
    """A step that takes this many times the median of the last ones ends the run, with a report of
    which rank waits where; 0 lets it go on."""
    hang_seconds: float = 300.0
    """Time that a step may take whatever the median is; parallel.timeout_seconds should be more."""
    check_replicas_every: int = 0
    """Steps between checks that all replicas hold the same weights, bit for bit; 0 never checks."""
    grace_seconds: float = 0.0
    """After a signal to stop, time until the run ends, saved or not; 0 waits for the checkpoint."""

    def __post_init__(self) -> None:
        numbers = ("max_skipped", "spike_sigmas", "hang_factor", "hang_seconds", "grace_seconds")
        for name in (*numbers, "check_replicas_every"):
            if not getattr(self, name) >= 0:
                raise InputError(f"faults.{name} = {getattr(self, name)}: must not be negative")
        if self.spike_window < 2:
            raise InputError(f"faults.spike_window = {self.spike_window}: must be at least 2")


@dataclass(frozen=True)
class Verdict:
    """Whether the weights may change, and what is wrong with the step, if anything."""

    apply: bool = True
    reason: str = ""


class Guard:
    """Judges every step by figures that are equal on all processes, which so decide alike."""

    def __init__(self, config: FaultsConfig, last_good: Callable[[], object] = str) -> None:
        self.config = config
        self.skipped = 0
        """Steps whose update was left out, over the whole run."""
        self._last_good, self._in_a_row = last_good, 0
        self._recent: dict[str, deque[float]] = {}

    def judge(self, step: int, figures: dict[str, float]) -> Verdict:
        """What to do with a step of this loss, norm of the gradient, or whatever else is given."""
        odd = [name for name, value in figures.items() if not math.isfinite(value)]
        if odd:
            told = ", ".join(f"{name} is {figures[name]}" for name in odd)
            return self._skip(step, f"{told}; the weights stay as they are")
        spikes = [told for name, value in figures.items() if (told := self._spike(name, value))]
        if spikes and self.config.spike_action == "skip":
            return self._skip(step, f"{', '.join(spikes)}; the weights stay as they are")
        self._in_a_row = 0
        for name, value in figures.items():
            self._history(name).append(value)
        return Verdict(True, ", ".join(spikes))

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs, for JSON."""
        recent = {name: list(values) for name, values in self._recent.items()}
        return {"skipped": self.skipped, "in_a_row": self._in_a_row, "recent": recent}

    def load(self, state: dict[str, Any]) -> None:
        """Goes back to a state."""
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]
        self._recent = {}
        for name, values in state["recent"].items():
            self._history(name).extend(values)

    def _history(self, name: str) -> deque[float]:
        return self._recent.setdefault(name, deque(maxlen=self.config.spike_window))

    def _spike(self, name: str, value: float) -> str:
        """How far a value is above the recent ones, if it is a spike."""
        recent, sigmas = self._history(name), self.config.spike_sigmas
        if not sigmas or len(recent) < self.config.spike_window // 2:
            return ""
        mean = statistics.fmean(recent)
        variance = math.fsum((x - mean) ** 2 for x in recent) / len(recent)
        sigma = max(math.sqrt(variance), SMALLEST_SPREAD * abs(mean))
        if value <= mean + sigmas * sigma:
            return ""
        return f"{name} {value:.4g} is a spike: {mean:.4g} +- {sigma:.2g} in {len(recent)} steps"

    def _skip(self, step: int, reason: str) -> Verdict:
        self.skipped += 1
        self._in_a_row += 1
        if self.config.max_skipped and self._in_a_row >= self.config.max_skipped:
            good = self._last_good() or "none"
            raise OutsideError(
                f"step {step}: {reason}; that is step {self._in_a_row} in a row "
                f"(faults.max_skipped); last good checkpoint: {good}. Run again with "
                "these steps in data.skip_steps, or start another run with a lower optim.lr and "
                "that checkpoint as run.init_from"
            )
        return Verdict(False, reason)
