import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from longctx.errors import InputError
from longctx.model.memory import MemoryConfig
from longctx.parallel import offload
from longctx.parallel import zero as zero_module
from longctx.parallel.deepspeed import TAG, DeepSpeedEngine
from longctx.parallel.zero import Zero, check_installed, deepspeed_config
from tests.dist import run_gloo
from tests.parallel.zero_cases import (
    build,
    largest_difference,
    mesh_of,
    reader,
    worst,
)

pytestmark = pytest.mark.cluster
TOLERANCE = 1e-5
"""Of losses, norms, weights and optimizer state in fp32 after four steps."""

SPREAD = {
    "none": {},
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2},
    "stage 3": {"stage": 3},
    "stage 2, optimizer on host": {"stage": 2, "optimizer": "cpu"},
    "stage 3, all on host": {"stage": 3, "optimizer": "cpu", "weights": "cpu"},
    "stage 3, layers computed again in tiles": {
        "stage": 3,
        "memory": MemoryConfig(checkpointing="full", mlp_tokens=5, loss_tokens=7),
    },
}


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Once, for all processes that are forked from here."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    pytest.importorskip("deepspeed")
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


def _like_none(_rank, ranks, sp, micro, cases):
    mesh = mesh_of(ranks, sp)
    plain = build(mesh, micro)
    expected, found = plain.train(range(4)), {}
    for name in cases:
        course = build(mesh, micro, **SPREAD[name])
        rows = course.train(range(4))
        state = largest_difference(course.gathered(), plain.gathered())
        assert course.engine.model.num_parameters() == plain.engine.model.num_parameters()
        contexts = torch.arange(5)
        assert course.engine.model.flops(contexts) == plain.engine.model.flops(contexts)
        found[name] = worst(rows, expected), state, rows[-1][3] / expected[-1][3]
    return found


@pytest.mark.parametrize(
    ("ranks", "sp", "micro", "cases"),
    [
        (1, 1, 2, ["stage 1", "stage 3"]),
        (2, 2, 2, list(SPREAD)[1:]),
        (4, 2, 1, ["stage 2", "stage 3"]),
    ],
)
def test_losses_norms_weights_and_state_are_those_of_the_none_engine(ranks, sp, micro, cases):
    for found in run_gloo(ranks, _like_none, ranks, sp, micro, cases, timeout=120):
        for name, (rows, state, update) in found.items():
            assert rows < TOLERANCE, name
            assert state < TOLERANCE, name
            assert 0.8 < update < 1.2, name


def _discards(_rank, cases):
    mesh, found = mesh_of(2, 2), {}
    for name in cases:
        course, other = (build(mesh, 2, **SPREAD[name]) for _ in range(2))
        course.train([0])
        before, norms = course.gathered(), []
        for factor in (1.0, math.nan):
            course.accumulate(1, factor)
            norms.append(float(course.engine.gradient_norm()))
            course.engine.discard()
        course.accumulate(1, math.nan)
        course.engine.update(1.0)
        after = course.gathered()
        rows = course.train([2, 3])
        found[name] = before, after, norms, rows, other.train([0, 2, 3])[1:]
    return found


def test_a_discarded_step_changes_nothing_whether_it_was_finite_or_not():
    cases = ["stage 1", "stage 3", "stage 2, optimizer on host", "stage 3, all on host"]
    for found in run_gloo(2, _discards, cases, timeout=120):
        for name, (before, after, norms, rows, expected) in found.items():
            assert largest_difference(before, after) == 0, name
            assert [math.isfinite(norm) for norm in norms] == [True, False], name
            assert rows == expected, name


def _saves(_rank, cases):
    mesh, found = mesh_of(2, 2), {}
    for name in cases:
        course = build(mesh, **SPREAD[name])
        course.train(range(3))
        found[name] = course.gathered(), course.train(range(3, 5))
    return found


def _loads(_rank, ranks, sp, saved, cases):
    mesh, found = mesh_of(ranks, sp), {}
    for source, name in cases:
        course = build(mesh, **SPREAD[name])
        course.train(range(7, 9))  # what is there is overwritten
        course.engine.load(reader(saved[source]), saved[source], False)
        assert largest_difference(course.gathered(), saved[source]) == 0, (source, name)
        found[source, name] = course.train(range(3, 5))
    return found


def test_checkpoints_go_from_engine_to_engine_and_from_world_to_world():
    names = ["none", "stage 1", "stage 3"]
    runs = run_gloo(2, _saves, names, timeout=120)[0]
    saved = {name: state for name, (state, _) in runs.items()}
    again = [("stage 1", "stage 1"), ("stage 3", "stage 3")]
    across = [("none", "stage 3"), ("stage 1", "none"), ("stage 3", "stage 2, optimizer on host")]
    farther = [("none", "stage 2"), ("stage 1", "stage 3, all on host")]
    for ranks, sp, cases in ((2, 2, again + across), (4, 2, farther)):
        found = run_gloo(ranks, _loads, ranks, sp, saved, cases, timeout=120)[0]
        for source, name in cases:
            assert worst(found[source, name], runs[source][1]) < TOLERANCE, (source, name)
            if source == name:
                assert found[source, name] == runs[source][1], name


def _write_native(_rank, folder):
    mesh, found = mesh_of(2, 2), {}
    for stage in (1, 3):
        course = build(mesh, stage=stage)
        course.train(range(3))
        course.engine.write_native(folder / str(stage))
        state = course.gathered()
        rows = course.train(range(3, 5))
        again = build(mesh, stage=stage)
        again.engine.load_native(folder / str(stage))
        assert largest_difference(again.gathered(), state) == 0
        assert again.train(range(3, 5)) == rows
        found[stage] = state, rows
    return found


def _load_universal(_rank, folder):
    mesh, found = mesh_of(4, 2), {}
    for stage in (1, 3):
        course = build(mesh, stage=stage, universal=True)
        course.engine.load_native(folder / str(stage))
        found[stage] = course.gathered(), course.train(range(3, 5))
    return found


def _convert(source):
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(source), "--output_folder", f"{source}_universal"]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def test_deepspeeds_own_checkpoints_are_converted_for_another_world(tmp_path):
    written = run_gloo(2, _write_native, tmp_path, timeout=120)[0]
    converting = [_convert(tmp_path / str(stage) / TAG) for stage in written]
    assert [process.wait(timeout=120) for process in converting] == [0] * len(written)
    loaded = run_gloo(4, _load_universal, tmp_path, timeout=120)[0]
    for stage, (state, rows) in written.items():
        assert largest_difference(loaded[stage][0], state) == 0
        assert worst(loaded[stage][1], rows) < TOLERANCE


def _in_bf16(_rank):
    mesh, found = mesh_of(2, 2), []
    for options in ({}, {"stage": 1, "bf16": True}, {"stage": 3, "bf16": True}):
        course = build(mesh, **options)
        course.bf16 = options.get("stage") != 3  # whose DeepSpeed is told of it alone
        found.append(course.train(range(3)))
        assert {x.dtype for x in course.gathered().values()} == {torch.float32}
    return found


def test_only_products_are_rounded_to_bf16():
    expected, *found = run_gloo(2, _in_bf16)[0]
    for rows in found:
        assert worst(rows, expected) < 2e-4


def _alone(_rank):
    import deepspeed

    dist.destroy_process_group()
    mesh = mesh_of(1, 1)
    course = build(mesh, stage=3)
    first = course.gathered()
    course.engine.load(reader(first), first, True)
    rows = course.train(range(2))
    replicas, parts = course.engine.replicas(), course.engine.weights()
    assert replicas == [[0]]
    assert (
        sum(part.local.numel() for part in parts.values()) >= course.engine.model.num_parameters()
    )
    assert deepspeed.comm.comm.cdb.shm_comm_op is None
    return rows, build(mesh).train(range(2))


def test_one_process_needs_no_launcher_and_nothing_is_compiled(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    ((rows, expected),) = run_gloo(1, _alone)
    assert worst(rows, expected) < TOLERANCE


def test_the_configuration_follows_from_our_tables(tmp_path):
    plain = deepspeed_config(Zero(stage=1, micro_batches=3, clip_norm=0.5), 4, on_gpu=False)
    assert plain["zero_optimization"] == {
        "stage": 1,
        "overlap_comm": False,
        "reduce_bucket_size": zero_module.BUCKET,
        "allgather_bucket_size": zero_module.BUCKET,
    }
    assert plain["train_batch_size"] == 12
    assert plain["gradient_accumulation_steps"] == 3
    assert plain["gradient_clipping"] == 0.5
    assert not plain["torch_autocast"]["enabled"]
    assert not plain["checkpoint"]["load_universal"]
    away = Zero(3, "nvme", "cpu", str(tmp_path), bf16=True, universal=True)
    config = deepspeed_config(away, 2, on_gpu=True)
    spread = config["zero_optimization"]
    assert spread["overlap_comm"]
    assert spread["stage3_param_persistence_threshold"] == zero_module.PERSISTENT
    assert spread["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert spread["offload_optimizer"] == {
        "device": "nvme",
        "pin_memory": True,
        "nvme_path": str(tmp_path),
    }
    assert config["torch_autocast"]["enabled"]
    assert config["checkpoint"]["load_universal"]


REFUSED = {
    "weights": ({"stage": 2, "weights": "cpu"}, "memory.weights = 'cpu'.*set zero_stage = 3"),
    "nvme early": ({"stage": 1, "optimizer": "nvme"}, "memory.optimizer = 'nvme'.*zero_stage = 3"),
    "no path": ({"stage": 3, "optimizer": "nvme"}, "memory.nvme_path is empty"),
    "path": ({"stage": 3, "weights": "nvme", "nvme_path": "/nowhere"}, "'/nowhere': no such"),
}


@pytest.mark.parametrize(("options", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_an_impossible_offload_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        Zero(**options)


def test_offload_that_the_host_cannot_hold_is_refused(monkeypatch):
    monkeypatch.setattr(offload, "free_memory", lambda: 1000 * 1024)
    offload.check_state_on_host(("cpu", "cpu"), 102_400, processes=4, here=2)
    with pytest.raises(InputError, match="20 bytes for each of 102,401 weights, 2 of 4"):
        offload.check_state_on_host(("cpu", "cpu"), 102_401, processes=4, here=2)
    offload.check_state_on_host(("device", "nvme"), 10**12, processes=1, here=1)


def test_without_deepspeed_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'longctx\[deepspeed\]'"):
        check_installed()


def test_double_precision_is_refused():
    double = torch.nn.Linear(2, 2).double()
    with pytest.raises(InputError, match="fp64"):
        DeepSpeedEngine(double, torch.optim.AdamW(double.parameters()), Zero(), None)
