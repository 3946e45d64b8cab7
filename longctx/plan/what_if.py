"""Simulates a step of a run, for what formulas cannot say: what delays cost it."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from longctx.errors import InputError
from longctx.plan.choices import Changes, changed, joined, streams
from longctx.plan.clusters import ClusterConfig
from longctx.plan.events import STEADY, Jitter, simulate
from longctx.plan.scene import Scene
from longctx.plan.workload import Workload, workload

SPREAD = 0.05
"""Deviation of how long each operation takes, by what it should."""
SLOWER = 1.1
"""Times that the computations of the slow process take."""
SEEDS = range(5)
PREFIXES: Sequence[Changes] = [
    {"parallel.prefix": name} for name in ("allgather", "scan", "serial")
]


class WhatIf(NamedTuple):
    """A step with one choice of transports; seconds."""

    prefix: str
    """How states travel; empty if none do."""
    stream: str
    """How keys and values travel; empty if none do."""
    gather_heads: int
    predicted: float
    """By formulas."""
    steady: float
    """Simulated, with nothing late."""
    usual: float
    """Where everything takes a little more or less: the median of some draws."""
    worst: float
    """Of these."""
    one_slow: float
    """Where one process computes slower."""
    ranks: tuple[int, int]
    """Simulated, and those that there are."""
    layers: tuple[int, int]
    """The same."""


def what_if(work: Workload, cluster: ClusterConfig) -> list[WhatIf]:
    """The run as it is, and with other transports of what its layers exchange."""
    first = Scene(work, cluster)
    ways = [*(PREFIXES if "prefix" in first.verbs else ())]
    ways += streams() if "stream" in first.verbs else []
    found, seen = [_outcome(first)], [work.split]
    for way in ways:
        try:
            same = {"parallel.placement": work.split.placement}
            settings = changed(work.settings, joined(way, same))
            other = workload(settings, work.processes, work.vocab_size, work.precision)
        except InputError:  # these heads or this placement do not allow it
            continue
        if other.split not in seen:
            seen.append(other.split)
            found.append(_outcome(Scene(other, cluster)))
    return found


def _outcome(scene: Scene) -> WhatIf:
    """Of all simulations."""
    program, way = scene.program(), scene.work.split.transports

    def seconds(jitter: Jitter) -> float:
        return scene.whole(simulate(program, scene.links, jitter).seconds)

    drawn = [seconds(Jitter(SPREAD, SPREAD, seed=seed)) for seed in SEEDS]
    slow = Jitter(slow={scene.ranks // 2: SLOWER})
    rest = scene.compute.head + scene.time.optimizer
    has_stream = "stream" in scene.verbs
    return WhatIf(
        prefix=way.prefix if "prefix" in scene.verbs else "",
        stream=way.stream if has_stream else "",
        gather_heads=way.gather_heads if has_stream else 0,
        predicted=scene.time.total,
        steady=seconds(STEADY),
        usual=statistics.median(drawn),
        worst=max(drawn),
        one_slow=seconds(slow) + (SLOWER - 1) * rest,
        ranks=(scene.ranks, scene.work.split.dp * scene.work.split.sp),
        layers=(len(scene.letters), len(scene.all_letters)),
    )
