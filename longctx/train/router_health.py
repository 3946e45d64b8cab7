"""How evenly routers spread tokens, from the figures that mixers tell by `router/ROUTER/NAME`."""

import math
from collections.abc import Mapping
from typing import Any

MOST_SHARES = 64
"""Elements that a row keeps of a list of figures."""
MOST_ROUTERS = 256
SHARES = ("load", "gate", "share_kept", "share_global")
"""Lists over the heads, clusters or parts of a router: the share of tokens that each gets."""
HEALTH = ("min", "max", "evenness")
BESIDE = ("entropy", "drop_rate")
PREFIX = "router/"


def router_health(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures, lists cut to their first elements, and beside each list of shares the least and
    largest of them and their evenness.

    Evenness is their entropy over that of equal ones: 1 if all are equal, 0 if one has all.
    """
    health: dict[str, Any] = {}
    for name, value in figures.items():
        if not (name.startswith(PREFIX) and isinstance(value, list)):
            health[name] = value
            continue
        health[name] = value[:MOST_SHARES]
        if name.rpartition("/")[2] in SHARES:
            health |= {f"{name}_{what}": x for what, x in zip(HEALTH, _health(value))}
    return health


def health_table(row: Mapping[str, Any]) -> list[list[Any]]:
    """A line of names, and one for each list of shares in a row of metrics."""
    lines = [["router", "shares", *HEALTH, *BESIDE]]
    for name in row:
        router, _, last = name.removeprefix(PREFIX).rpartition("/")
        if not (name.startswith(PREFIX) and last in SHARES) or len(lines) > MOST_ROUTERS:
            continue
        beside = [row.get(f"{PREFIX}{router}/{what}") for what in BESIDE]
        lines.append([router, last, *(row.get(f"{name}_{what}") for what in HEALTH), *beside])
    return lines


def _health(shares: list[float]) -> tuple[float, float, float | None]:
    total, least, largest = sum(shares), min(shares), max(shares)
    if not (math.isfinite(total) and least >= 0 and total > 0):
        return least, largest, None
    if len(shares) == 1:
        return least, largest, 1.0
    parts = [share / total for share in shares if share > 0]
    entropy = -sum(part * math.log(part) for part in parts)
    return least, largest, entropy / math.log(len(shares))
