"""How long the optimizer's update takes on one process."""

from math import prod

from longctx.plan.clusters import ClusterConfig
from longctx.plan.sizes import hollow_model, parameters_of
from longctx.plan.workload import Workload

UPDATE_BYTES = 48
"""What an update reads and writes for a weight in fp32: AdamW 28, the norms of gradient and change
and clipping the rest. Muon's is taken to be no less."""


def own_weights(work: Workload) -> float:
    """Weights that a process updates."""
    split = work.split
    total = parameters_of(work.settings.model, work.vocab_size).total / split.tp
    return total if split.engine == "none" else total / (split.dp * split.sp // split.replicas)


def update_seconds(work: Workload, cluster: ClusterConfig) -> float:
    """Bound by memory: the device's, or the host's, of which a process has about what its link to
    it carries; and Muon's products."""
    bandwidth = cluster.memory_bandwidth
    if work.settings.memory.optimizer != "device" and cluster.device == "cuda":
        bandwidth = cluster.links["host"].bandwidth
    return UPDATE_BYTES * own_weights(work) / bandwidth + muon_seconds(work, cluster)


def muon_seconds(work: Workload, cluster: ClusterConfig) -> float:
    """Newton-Schulz iterations of the process that has most to do, three products each: its share
    of all matrices, or the largest where there are more processes than matrices."""
    if work.settings.optim.kind != "muon":
        return 0.0
    split, total, most, largest = work.split, 0, 0, 1
    model = hollow_model(work.settings.model, work.vocab_size, (0, 1))
    for layer, count in model.layers():
        for shape in (w.shape for w in layer.weights if w.is_hidden_matrix):
            small, large = sorted(shape[-2:])
            flops = prod(shape[:-2]) * (4 * small**2 * large + 2 * small**3)
            total, most = total + count * flops, max(most, flops)
            largest = max(largest, large)
    holders = split.dp * split.sp * split.tp // split.replicas
    rate = cluster.rate("matmul", largest, work.precision)
    return work.settings.optim.ns_steps * max(total / holders, most) / rate
