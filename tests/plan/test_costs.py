"""Predicted times: what can be reckoned by hand, limits, and which way they must go."""

import contextlib
import math
from dataclasses import replace

import pytest

from longctx.config import decode
from longctx.errors import InputError
from longctx.plan.clusters import KERNELS, ClusterConfig, LinkConfig, RateConfig
from longctx.plan.costs import StepTime, step_time
from longctx.plan.flops import layer_flops
from longctx.plan.kernel_time import MOVING, Compute, kernels_of
from longctx.plan.traffic import traffic_of
from longctx.plan.update_time import muon_seconds, own_weights
from longctx.plan.waiting import Exchanges
from longctx.plan.workload import Workload, workload
from longctx.train.settings import Settings
from tests.mixers.examples import all_variants

WIDTH, HEADS, VOCABULARY, HIDDEN = 16, 4, 30, 40
CLUSTER = ClusterConfig(
    name="round",
    source="made up",
    device="cuda",
    processes_per_node=4,
    most_nodes=64,
    memory_gib=1.0,
    host_memory_gib=8.0,
    memory_bandwidth=1e6,
    peak_flops={"bf16": 1e7, "fp32": 1e6},
    rates_precision="fp32",
    price_per_device_hour=3.0,
    fixed_seconds=0.25,
    links={
        "node": LinkConfig(1e-6, 1e6),
        "fabric": LinkConfig(1e-5, 1e5),
        "host": LinkConfig(0, 1e5),
    },
    rates={name: RateConfig((1,), (5e5,)) for name in KERNELS},
)
LINEAR = {"kind": "linear", "num_heads": HEADS, "gate": "none"}
SOFTMAX = {"kind": "softmax", "num_heads": HEADS, "num_kv_heads": 2}
DELTA = {"kind": "gdn", "num_heads": HEADS}


def work(processes: int = 1, pattern: str = "LS", seq_len: int = 64, **tables) -> Workload:
    """A small run; more tables of a config by name."""
    train = {"seq_len": seq_len, "batch_size": 4, "micro_batch": 2} | tables.pop("train", {})
    model = {
        "width": WIDTH,
        "depth": len(pattern),
        "pattern": pattern,
        "mlp_hidden": HIDDEN,
        "mixers": {"L": LINEAR, "S": SOFTMAX, "D": DELTA},
    }
    settings = decode(Settings, {"model": model, "train": train} | tables)
    return workload(settings, processes, VOCABULARY, "fp32")


def time(processes: int = 1, cluster: ClusterConfig = CLUSTER, **described) -> StepTime:
    return step_time(work(processes, **described), cluster)


def linked(**links: LinkConfig) -> ClusterConfig:
    """The cluster with other links."""
    return replace(CLUSTER, links=CLUSTER.links | links)


# Computing


def test_a_process_alone_computes_what_its_flops_take():
    alone, tokens = time(), 4 * 64
    mlp = 2 * tokens * 2 * 3 * WIDTH * HIDDEN * 3
    assert alone.compute["mlp"] == pytest.approx(mlp / 5e5)
    seen = 4 * (64 * 65 // 2)
    weights = 2 * WIDTH * WIDTH + 2 * WIDTH * (WIDTH // 2)
    core = 4 * WIDTH * seen * (1 + 2.5)
    softmax = (2 * tokens * weights * 3 + core) / 5e5
    assert alone.compute["softmax"] == pytest.approx(softmax)
    head = 2 * tokens * WIDTH * VOCABULARY * 3 / 5e5 + 8 * tokens * VOCABULARY * 4 / 1e6
    assert alone.compute["head"] == pytest.approx(head)
    moving = 2 * tokens * (14 * WIDTH * 4 + 3 * HIDDEN * 4) * 3 / 1e6
    assert alone.compute[MOVING] == pytest.approx(moving)
    assert sum(alone.exposed.values()) == sum(alone.hidden.values()) == 0
    assert alone.optimizer == pytest.approx(48 * own_weights(work()) / 1e6)
    parts = sum(alone.compute.values()) + alone.optimizer + 0.25
    assert alone.total == pytest.approx(parts)


def test_mfu_and_costs_follow_from_the_total():
    alone = time()
    assert alone.mfu == pytest.approx(alone.flops / alone.total / 1e6)
    assert alone.tokens_per_second == pytest.approx(256 / alone.total)
    cost = alone.cost(2560)
    assert cost == pytest.approx((10, 10 * alone.total, alone.total / 360, 3 * alone.total / 360))
    whole = time(8, parallel={"sp": 4})
    assert whole.flops == pytest.approx(alone.flops)


def test_more_memory_saved_is_more_computed():
    none, keep, full = (
        Compute(work(memory={"checkpointing": policy}), CLUSTER, 0).layers
        for policy in ("none", "keep", "full")
    )
    flops = layer_flops(work(), 0)
    assert none["S"].core.repeated == keep["S"].core.repeated == none["L"].core.repeated == 0
    assert full["S"].core.repeated == full["S"].core.forward == pytest.approx(flops["S"].core / 5e5)
    assert keep["L"].core.repeated == full["L"].core.repeated == full["L"].core.forward
    # a repeated pass ends before the last of three matrices
    assert full["S"].mlp.repeated == pytest.approx(full["S"].mlp.forward * 2 / 3)
    tiled = Compute(work(memory={"mlp_tokens": 8}), CLUSTER, 0).layers["S"]
    assert tiled.mlp.repeated == tiled.mlp.forward
    assert tiled.projections.repeated == 0


def test_the_slowest_rank_is_the_one_that_sees_most():
    contiguous, zigzag = (
        time(4, pattern="S", parallel={"sp": 4, "placement": name}).compute["softmax"]
        for name in ("contiguous", "zigzag")
    )
    weights = 4 * 16 * 2 * (2 * WIDTH * WIDTH + WIDTH * WIDTH) * 3 / 5e5
    ratio = (16 * (49 + 64) / 2) / (64 * 65 / 2 / 4)
    assert (contiguous - weights) / (zigzag - weights) == pytest.approx(ratio)


def test_documents_make_softmax_layers_cheaper():
    whole = work(2, parallel={"sp": 2})
    packed = replace(whole, documents=(tuple(range(0, 64, 8)),) * 2)
    before, after = (step_time(each, CLUSTER).compute["softmax"] for each in (whole, packed))
    assert after < before


def test_every_kind_of_mixer_has_a_class_of_kernels():
    found = {config.kind: kernels_of(config) for _, config in all_variants()}
    assert set(found.values()) == set(KERNELS) - {"matmul"}
    for kind, kernels in {
        "softmax": "softmax",
        "moh": "softmax",
        "mamba2": "linear",
        "gdn": "delta",
        "titans": "delta",
        "nsa": "sparse",
        "mosa": "sparse",
    }.items():
        assert found[kind] == kernels


# Waiting


def waits_of(processes: int, verb: str, cluster: ClusterConfig = CLUSTER, **described) -> float:
    """Seconds of a verb, exposed or not."""
    found = time(processes, cluster, **described)
    return found.exposed.get(verb, 0.0) + found.hidden.get(verb, 0.0)


def test_states_of_a_gather_and_of_chains_take_what_formulas_say():
    state = HEADS * (WIDTH // HEADS) ** 2 * 4 * 2
    parallel = {"sp": 4, "placement": "contiguous"}
    ways = {
        name: waits_of(4, "prefix", pattern="L", parallel=parallel | {"prefix": name})
        for name in ("allgather", "scan", "serial")
    }
    passes = 2 * 2
    assert ways["allgather"] == pytest.approx(passes * (3e-6 + 3 * state / 1e6))
    assert ways["scan"] == pytest.approx(passes * (4 - 2 + 4) * (1e-6 + state / 4 / 1e6))
    assert ways["serial"] == pytest.approx(passes * 3 * (1e-6 + state / 1e6))


def test_a_zigzag_chain_goes_there_and_back():
    state = HEADS * (WIDTH // HEADS) ** 2 * 4 * 2
    parallel = {"sp": 4, "placement": "zigzag", "prefix": "scan"}
    seconds = waits_of(4, "prefix", pattern="L", parallel=parallel)
    assert seconds == pytest.approx(4 * (2 * 3 + 4 - 1) * (1e-6 + state / 4 / 1e6))


@pytest.mark.parametrize("placement", ["contiguous", "zigzag"])
def test_a_chain_of_two_ranks_is_no_other(placement):
    state = HEADS * (WIDTH // HEADS) ** 2 * 4 * 2
    parallel = {"sp": 2, "placement": placement, "prefix": "scan"}
    hops = 1 if placement == "contiguous" else 2
    seconds = waits_of(2, "prefix", pattern="L", parallel=parallel)
    assert seconds == pytest.approx(4 * (hops + 4 - 1) * (1e-6 + state / 4 / 1e6))


def test_a_chain_pays_the_fabric_where_it_leaves_a_node():
    state = HEADS * (WIDTH // HEADS) ** 2 * 4 * 2
    parallel = {"sp": 8, "placement": "contiguous", "prefix": "serial"}
    inside, across = 1e-6 + state / 1e6, 1e-5 + state / 1e5
    seconds = waits_of(8, "prefix", pattern="L", parallel=parallel)
    assert seconds == pytest.approx(4 * (6 * inside + across))


def test_what_is_serial_is_waited_for_and_a_scan_is_beside_work():
    parallel = {"sp": 4, "placement": "contiguous"}
    serial, scan = (
        time(4, pattern="L", parallel=parallel | {"prefix": name}) for name in ("serial", "scan")
    )
    assert serial.hidden["prefix"] == 0 < serial.exposed["prefix"]
    assert scan.exposed["prefix"] == 0 < scan.hidden["prefix"]


def test_gradients_of_a_delta_rule_are_waited_for():
    found = time(4, pattern="D", parallel={"sp": 4, "prefix": "allgather"})
    rich = time(4, linked(node=LinkConfig(1e-9, 1e12)), pattern="D", parallel={"sp": 4})
    assert found.exposed["prefix"] > 0 < found.hidden["prefix"]
    assert sum(rich.exposed.values()) < 1e-3 * sum(rich.compute.values())


PARALLEL = (
    {"sp": 8},
    {"sp": 8, "stream": "ring"},
    {"sp": 8, "heads": 2},
    {"sp": 8, "prefix": "ulysses", "heads": 4},
    {"sp": 4, "replicas": 2},
    {"sp": 2, "tp": 2},
    {"sp": 8, "engine": "none"},
    {"sp": 8, "prefix": "scan", "gather_heads": 1},
)


@pytest.mark.parametrize("parallel", PARALLEL, ids=str)
def test_without_latency_and_with_endless_bandwidth_nobody_waits(parallel):
    free = LinkConfig(0.0, math.inf)
    cluster = linked(node=free, fabric=free, host=free)
    found = time(8, cluster, parallel=parallel)
    assert sum(found.exposed.values()) == sum(found.hidden.values()) == 0
    real = time(8, parallel=parallel)
    assert real.compute == found.compute
    assert sum(real.exposed.values()) > 0
    assert min(*real.exposed.values(), *real.hidden.values()) >= 0
    assert sum(real.exposed.values()) < real.total


@pytest.mark.parametrize("parallel", PARALLEL, ids=str)
def test_longer_sequences_take_longer_and_waste_less(parallel):
    found = [time(8, seq_len=length, parallel=parallel) for length in (64, 256, 1024)]
    assert found[0].total < found[1].total < found[2].total
    assert found[0].mfu < found[1].mfu < found[2].mfu


def test_weights_come_beside_the_layer_before_on_a_gpu_and_not_on_a_cpu():
    parallel = {"sp": 2}
    gpu, cpu = (
        time(8, replace(CLUSTER, device=name), parallel=parallel) for name in ("cuda", "cpu")
    )
    for verb in ("weights", "gradients"):
        assert gpu.hidden[verb] > 0 == cpu.hidden[verb]
        both = gpu.hidden[verb] + gpu.exposed[verb]
        assert cpu.exposed[verb] == pytest.approx(both)


def test_replicas_in_nodes_spare_the_fabric():
    spread, copied = (
        waits_of(8, "weights", parallel={"sp": 2, "replicas": replicas}) for replicas in (1, 2)
    )
    assert copied < spread


def test_ranks_that_trade_heads_do_so_inside_a_node():
    described = {"pattern": "S", "parallel": {"sp": 8, "heads": 4}}
    slower = linked(fabric=LinkConfig(1.0, 1.0))
    near, far = (waits_of(8, "heads", each, **described) for each in (CLUSTER, slower))
    assert near == far > 0
    other = waits_of(8, "stream", slower, **described) - waits_of(8, "stream", **described)
    assert other > 1


def test_what_waits_on_the_host_takes_its_link():
    memory = {"checkpointing": "full", "activations": "cpu"}
    found = time(memory=memory)
    size = 4 * 64 * WIDTH * 4
    assert found.exposed["host"] + found.hidden["host"] == pytest.approx(2 * 2 * size / 1e5)
    assert time(memory={"checkpointing": "full"}).exposed == {}
    offloaded = time(2, memory={"weights": "cpu", "optimizer": "cpu"})
    assert offloaded.optimizer == pytest.approx(10 * time(2).optimizer)
    weights = own_weights(work(2)) * 4 / 1e5
    assert offloaded.exposed["host"] + offloaded.hidden["host"] == pytest.approx(3 * weights)


def test_muon_adds_the_products_of_its_iterations():
    muon = work(2, pattern="-S", parallel={"sp": 2}, optim={"kind": "muon", "ns_steps": 2})
    iteration = 2 * 3 * (4 * 16**2 * 40 + 2 * 16**3)  # two layers of three matrices 16 x 40
    iteration += 2 * (4 * 16**2 * 16 + 2 * 16**3)  # queries, output
    iteration += 2 * (4 * 8**2 * 16 + 2 * 8**3)  # keys, values
    assert muon_seconds(muon, CLUSTER) == pytest.approx(2 * iteration / 2 / 5e5)
    plain = work(2, pattern="-S", parallel={"sp": 2})
    assert muon_seconds(plain, CLUSTER) == 0
    assert step_time(muon, CLUSTER).optimizer > step_time(plain, CLUSTER).optimizer


def test_every_exchange_takes_what_the_file_says():
    slow, split = replace(CLUSTER, call_seconds=0.5), {"parallel": {"sp": 2}}
    calls = sum(each.calls for each in traffic_of(work(2, **split), 0).values())
    assert time(2, slow, **split).total - time(2, **split).total == pytest.approx(0.5 * calls)
    assert calls > 10
    assert time(1, slow).total == time(1).total


def test_a_matrix_has_one_process_however_many_there_are():
    few, many, more = (
        work(n, pattern="-S", parallel={"sp": n}, optim={"kind": "muon"}) for n in (2, 16, 32)
    )
    assert muon_seconds(few, CLUSTER) > muon_seconds(many, CLUSTER)
    assert muon_seconds(many, CLUSTER) == muon_seconds(more, CLUSTER)


def test_every_mixer_has_a_time_under_every_split_that_it_allows():
    shown = 0
    for config in (config for _, config in all_variants()):
        for parallel in PARALLEL[:3]:
            described = work(8, parallel={"sp": 8})
            model = replace(described.settings.model, width=16, mixers={"A": config}, pattern="A-")
            table = replace(described.settings.parallel, **parallel)
            memory = replace(described.settings.memory, checkpointing="keep")
            settings = replace(described.settings, model=model, parallel=table, memory=memory)
            with contextlib.suppress(InputError):
                found = step_time(workload(settings, 8, VOCABULARY, "fp32"), CLUSTER)
                assert 0 < found.compute[config.kind] < found.total < math.inf
                shown += 1
    assert shown > 150


def test_what_is_read_of_traffic_is_that_of_a_rank_between_others():
    found = Exchanges(Compute(work(4, parallel={"sp": 4}), CLUSTER, 3))
    placement = found.work.placement
    owners = [rank for rank, _ in placement.order]
    assert owners[0] != found.inner != owners[-1]
