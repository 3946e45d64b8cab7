"""What may be chosen about a run without changing what it learns, and how a choice is made."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from longctx.train.settings import Settings

Changes = Mapping[str, Any]
"""Values by dotted name of the field."""

TILE = 4096
"""Tokens that a feed-forward layer computes at a time where memory is short."""
MOST_HEADS = 128
"""Ranks that may trade sequence for heads; more heads than that are rare."""
SPREAD: Changes = {"parallel.engine": "fsdp2", "parallel.replicas": 1}
ON_HOST: Changes = {"memory.weights": "cpu", "memory.optimizer": "cpu"}
ON_DEVICE: Changes = {"memory.weights": "device", "memory.optimizer": "device"}


def changed(settings: Settings, changes: Changes) -> Settings:
    """The settings with other values; InputError if they contradict one another."""
    tables: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        table, _, field = name.partition(".")
        tables.setdefault(table, {})[field] = value
    new = {table: replace(getattr(settings, table), **own) for table, own in tables.items()}
    return replace(settings, **new)


def differences(settings: Settings, changes: Changes) -> dict[str, Any]:
    """Those of the changes that change something."""

    def value(name: str) -> Any:
        table, _, field = name.partition(".")
        return getattr(getattr(settings, table), field)

    return {name: new for name, new in changes.items() if value(name) != new}


def divisors(number: int) -> list[int]:
    """All of them, rising."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def meshes(processes: int, node: int, batch_size: int) -> list[Changes]:
    """Ways to share sequences and heads; heads are shared within a node of so many processes."""
    found = []
    for tp in divisors(processes):
        for sp in divisors(processes // tp):
            if tp <= node and batch_size % (processes // (sp * tp)) == 0:
                found.append({"parallel.dp": 0, "parallel.sp": sp, "parallel.tp": tp})
    return found


def head_groups(sp: int) -> list[Changes]:
    """Ways to trade sequence for heads; what else depends on it is chosen anew."""
    auto = {"parallel.placement": "auto", "parallel.prefix": "auto"}
    return [{"parallel.heads": n, **auto} for n in divisors(sp) if n <= MOST_HEADS]


def placements() -> list[Changes]:
    """Which parts of a sequence a rank may hold."""
    return [{"parallel.placement": name} for name in ("contiguous", "zigzag", "mirror")]


def prefixes() -> list[Changes]:
    """How states may travel; a serial chain is a scan of one block, and never faster."""
    return [{"parallel.prefix": name} for name in ("allgather", "scan", "ulysses")]


def streams() -> list[Changes]:
    """How keys and values may travel: all heads at once, one at a time, or round a ring."""
    ways = (("allgather", 0), ("allgather", 1), ("ring", 0))
    return [{"parallel.stream": way, "parallel.gather_heads": n} for way, n in ways]


def engines(holders: int, node: int) -> list[Changes]:
    """Who may hold the weights: shards over all `holders`, over those of a node, or copies."""
    within = {holders // n for n in (node,) if holders % n == 0}
    spread = [joined(SPREAD, {"parallel.replicas": n}) for n in sorted({1, *within})]
    return [*spread, {"parallel.engine": "none", "parallel.replicas": 1}]


def weights() -> list[Changes]:
    """How FSDP2 may send weights."""
    return [{"parallel.weights": name} for name in ("fp32", "bf16")]


def policies(device: str, tokens: int) -> list[Changes]:
    """What layers may keep of so many tokens in flight, from what takes least time to what takes
    least memory; a CPU has no other memory to go to."""
    tile = TILE if tokens > TILE else 0
    ways = (
        ("none", 0, "device"),
        ("keep", 0, "device"),
        ("keep", tile, "device"),
        ("keep", tile, "cpu"),
        ("full", tile, "device"),
        ("full", tile, "cpu"),
    )
    names = ("memory.checkpointing", "memory.mlp_tokens", "memory.activations")
    return [
        dict(zip(names, way)) for way in dict.fromkeys(ways) if device == "cuda" or way[2] != "cpu"
    ]


def micro_batches(rows: int) -> list[Changes]:
    """Sequences of a pass, from all of a process (0) to one."""
    return [{"train.micro_batch": n % rows} for n in sorted(divisors(rows), reverse=True)]


def joined(*changes: Changes) -> dict[str, Any]:
    """All of them; later ones win."""
    return {name: value for each in changes for name, value in each.items()}


def savings(device: str, tokens: int, rows: int) -> Sequence[Changes]:
    """Ways to take less memory for a pass over so many tokens of a process and rows of a step, from
    the fastest; the last takes least."""
    passes = micro_batches(rows)
    ways = [
        joined(ON_DEVICE, policy, size)
        for policy in policies(device, tokens)
        for size in passes[:: max(1, len(passes) - 1)]
    ]
    return [*ways, joined(ways[-1], ON_HOST)] if device == "cuda" else ways
