"""How long a process waits in a step for weights, sums of gradients and its host."""

from longctx.parallel.muon import MUON
from longctx.plan import exchange_time
from longctx.plan.traffic_engine import ESTIMATED, GRADIENTS, WEIGHTS
from longctx.plan.update_time import muon_seconds
from longctx.plan.waiting import NOTHING, Exchanges, Waits
from longctx.sequence.ledger import OUTSIDE_LAYERS, Label, Traffic

HOST = "host"
"""Stands for a verb: what moves between a device and its host."""
WEIGHT_BYTES = 4
"""Of a weight, and of its gradient, on the host."""


def engine_waits(exchanges: Exchanges) -> Waits:
    """What the engine sends, and what no layer asks for."""
    waits, traffic = Waits(), exchanges.traffic
    if exchanges.work.split.engine == "fsdp2":
        _sharded(exchanges, waits)
    for label, each in traffic.items():
        is_sharded = label.verb in (WEIGHTS, GRADIENTS) and exchanges.work.split.engine == "fsdp2"
        if label.layer == OUTSIDE_LAYERS and not is_sharded:
            _outside(exchanges, waits, label.verb, each)
    return waits


def _outside(exchanges: Exchanges, waits: Waits, verb: str, traffic: Traffic) -> None:
    groups, is_on_gpu = exchanges.groups, exchanges.compute.cluster.device == "cuda"
    if verb.endswith(ESTIMATED):
        seconds = exchange_time.gathered(groups["holders"], traffic)
        stage = exchanges.work.settings.parallel.zero_stage
        is_hidden = is_on_gpu and (verb.startswith(GRADIENTS) or stage == 3)
        waits.beside(verb.removesuffix(ESTIMATED), seconds, _beside(exchanges, verb) * is_hidden)
    elif verb == MUON.verb:
        seconds = exchange_time.traded(groups["copy"], traffic)
        waits.beside(verb, seconds, muon_seconds(exchanges.work, exchanges.compute.cluster))
    elif verb.startswith("shared") or verb.startswith("partial"):
        waits.beside(verb, exchange_time.reduced(groups["tensor"], traffic))
    else:
        group = groups["holders" if verb == GRADIENTS else "all"]
        waits.beside(verb, exchange_time.reduced(group, traffic))


def _beside(exchanges: Exchanges, verb: str) -> float:
    """Work of layers that ZeRO's gathers or sums are beside."""
    letters, layers = exchanges.work.settings.model.letters, exchanges.compute.layers
    backward = sum(layers[letter].backward for letter in letters)
    if verb.startswith(GRADIENTS):
        return backward
    return backward + sum(layers[letter].forward for letter in letters)


def _sharded(exchanges: Exchanges, waits: Waits) -> None:
    """FSDP2: the next layer's weights come, and the last one's gradients go, while one computes.

    What is outside of layers comes first and goes last. On a CPU nothing is beside anything.
    """
    letters, layers = exchanges.work.settings.model.letters, exchanges.compute.layers
    work = exchanges.compute.cluster.device == "cuda"
    each = [
        (gathered_weights(exchanges, n) / 2, summed_gradients(exchanges, n))
        for n in range(len(letters))
    ]
    before = 0.0
    for (weights, _), letter in zip(each, letters):
        waits.beside(WEIGHTS, weights, before * work)
        before = layers[letter].forward
    before, leaving = 0.0, 0.0
    for (weights, gradients), letter in reversed(list(zip(each, letters))):
        exposed = max(0.0, weights + leaving - before * work)
        share = exposed / (weights + leaving) if exposed else 0.0
        waits.add(WEIGHTS, weights, share * weights)
        waits.add(GRADIENTS, leaving, share * leaving)
        before, leaving = layers[letter].backward, gradients
    waits.beside(WEIGHTS, gathered_weights(exchanges, OUTSIDE_LAYERS))
    waits.beside(GRADIENTS, leaving + summed_gradients(exchanges, OUTSIDE_LAYERS))


def gathered_weights(exchanges: Exchanges, layer: int) -> float:
    """Seconds of all gathers of a layer's weights in a step."""
    traffic = exchanges.traffic.get(Label(layer, WEIGHTS), NOTHING)
    return exchange_time.gathered(exchanges.groups["shards"], traffic)


def summed_gradients(exchanges: Exchanges, layer: int) -> float:
    """Seconds of all sums of a layer's gradients: within shards, then over replicas."""
    traffic = exchanges.traffic.get(Label(layer, GRADIENTS), NOTHING)
    shards, replicas = (exchanges.groups[name] for name in ("shards", "replicas"))
    if replicas.size == 1:
        return exchange_time.gathered(shards, traffic)
    if shards.size == 1:
        return exchange_time.reduced(replicas, traffic)
    calls = traffic.calls // 2
    inside, across = shards.size - 1, 2 * (replicas.size - 1) / replicas.size
    within = traffic.received * inside / (inside + across)
    seconds = exchange_time.gathered(shards, Traffic(calls, within))
    return seconds + exchange_time.reduced(replicas, Traffic(calls, traffic.received - within))


def host_waits(exchanges: Exchanges, own_weights: float) -> Waits:
    """What lies on the host: inputs of checkpointed layers, and weights and their gradients."""
    waits, memory = Waits(), exchanges.work.settings.memory
    compute, model = exchanges.compute, exchanges.work.settings.model
    if compute.cluster.device == "cpu":
        return waits
    link, passes = compute.cluster.links[HOST], len(exchanges.work.micro_rows)
    if memory.activations == "cpu":
        size = compute.tokens * model.width * compute.widths.state
        seconds = passes * link.latency + size / link.bandwidth
        for letter in model.letters:
            if memory.of_layer(letter) != "none":
                waits.beside(HOST, seconds, compute.layers[letter].forward)
                waits.beside(HOST, seconds, compute.layers[letter].backward)
    if memory.weights != "device" or memory.optimizer != "device":
        times = 3 * passes if memory.weights != "device" else 2
        seconds = times * own_weights * WEIGHT_BYTES / link.bandwidth
        waits.beside(HOST, seconds, _beside(exchanges, WEIGHTS))
    return waits
