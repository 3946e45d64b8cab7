"""The longest sequences that fit."""

from collections.abc import Sequence

from longctx.errors import InputError
from longctx.plan.choices import changed
from longctx.plan.clusters import ClusterConfig
from longctx.plan.search import Room, largest_memory, room_of
from longctx.plan.workload import Workload, workload

MOST = 2**31
"""Tokens up to which positions are counted."""
CLOSE = 64
"""The answer is at most one part in so many too short."""
ROUND = 1024
"""Long answers are multiples of this."""
FACTORS = (0.125, 0.25, 0.5, 1, 2, 4, 8)
"""By which processes are multiplied."""


def longest(ways: Sequence[Workload], room: Room) -> tuple[int, Workload | None]:
    """Tokens of the longest sequence that fits in one of these ways, with all else as it is, and
    that way with it; 0 and None if none fits."""
    best: tuple[int, Workload | None] = 0, None
    for work in ways:
        tokens = _longest(work, room, best[0])
        if tokens > best[0]:
            best = tokens, work.with_length(tokens)
    return best


def _longest(work: Workload, room: Room, floor: int) -> int:
    """Of one way; 0 if it is not above `floor`."""

    def fits(tokens: int) -> bool:
        try:
            return not room.lacks(largest_memory(work.with_length(tokens), room.is_apart))
        except InputError:  # too short for a layer, a task or so many parts
            return False

    low = max(floor, work.settings.train.seq_len)
    if fits(low):
        high = 2 * low
        while high < MOST and fits(high):
            low, high = high, 2 * high
    elif floor:
        return 0
    else:
        high, low = low, low // 2
        while low and not fits(low):
            high, low = low, low // 2
    while high - low > max(1, low // CLOSE):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    rounded = low - low % ROUND if low > CLOSE * ROUND else low
    return rounded if fits(rounded) else low


def longest_by_processes(work: Workload, cluster: ClusterConfig) -> dict[int, int]:
    """The same by processes, of which each sequence has as many times more or fewer; those that
    cannot share it are left out."""
    found = {}
    for factor in FACTORS:
        processes, sp = work.processes * factor, work.split.sp * factor
        if sp % 1 or processes % 1 or processes > cluster.most_processes:
            continue
        try:
            settings = changed(work.settings, {"parallel.dp": 0, "parallel.sp": int(sp)})
            wider = workload(settings, int(processes), work.vocab_size, work.precision)
        except InputError:
            continue
        tokens, _ = longest([wider], room_of(cluster))
        if tokens:
            found[int(processes)] = tokens
    return found
