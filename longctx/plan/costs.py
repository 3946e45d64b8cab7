"""Predicts how long a step of training takes, from FLOPs, bytes and what a cluster can do."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from longctx.plan.clusters import ClusterConfig
from longctx.plan.flops import flops_of
from longctx.plan.kernel_time import Compute
from longctx.plan.update_time import own_weights, update_seconds
from longctx.plan.waiting import Exchanges
from longctx.plan.waiting_engine import engine_waits, host_waits
from longctx.plan.workload import Workload

BACKWARD_FLOPS = 2
"""FLOPs of the backward pass by those of the forward pass, as MFU counts them."""
FEW_RANKS = 64
"""Ranks of a sequence of which each is looked at where documents differ."""


class RunCost(NamedTuple):
    """What training on some number of tokens takes."""

    steps: float
    seconds: float
    device_hours: float
    price: float
    """0 if the cluster's file has no price."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the process that takes longest."""

    compute: dict[str, float]
    """By kind: mlp, head, kinds of mixers, and `norms and sums`, which memory bounds."""
    exposed: dict[str, float]
    """In which it waits, by verb; `host` is what moves to the host and back."""
    hidden: dict[str, float]
    """Of the same beside which it computes."""
    optimizer: float
    """The update."""
    fixed: float
    """What the cluster's file says of every step."""
    calling: float
    """What it says of every exchange, for all of them."""
    tokens: int
    """Of a step, on all processes."""
    processes: int
    flops: float
    """Of all processes, both ways, as MFU counts them."""
    peak: float
    """FLOP/s of a device."""
    price_per_device_hour: float

    @property
    def total(self) -> float:
        """All that it does or waits for."""
        parts = sum(self.compute.values()) + sum(self.exposed.values())
        return parts + self.optimizer + self.fixed + self.calling

    @property
    def mfu(self) -> float:
        """Model FLOPs as a share of what devices could do."""
        return self.flops / self.total / self.peak / self.processes

    @property
    def tokens_per_second(self) -> float:
        """Of all processes."""
        return self.tokens / self.total

    def cost(self, tokens: float) -> RunCost:
        """Of so many tokens."""
        steps = tokens / self.tokens
        seconds = steps * self.total
        hours = seconds * self.processes / 3600
        return RunCost(steps, seconds, hours, hours * self.price_per_device_hour)


def step_time(work: Workload, cluster: ClusterConfig) -> StepTime:
    """Of the slowest process; InputError if the cluster's file lacks what this needs."""
    slowest = slowest_of(work, cluster)
    exchanges, weights = Exchanges(slowest), own_weights(work)
    parts = exchanges.waits(), engine_waits(exchanges), host_waits(exchanges, weights)
    return StepTime(
        compute=slowest.by_kind,
        exposed=_added(part.exposed for part in parts),
        hidden=_added(part.hidden for part in parts),
        optimizer=update_seconds(work, cluster),
        fixed=cluster.fixed_seconds,
        calling=cluster.call_seconds * sum(each.calls for each in exchanges.traffic.values()),
        tokens=work.tokens_per_step,
        processes=work.processes,
        flops=(1 + BACKWARD_FLOPS) * _forward_flops(work),
        peak=cluster.peak(work.precision),
        price_per_device_hour=cluster.price_per_device_hour,
    )


def slowest_of(work: Workload, cluster: ClusterConfig) -> Compute:
    """What the process that computes most of a sequence does."""
    found = (Compute(work, cluster, rank) for rank in _candidates(work))
    return max(found, key=lambda compute: sum(compute.by_kind.values()))


def _forward_flops(work: Workload) -> float:
    """Of all processes: as if one had it all."""
    alone = replace(work.split, dp=1, sp=1, tp=1, replicas=1, placement="contiguous")
    transports = replace(alone.transports, heads=1)
    whole = replace(work, split=replace(alone, transports=transports))
    return sum(flops_of(whole, 0).values())


def _added(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total = Counter[str]()
    for part in parts:
        for verb, seconds in part.items():
            total[verb] += seconds
    return dict(total)


def _candidates(work: Workload) -> list[int]:
    """Ranks among which the one that computes most is: the last tokens see most others, so it has
    them, unless documents end elsewhere."""
    ranks = work.split.sp
    if work.documents and ranks <= FEW_RANKS:
        return list(range(ranks))
    return sorted({0, work.placement.order[-1][0]})
