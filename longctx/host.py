"""What the host of this process has."""

import os
from pathlib import Path

GROUP = Path("/sys/fs/cgroup")


def total_memory() -> int:
    """Bytes of memory, as far as this process's control group lets it take them."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _lines(GROUP / "memory.max")
    return min(total, int(limit[0])) if limit and limit[0].isdigit() else total


def free_memory() -> int:
    """Bytes of memory that are free, as far as this process's control group lets it take them."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = (_lines(GROUP / name) for name in ("memory.max", "memory.current"))
    if limit and used and limit[0].isdigit():
        free = min(free, int(limit[0]) - int(used[0]))
    return max(0, free)


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
