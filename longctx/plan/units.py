"""Numbers as people read them."""

from collections.abc import Mapping
from typing import Any

GIB = 2**30
TIMES = ((86400.0, "days"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (0.0, "us"))
LEAST = {"days": 2, "h": 2, "min": 10}
FACTORS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


def gib(size: float) -> str:
    """Bytes."""
    if size >= GIB / 10:
        return f"{size / GIB:.1f} GiB"
    if size >= 2**20 / 10:
        return f"{size / 2**20:.1f} MiB"
    return f"{size / 1024:.1f} KiB" if size else "0"


def duration(seconds: float) -> str:
    """A time: in seconds up to ten minutes, in minutes and hours up to two of what follows."""
    size, unit = next(each for each in TIMES if seconds >= each[0] * LEAST.get(each[1], 1))
    digits = 4 if 100 <= seconds < 600 else 3
    return f"{seconds / (size or 1e-6):.{digits}g} {unit}"


def short(number: float) -> str:
    """A number with a letter for its thousands: k, M, G, T, P, E."""
    size, letter = next((each for each in FACTORS if number >= each[0]), (1.0, ""))
    return f"{number / size:.3g} {letter}".rstrip()


def told(changes: Mapping[str, Any]) -> str:
    """Fields as options of a command line."""
    return " ".join(f"--{name} {value}" for name, value in changes.items())
