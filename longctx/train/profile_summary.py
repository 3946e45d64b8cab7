"""Where the time of a step went: one page of text from the ranges of a profile."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longctx.sequence.ledger import OUTSIDE_LAYERS, Label, Traffic
from longctx.sequence.ranges import EXCHANGE, LAYER, STEP, Range, Recorded

COMPUTED = ("forward", "backward", LAYER)
APART = ("evaluation", "checkpoint")
"""What ranges within count as, whatever they do."""
PARTS = ("step", "compute", EXCHANGE, "data", "optimizer", *APART, "other", "in flight")
"""Figures of a process, in seconds: the whole, parts that add up to it, and exchanges under way."""
TITLES = {EXCHANGE: "exposed exchange", "data": "data wait", "in flight": "exchange under way"}
MOST_ROWS = 16
LEAST_WIDTH = 9
MILLISECONDS = 1e3
NANOSECONDS = 1e-9
CLOSE = 0.02
"""Share of a step that its parts may lack or have too much."""


@dataclass(frozen=True)
class Profile:
    """What the summary is about; ranges and traffic are those of the first process."""

    step: int
    recorded: Recorded
    ranks: list[dict[str, float]]
    """PARTS of each process."""
    traffic: Mapping[Label, Traffic]
    kinds: Sequence[str]
    """Of each layer."""
    device: Mapping[str, float]
    """What `device_times` found."""


def part_of(found: Range) -> str:
    """Which of PARTS a range counts as, but for what lies within it."""
    if found.top in APART:
        return found.top
    if found.kind in COMPUTED:
        return "compute"
    return found.kind if found.kind in (EXCHANGE, "data", "optimizer") else "other"


def parts_of(recorded: Recorded) -> dict[str, float]:
    """PARTS, in seconds; exposed exchange is time in which the process does nothing but wait."""
    parts = dict.fromkeys(PARTS, 0.0)
    for found in recorded.ranges:
        parts[part_of(found)] += found.own * NANOSECONDS
        if found.kind == STEP:
            parts["step"] = (found.end - found.begin) * NANOSECONDS
    parts["in flight"] = covered(_under_way(recorded)) * NANOSECONDS
    total = sum(parts[part] for part in PARTS[1:-1])
    assert abs(total - parts["step"]) <= CLOSE * parts["step"], (total, parts)
    return parts


def covered(ranges: Iterable[Range]) -> int:
    """Nanoseconds in which any of these is."""
    total, reached = 0, 0
    for found in sorted(ranges, key=lambda found: found.begin):
        total += max(0, found.end - max(found.begin, reached))
        reached = max(reached, found.end)
    return total


def device_times(trace: Mapping[str, Any]) -> dict[str, float]:
    """Seconds in which a GPU computes, exchanges, and exchanges without computing; by a trace."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    events = [e for e in trace.get("traceEvents", ()) if e.get("cat") in kinds and "dur" in e]
    spans: dict[bool, list[Range]] = {False: [], True: []}
    for event in events:
        begin = round(event["ts"] * 1e3)
        is_exchange = "nccl" in event["name"].lower()
        end = begin + round(event["dur"] * 1e3)
        spans[is_exchange].append(Range(event["cat"], event["name"], begin, end))
    if not events:
        return {}
    computed, both = covered(spans[False]), covered(spans[False] + spans[True])
    exchanged = covered(spans[True])
    times = {"compute": computed, "exchange": exchanged, "exposed exchange": both - computed}
    return {name: time * NANOSECONDS for name, time in times.items()}


def summarise(profile: Profile) -> str:
    """The page."""
    first = profile.ranks[0]
    blocks = [
        [
            f"Profile of step {profile.step}, {_ms(first['step']).strip()} ms on rank 0",
            "",
            "Exposed exchange: the process waits in a collective and computes nothing. The profile",
            "itself slows a step down; compare shares, and take its true time from metrics.jsonl.",
        ],
        _of_ranks(profile.ranks),
        _of_device(profile.device, first["step"]),
        _of_verbs(profile),
        _of_layers(profile),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _of_ranks(ranks: Sequence[Mapping[str, float]]) -> list[str]:
    columns = [TITLES.get(part, part).rjust(LEAST_WIDTH) for part in PARTS]
    lines = ["Parts of the step, ms; all but the last column add up to the first"]
    lines.append(f"{'rank':6}" + "".join(f"  {column}" for column in columns))
    shown = range(len(ranks))[:MOST_ROWS]
    for rank in shown:
        lines.append(_row(str(rank), [ranks[rank][part] for part in PARTS], columns))
    if len(ranks) > MOST_ROWS:
        lines.append(f"... and {len(ranks) - MOST_ROWS} more ranks; of all:")
        for name, choose in (("least", min), ("most", max)):
            lines.append(_row(name, [choose(r[part] for r in ranks) for part in PARTS], columns))
    step = ranks[0]["step"] or 1.0
    shares = [f"{100 * ranks[0][part] / step:.1f} %" for part in PARTS]
    cells = [share.rjust(len(column) + 2) for share, column in zip(shares, columns)]
    return [*lines, f"{'of 0':6}" + "".join(cells)]


def _row(name: str, seconds: Sequence[float], columns: Sequence[str]) -> str:
    cells = [_ms(x).strip().rjust(len(column) + 2) for x, column in zip(seconds, columns)]
    return f"{name:6}" + "".join(cells)


def _of_device(device: Mapping[str, float], step: float) -> list[str]:
    if not device:
        return []
    lines = ["On the GPU of rank 0, ms; the parts above are those of its host thread"]
    idle = step - device["compute"] - device["exposed exchange"]
    return [*lines, *(f"{name:>18} {_ms(x)}" for name, x in (*device.items(), ("idle", idle)))]


def _of_verbs(profile: Profile) -> list[str]:
    exposed: dict[Any, float] = defaultdict(float)
    flights: dict[Any, list[Range]] = defaultdict(list)
    for found in profile.recorded.ranges:
        if part_of(found) == EXCHANGE:
            exposed[_verb(found.name)] += found.own * NANOSECONDS
    for found in _under_way(profile.recorded):
        flights[_verb(found.name)].append(found)
    calls: dict[Any, Traffic] = {}
    for label, traffic in profile.traffic.items():
        before = calls.get(_verb(label), Traffic(0, 0))
        total = before.calls + traffic.calls, before.received + traffic.received
        calls[_verb(label)] = Traffic(*total)
    if not exposed:
        return []
    lines = ["Exchanges of rank 0 by verb; what is under way may overlap with compute"]
    lines.append(f"{'':34}   exposed ms  under way ms  calls  MB received")
    for verb in sorted(exposed, key=lambda verb: -exposed[verb]):
        traffic = calls.get(verb, Traffic(0, 0))
        flight = covered(flights[verb]) * NANOSECONDS
        lines.append(
            f"{verb[:34]:34} {_ms(exposed[verb]):>12} {_ms(flight):>13} {traffic.calls:6}"
            f" {traffic.received / 1e6:12.3f}"
        )
    return lines


def _of_layers(profile: Profile) -> list[str]:
    table: dict[int, list[float]] = {n: [0.0] * 3 for n in range(len(profile.kinds))}
    outside = [0.0] * 3
    for found in profile.recorded.ranges:
        part, time = part_of(found), found.own * NANOSECONDS
        if part == "compute":
            is_backward = found.kind == "backward" or getattr(found.name, "backward", False)
            table.get(getattr(found.name, "layer", -1), outside)[is_backward] += time
        elif part == EXCHANGE:
            table.get(getattr(found.name, "layer", OUTSIDE_LAYERS), outside)[2] += time
    lines = ["Layers of rank 0, ms; what is computed once more is in the backward pass"]
    lines.append(f"{'':34}      forward     backward  exposed exchange")
    kept = sorted(sorted(table, key=lambda n: -sum(table[n]))[:MOST_ROWS])
    rows = [(f"layer {n}, {profile.kinds[n]}", table[n]) for n in kept]
    if len(table) > len(kept):
        rest = [times for n, times in table.items() if n not in kept]
        rows.append((f"the {len(rest)} other layers", [sum(column) for column in zip(*rest)]))
    rows.append(("outside layers", outside))
    for name, (forward, backward, waited) in rows:
        lines.append(f"{name[:34]:34} {_ms(forward):>12} {_ms(backward):>12} {_ms(waited):>17}")
    return lines


def _under_way(recorded: Recorded) -> list[Range]:
    """Exchanges from start to arrival; those that a process just waits for included."""
    waits = [found for found in recorded.ranges if part_of(found) == EXCHANGE]
    return recorded.flights + waits


def _verb(label: Any) -> str:
    if not isinstance(label, Label):
        return str(label)
    return f"{label.verb} (backward)" if label.backward else label.verb


def _ms(seconds: float) -> str:
    return f"{seconds * MILLISECONDS:10.2f}"
