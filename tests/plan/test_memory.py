"""Predicted memory of processes."""

import time
from dataclasses import replace

import pytest

from longctx.config import decode
from longctx.model.decoder import ModelConfig
from longctx.model.memory import MemoryConfig
from longctx.plan.memory import Memory, memory_of
from longctx.plan.workload import Workload, workload
from longctx.train.settings import load_settings
from tests.dist import run_gloo
from tests.plan.counted_memory import count, work_of
from tests.presets import NAMES

GIB = 2**30
MIXERS = {
    "L": {"kind": "linear", "num_heads": 128},
    "S": {"kind": "softmax", "num_heads": 128, "num_kv_heads": 8},
}
LARGE = {"width": 16384, "depth": 126, "mlp_hidden": 53248, "tied_head": False, "pattern": "LLLS"}


def large(processes: int, seq_len: int = 1 << 20, **tables) -> Workload:
    """A model of 400B weights."""
    base = load_settings("340m")
    model = decode(ModelConfig, LARGE | {"mixers": MIXERS}, path="model")
    tables = {"memory": {"checkpointing": "keep"}} | tables
    settings = replace(
        base,
        model=model,
        train=replace(base.train, seq_len=seq_len, batch_size=tables.pop("batch_size", 1)),
        memory=MemoryConfig(**tables.pop("memory")),
        parallel=replace(base.parallel, **{"sp": processes} | tables),
    )
    return workload(settings, processes, 128256, "bf16")


def different(ranks: int, policies: list[str], **table) -> list[tuple[str, Workload]]:
    """Every preset at a tiny size; some are the same there."""
    found: dict[tuple[str, str], tuple[str, Workload]] = {}
    for name in NAMES:
        for policy in policies:
            work = work_of(name, ranks, policy, **table)
            same = repr(work.settings.model), policy
            found.setdefault(same, (f"{name} {policy} {table}", work))
    return list(found.values())


def fresh(works: list[tuple[str, Workload]]) -> list[tuple[str, Workload]]:
    """Those with a layer that none before them has."""
    known: set[str] = set()
    found = []
    for what, work in works:
        model = work.settings.model
        layers = {
            repr((model.mixers.get(a), a in model.without_mlp, model.mlp)) for a in model.letters
        }
        found += [(what, work)] if layers - known else []
        known |= layers
    return found


def some(names: str, ranks: int, policy: str, **table) -> list[tuple[str, Workload]]:
    """Named presets."""
    return [(f"{n} {policy} {table}", work_of(n, ranks, policy, **table)) for n in names.split()]


def agreed(ranks: int, works: list[tuple[str, Workload]]) -> None:
    for rank, found in enumerate(run_gloo(ranks, count, works, timeout=200)):
        for each in found:
            assert each.predicted == each.counted, (rank, each.what)


@pytest.mark.cluster
@pytest.mark.alone
@pytest.mark.parametrize(
    ("ranks", "policies"), [(1, ["none", "keep", "full"]), (2, ["keep"]), (4, ["none"])]
)
def test_what_processes_hold_of_any_preset_is_as_predicted(ranks, policies):
    works = different(ranks, policies)
    agreed(ranks, fresh(works) if ranks == 4 else works)


def with_shared_keys(policy: str) -> list[tuple[str, Workload]]:
    """A model of which a layer takes the keys of another, and no layer those of the last."""
    work = work_of("340m", 4, policy)
    mixers = {"S": {"kind": "softmax", "num_heads": 4, "num_kv_heads": 2}}
    mixers |= {
        "K": mixers["S"] | {"reuses": "keys and values"},
        "L": MIXERS["L"] | {"num_heads": 4},
    }
    table = {"width": 32, "depth": 4, "pattern": "SKSL", "mixers": mixers}
    settings = replace(work.settings, model=decode(ModelConfig, table, path="model"))
    return [(f"shared keys {policy}", replace(work, settings=settings))]


@pytest.mark.cluster
@pytest.mark.alone
def test_other_ways_to_spread_hold_what_is_predicted():
    pairs = {"train": {"batch_size": 2}, "parallel": {"sp": 2}}
    works = some("340m gdn-h2 lalte tiny titans-mag", 4, "full", **pairs)
    works += some("gdn-h2", 4, "none", parallel={"sp": 2, "replicas": 2}, train={"batch_size": 2})
    works += some("340m", 4, "keep", optim={"kind": "muon"})
    works += some("340m", 4, "keep", parallel={"engine": "none"})
    works += some("340m olmo-hybrid-7b", 4, "none", parallel={"heads": 2, "prefix": "ulysses"})
    works += some("gdn-h2 340m", 4, "none", parallel={"prefix": "scan", "stream": "ring"})
    works += with_shared_keys("none") + with_shared_keys("full")
    agreed(4, works)


@pytest.mark.cluster
@pytest.mark.alone
def test_processes_that_share_heads_hold_what_is_predicted():
    shared = {"sp": 1, "tp": 2, "engine": "none"}
    agreed(2, some("340m tiny", 2, "none", parallel=shared, optim={"kind": "muon"}))


def test_shares_of_the_optimizer_make_up_the_whole():
    """Also where rows do not divide by processes."""
    one = memory_of(work_of("gdn-h2", 1, "none"), 0)
    many = [memory_of(work_of("gdn-h2", 3, "none"), rank) for rank in range(3)]
    steps = one.optimizer - 2 * one.gradients
    assert sum(m.optimizer - steps for m in many) == one.optimizer - steps
    assert all(one.weights / 3 <= m.weights < one.weights / 2 for m in many)


def test_two_shares_of_heads_columns_and_vocabulary_make_up_the_whole():
    """But for norms and the like, which both have."""
    whole = memory_of(work_of("340m", 1, "none"), 0)
    shared = work_of("340m", 2, "none", parallel={"sp": 1, "tp": 2, "engine": "none"})
    halves = [memory_of(shared, rank).weights for rank in (0, 1)]
    assert whole.weights < sum(halves) < 1.05 * whole.weights


def device(**tables) -> int:
    return memory_of(large(64, **tables), 0).device


def test_more_of_anything_takes_more_memory():
    policies = ["none", "keep", "full"]
    by_policy = [device(memory={"checkpointing": policy}) for policy in policies]
    assert by_policy == sorted(by_policy, reverse=True)
    by_length = [memory_of(large(64, length), 0).device for length in (1 << 18, 1 << 20, 1 << 22)]
    assert by_length == sorted(by_length)
    by_processes = [memory_of(large(n), 0).device for n in (32, 64, 256)]
    assert by_processes == sorted(by_processes, reverse=True)
    assert device(weights="bf16") < device()
    assert device(gather_heads=1) < device()
    assert device(memory={"checkpointing": "keep", "mlp_tokens": 1024}) < device()


def test_what_waits_on_the_host_is_not_on_the_device():
    on_host = {"weights": "cpu", "optimizer": "cpu", "activations": "cpu"}
    here = memory_of(large(64), 0)
    there = memory_of(large(64, memory={"checkpointing": "keep"} | on_host), 0)
    assert there.device < here.device
    assert there.on_host.keys() == {"weights", "optimizer", "gradients", "activations"}
    assert there.on_host["weights"] == there.weights == here.weights
    assert {"weights", "optimizer"}.isdisjoint(there.parts)
    assert here.host == 0


def test_components_add_up_to_the_peak():
    found: Memory = memory_of(large(64), 0)
    assert sum(found.parts.values()) == found.device
    assert found.parts["optimizer"] == found.optimizer
    assert found.moment in ("forward", "loss", "backward", "update")
    assert found.activations.keys() >= {"linear", "softmax", "head"}
    assert "allocator slack" in found.parts
    assert "allocator slack" not in memory_of(large(64), 0, on_gpu=False).parts


def test_stages_of_zero_spread_more_and_more():
    def held(stage: int) -> tuple[int, int, int]:
        found = memory_of(large(64, engine="deepspeed", zero_stage=stage), 0)
        return found.weights, found.gradients, found.optimizer

    (w1, g1, o1), (w2, g2, o2), (w3, g3, o3) = map(held, (1, 2, 3))
    assert w1 == w2 == pytest.approx(g1, rel=1e-6)
    assert w1 / 65 < w3 < w1 / 60
    assert g2 == g3 == pytest.approx(g1 / 64, rel=1e-3)
    assert o1 == o2 == o3 == pytest.approx(3 * g1 / 64, rel=1e-3)


@pytest.mark.alone
def test_a_model_of_400b_is_predicted_in_seconds():
    started = time.perf_counter()
    for sp in (64, 512, 4096):
        memory_of(large(sp, 1 << 22), 0)
    assert time.perf_counter() - started < 5
