"""Numbers over steps: smoothed, and thinned out so that no spike is lost."""

from dataclasses import dataclass

import numpy as np

SMOOTHED_SHARE = 0.005
LEAST_REACH = 50


@dataclass(frozen=True)
class Series:
    """Finite numbers `y` at rising `x`."""

    x: np.ndarray
    y: np.ndarray

    def over(self, other: "Series") -> "Series":
        """This divided by another where both are known and the other is not 0."""
        _, mine, theirs = np.intersect1d(self.x, other.x, return_indices=True)
        kept = other.y[theirs] != 0
        mine, theirs = mine[kept], theirs[kept]
        return Series(self.x[mine], self.y[mine] / other.y[theirs])

    def at(self, other: "Series") -> "Series":
        """This over the numbers of another instead of steps."""
        _, mine, theirs = np.intersect1d(self.x, other.x, return_indices=True)
        order = np.argsort(other.y[theirs], kind="stable")
        return Series(other.y[theirs][order], self.y[mine][order])


def reach_of(count: int) -> int:
    """Values on each side that a mean is taken over."""
    return int(max(min(LEAST_REACH, count // 20), count * SMOOTHED_SHARE))


def smoothed(series: Series) -> Series:
    """Means over `reach_of` values on both sides, over fewer near the ends so that none lags."""
    count = len(series.y)
    reach = reach_of(count)
    index = np.arange(count)
    near = np.minimum(np.minimum(reach, index), count - 1 - index)
    sums = np.concatenate(([0.0], np.cumsum(series.y)))
    return Series(series.x, (sums[index + near + 1] - sums[index - near]) / (2 * near + 1))


def thinned(series: Series, most: int, log: bool = False) -> Series:
    """At most `most` points: the least and the largest of stretches of equal width."""
    if len(series.x) <= most:
        return series
    place = np.log(series.x) if log and series.x[0] > 0 else series.x
    width = (place[-1] - place[0]) or 1.0
    stretches = most // 2
    stretch = np.minimum((place - place[0]) / width * stretches, stretches - 1).astype(int)
    firsts = np.flatnonzero(np.diff(stretch, prepend=-1))
    kept: set[int] = set()
    for start, stop in zip(firsts, [*firsts[1:], len(place)]):
        own = series.y[start:stop]
        kept |= {start + int(own.argmin()), start + int(own.argmax())}
    chosen = sorted(kept)
    return Series(series.x[chosen], series.y[chosen])
