"""Who holds up a step, judged from what every process says it does."""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass


@dataclass(frozen=True)
class Note:
    """What a process does while a step hangs."""

    step: int
    waits: str
    """The exchange that it waits in; empty if it is in none."""
    place: str
    """The line of Python that it is at."""


def verdict(notes: Mapping[int, Note], asked: Set[int]) -> str:
    """Which ranks the others wait for: those that do not answer, or that are in no exchange."""
    silent = sorted(asked - notes.keys())
    told = [f"{ranks(silent)} {_verb(silent, 'does', 'do')} not answer"] if silent else []
    busy = {r: f"step {n.step}, {n.place}" for r, n in notes.items() if not n.waits}
    for place, who in _grouped(busy):
        told.append(f"{ranks(who)} {_verb(who, 'is', 'are')} in no exchange but at {place}")
    waiting = {r: f"{n.waits} of step {n.step}" for r, n in notes.items() if n.waits}
    for place, who in _grouped(waiting):
        told.append(f"{ranks(who)} {_verb(who, 'waits', 'wait')} in {place}")
    return "; ".join(told)


def ranks(numbers: Iterable[int]) -> str:
    """Ranks in words, neighbours as a range."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    names = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    is_one = len(runs) == 1 and len(runs[0]) == 1
    return f"{'rank' if is_one else 'ranks'} {', '.join(names)}"


def _verb(who: list[int], one: str, many: str) -> str:
    return one if len(who) == 1 else many


def _grouped(places: Mapping[int, str]) -> list[tuple[str, list[int]]]:
    """Ranks by place, the fewest first."""
    groups: dict[str, list[int]] = {}
    for rank, place in sorted(places.items()):
        groups.setdefault(place, []).append(rank)
    return sorted(groups.items(), key=lambda group: len(group[1]))
