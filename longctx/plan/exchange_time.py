"""How long groups of processes take to exchange something: latency and bandwidth, by tier.

Functions take what one process counts: calls, and bytes received in all of them. How many members
of a group sit in each node says how many ports a node has for it.
"""

import math
from dataclasses import dataclass

from longctx.plan.clusters import ClusterConfig, LinkConfig
from longctx.sequence.ledger import Traffic

FREE = LinkConfig(0.0, math.inf)
"""Between a process and itself."""


@dataclass(frozen=True)
class Group:
    """Processes that exchange with one another."""

    size: int
    nodes: int
    """On which they are spread evenly."""
    node: LinkConfig
    """Between two of them in one node."""
    fabric: LinkConfig
    """Between two of them in different nodes."""

    @property
    def per_node(self) -> int:
        """Members in a node."""
        return -(-self.size // self.nodes)

    @property
    def slowest(self) -> LinkConfig:
        """What holds up members that all pass something on at once."""
        return self.fabric if self.nodes > 1 else self.node

    def collective(self, received: float) -> float:
        """Seconds for so many bytes by all-gather, reduce-scatter or all-reduce.

        A ring enters each node once, over as many ports as the node has members.
        """
        if self.size == 1:
            return 0.0
        inside = received / self.node.bandwidth if self.per_node > 1 else 0.0
        from_outside = received * (self.size - self.per_node) / (self.size - 1)
        return max(inside, from_outside / self.per_node / self.fabric.bandwidth)


def group_of(cluster: ClusterConfig, processes: int, size: int, stride: int) -> Group:
    """Every `stride`-th of neighbouring processes, `size` of them, of a run of so many."""
    here, span = cluster.processes_per_node, size * stride
    is_aligned = here % span == 0 or span % here == 0
    spanned = min(-(-span // here) + (not is_aligned), -(-processes // here))
    nodes = min(size, spanned)
    node = cluster.links.get("node", FREE)
    return Group(size, nodes, node, cluster.links.get("fabric", node))


def gathered(group: Group, traffic: Traffic) -> float:
    """All-gather or reduce-scatter: a ring of P - 1 steps, of which one a node leaves it."""
    latency = (group.size - group.nodes) * group.node.latency
    latency += (group.nodes - 1) * group.fabric.latency
    return traffic.calls * latency + group.collective(traffic.received)


def reduced(group: Group, traffic: Traffic) -> float:
    """All-reduce: up and down a tree, within nodes and between them."""
    latency = 2 * math.ceil(math.log2(group.per_node)) * group.node.latency
    latency += 2 * math.ceil(math.log2(group.nodes)) * group.fabric.latency
    return traffic.calls * latency + group.collective(traffic.received)


def traded(group: Group, traffic: Traffic) -> float:
    """All-to-all: every process with every other at once, through its own port."""
    if group.size == 1:
        return 0.0
    inside = (group.per_node - 1) / (group.size - 1)
    times = [traffic.received * inside / group.node.bandwidth]
    if group.nodes > 1:
        times.append(traffic.received * (1 - inside) / group.fabric.bandwidth)
    return traffic.calls * group.slowest.latency + max(times)


def passed(group: Group, traffic: Traffic) -> float:
    """Messages to neighbours, one after another: the one that leaves a node holds up all."""
    if group.size == 1:
        return 0.0
    return traffic.calls * group.slowest.latency + traffic.received / group.slowest.bandwidth


def chained(group: Group, hops: tuple[int, int], chains: float, size: float, blocks: int) -> float:
    """States, `size` bytes for all chains, go from one end of the sequence to the other, by blocks
    that follow one another: as many steps as there are hops, inside nodes and between them, and
    blocks less one, each with a block."""
    inside, across = hops
    times = [
        chains * link.latency + size / blocks / link.bandwidth
        for link in (group.node, group.fabric)
    ]
    behind = (blocks - 1) * times[across > 0] if inside + across else 0.0
    return inside * times[0] + across * times[1] + behind
