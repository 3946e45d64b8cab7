"""How time grows: with the length of sequences, and with the number of processes."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from longctx.study.laws import Refusal, determined

FEWEST = 3


@dataclass(frozen=True)
class TimeFit:
    """Seconds as a sum of terms, each a number that is not negative times what it grows with."""

    terms: dict[str, float]
    left_out: tuple[str, ...]
    """Terms that there were too few different points for."""
    points: int
    r2: float
    largest: float
    """The largest residual, as a share of the time."""

    def at(self, x: np.ndarray) -> np.ndarray:
        """Seconds there."""
        return sum(factor * GROWTHS[name](x) for name, factor in self.terms.items())


GROWTHS = {
    "fixed": np.ones_like,
    "n": lambda n: n,
    "n^2": lambda n: n**2,
    "1/P": lambda p: 1 / p,
    "P-1": lambda p: p - 1,
}
BY_LENGTH = ("fixed", "n", "n^2")
"""Seconds a token over the length: what each token costs, and what it costs to look back."""
BY_PROCESSES = ("fixed", "1/P", "P-1")
"""Seconds a step over processes: what does not spread, what does, and what exchanges add."""


def fit_time(
    x: Sequence[float], seconds: Sequence[float], names: Sequence[str]
) -> TimeFit | Refusal:
    """Least squares of relative residuals; later terms are left out if points are few."""
    all_N2 = np.stack([np.asarray(x, float), np.asarray(seconds, float)], 1)
    x_N, y_N = all_N2[(np.isfinite(all_N2) & (all_N2 > 0)).all(1)].T
    different = len(np.unique(x_N))
    if different < FEWEST:
        return Refusal(f"needs {FEWEST} different values, has {different}")
    used = names[: different - 1]
    columns_NK = np.stack([GROWTHS[name](x_N) / y_N for name in used], 1)
    factors = _not_negative(columns_NK)
    terms = {name: float(factor) for name, factor in zip(used, factors)}
    middle_N = columns_NK @ factors * y_N
    largest = float(np.abs(middle_N / y_N - 1).max())
    return TimeFit(terms, tuple(names[len(used) :]), len(y_N), determined(y_N, middle_N), largest)


def shares(fit: TimeFit, at: float) -> Mapping[str, float]:
    """What part of the time each term has there."""
    parts = {
        name: factor * float(GROWTHS[name](np.array(at))) for name, factor in fit.terms.items()
    }
    total = sum(parts.values())
    return {name: part / total for name, part in parts.items()} if total else {}


def _not_negative(columns_NK: np.ndarray) -> np.ndarray:
    """Factors of columns whose sum is next to 1: the best of all choices of those above 0."""
    count = columns_NK.shape[1]
    best, best_K = np.inf, np.zeros(count)
    for chosen in itertools.product((False, True), repeat=count):
        own = np.flatnonzero(chosen)
        if not len(own):
            continue
        part_NK = columns_NK[:, own]
        size_K = np.abs(part_NK).max(0) + (np.abs(part_NK).max(0) == 0)
        found_K = np.linalg.lstsq(part_NK / size_K, np.ones(len(part_NK)), rcond=None)[0] / size_K
        error = float(((part_NK @ found_K - 1) ** 2).sum())
        if (found_K >= 0).all() and error < best - 1e-15:
            best, best_K = error, np.zeros(count)
            best_K[own] = found_K
    return best_K
