"""Every engine trains the same model, and its checkpoints are those of any other."""

import importlib
import os
import warnings

import pytest
import torch

from longctx.checkpoint import open_checkpoint
from longctx.errors import InputError
from longctx.parallel import Mesh, resolve, world_size
from longctx.train.engines import build_engine, settle_engine
from longctx.train.prepare import prepare
from longctx.train.trainer import train
from tests.train.processes import run, run_work

pytestmark = pytest.mark.cluster

DOUBLE = {"train__precision": "fp64", "model__mixers.S.balance_weight": 0.0}
ENGINES = {
    "none sp2": (2, {"parallel__engine": "none", "parallel__sp": 2}),
    "fsdp2 sp2": (2, {"parallel__sp": 2}),
    "fsdp2 dp2": (2, {}),
    "fsdp2 dp2 micro-batches": (2, {"train__micro_batch": 1}),
    "fsdp2 alone, on the host": (1, {"memory__weights": "cpu", "memory__optimizer": "cpu"}),
    "fsdp2 sp2, on the host": (
        2,
        {"parallel__sp": 2, "memory__weights": "cpu", "memory__optimizer": "cpu"},
    ),
    "hsdp dp2 sp2": (4, {"parallel__sp": 2, "parallel__replicas": 2}),
    "tp2": (2, {"parallel__tp": 2}),
    "tp2 sp2": (4, {"parallel__tp": 2, "parallel__sp": 2}),
    "tp2 dp2, none": (4, {"parallel__tp": 2, "parallel__engine": "none"}),
    "tp2 dp2, two copies": (4, {"parallel__tp": 2, "parallel__replicas": 2}),
    "checkpointing": (2, {"parallel__sp": 2, "memory__checkpointing": "keep"}),
}
SINGLE = {
    "none": {"parallel__engine": "none"},
    "fsdp2": {},
    "tp": {"parallel__tp": 2, "parallel__sp": 2},
    "zero 1": {"parallel__engine": "deepspeed", "parallel__zero_stage": 1},
    "zero 2": {"parallel__engine": "deepspeed", "parallel__zero_stage": 2},
    "zero 3": {"parallel__engine": "deepspeed", "parallel__zero_stage": 3},
}
LOADS = {
    "2": (2, {}),
    "1": (1, {}),
    "2 x 2": (4, {"parallel__replicas": 2}),
    "4, all": (4, {"parallel__engine": "none"}),
    "tp2 x 2": (4, {"parallel__tp": 2}),
}


@pytest.fixture(scope="module", autouse=True)
def imported():
    """What every process would import for seconds, before they are forked."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    warnings.simplefilter("ignore")
    importlib.import_module("deepspeed")
    importlib.import_module("megatron.core.parallel_state")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A folder for the runs of one process that others are compared with."""
    return tmp_path_factory.mktemp("reference")


def tensors(path) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint but random states."""
    checkpoint = open_checkpoint(path)
    names = sorted(name for name in checkpoint.names if not name.startswith("random/"))
    return {name: checkpoint.read(name) for name in names}


@pytest.fixture
def one(settings, rows, reference):
    """Rows and checkpoint of one process, trained once for all tests of a precision."""

    def make(**changes):
        config = settings(str(reference / f"one-{sorted(changes.items())}"[-120:]), **changes)
        if not (config.run.path / "summary.json").exists():
            train(config)
        return rows(config), tensors(config.run.path / "checkpoints/step-6")

    return make


@pytest.mark.parametrize(("ranks", "changes"), ENGINES.values(), ids=ENGINES.keys())
def test_losses_norms_and_state_are_those_of_one_process(settings, rows, one, ranks, changes):
    config = settings(**DOUBLE, **changes)
    run(ranks, config)
    expected, state = one(**DOUBLE)
    for a, b in zip(expected, rows(config), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-10
        assert abs(a["grad_norm"] - b["grad_norm"]) < 1e-10
    found = tensors(config.run.path / "checkpoints/step-6")
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-7, atol=1e-10, msg=name)


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_engines_have_the_same_losses_in_single_precision(settings, rows, one, ranks):
    expected, _ = one(**{"model__mixers.S.balance_weight": 0.0})
    for name, changes in SINGLE.items():
        if ranks == 2 and name == "tp":
            changes = {"parallel__tp": 2}
        quiet = {"model__mixers.S.balance_weight": 0.0}
        config = settings(f"{name} {ranks}", **quiet, **changes)
        run(ranks, config)
        for a, b in zip(expected, rows(config), strict=True):
            assert abs(a["loss"] - b["loss"]) < 2e-6, name
            assert abs(a["grad_norm"] - b["grad_norm"]) < 2e-5, name


def test_weights_may_travel_in_bf16(settings, rows):
    rounded = {"train__precision": "bf16", "parallel__sp": 2}
    wide, narrow = (
        settings("wide", **rounded),
        settings("narrow", parallel__weights="bf16", **rounded),
    )
    for config in (wide, narrow):
        run(2, config)
    for a, b in zip(rows(wide), rows(narrow), strict=True):
        assert abs(a["loss"] - b["loss"]) < 5e-3
        assert b["exchange_bytes"] < a["exchange_bytes"]


@pytest.mark.parametrize(("ranks", "changes"), LOADS.values(), ids=LOADS.keys())
def test_a_checkpoint_loads_bit_for_bit_under_any_split(settings, reference, ranks, changes):
    """Each process finds what the checkpoint has where its parts lie, and together all of it."""
    saved = settings(str(reference / "four"), parallel__sp=2)
    if not (saved.run.path / "summary.json").exists():
        run(4, saved)
    path = saved.run.path / "checkpoints/step-6"
    config = settings("other", **changes)

    def look(_rank: int) -> None:
        layers = config.model.layers
        split = settle_engine(config, resolve(config.parallel, layers, world_size(), 48))
        mesh = Mesh(split, torch.device("cpu"), 60)
        checkpoint = open_checkpoint(path, mesh.crew())
        engine = build_engine(config, checkpoint.state["vocab_size"], mesh)
        engine.load(checkpoint.read, checkpoint.names, weights_only=False)
        boxes = engine.boxes()
        for box in boxes:
            saved = checkpoint.read(box.name, box.offsets, tuple(box.tensor.shape))
            assert torch.equal(saved, box.tensor), box.name
        held = torch.tensor(float(sum(box.tensor.numel() for box in boxes)))
        names = [name for name in checkpoint.names if not name.startswith("random/")]
        whole = sum(torch.Size(checkpoint.shape(name)).numel() for name in names)
        assert mesh.sum_over_all(held, "test") == whole
        mesh.close()

    run_work(ranks, look)


@pytest.mark.parametrize(
    ("ranks", "engine", "asynchronous"),
    [
        (1, "none", True),
        (1, "none", False),
        (2, "none", True),
        (2, "fsdp2", False),
        (2, "fsdp2", True),
        (4, "none", False),
        (4, "fsdp2", True),
    ],
)
def test_twenty_steps_are_ten_and_ten_bit_for_bit(settings, rows, ranks, engine, asynchronous):
    way = {"parallel__engine": engine, "checkpoint__asynchronous": asynchronous}
    way |= {"parallel__sp": 2 if ranks > 1 else 1, "train__steps": 20, "checkpoint__every": 4}
    whole, parts = settings("whole", **way), settings("parts", **way)
    run(ranks, whole)
    run(ranks, settings("parts", train__stop_after=10, **way))
    run(ranks, parts)
    kept = ("step", "loss", "grad_norm", "update_norm", "lr", "tokens")
    first, second = ([[row[k] for k in kept] for row in rows(c)] for c in (whole, parts))
    assert first == second
    ends = [open_checkpoint(c.run.path / "checkpoints/step-20") for c in (whole, parts)]
    assert ends[0].names == ends[1].names
    for name in ends[0].names:
        assert torch.equal(ends[0].read(name), ends[1].read(name)), name


def test_a_run_may_change_its_engine_and_its_processes(settings, rows):
    whole = settings("whole", **DOUBLE)
    train(whole)
    stages = [
        (4, {"parallel__sp": 4, "train__stop_after": 2}),
        (2, {"parallel__engine": "none", "train__stop_after": 3}),
        (4, {"parallel__sp": 2, "parallel__replicas": 2, "train__stop_after": 4}),
        (4, {"parallel__tp": 2, "train__stop_after": 5}),
        (1, {}),
    ]
    for ranks, changes in stages:
        run(ranks, settings("parts", **DOUBLE, **changes))
    for a, b in zip(rows(whole), rows(settings("parts")), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-9


REFUSED = {
    "tp does not divide heads": ({"parallel__tp": 3}, 3, "num_heads"),
    "replicas": ({"parallel__replicas": 3}, 4, "parallel.replicas = 3"),
    "replicas of another engine": (
        {"parallel__replicas": 2, "parallel__engine": "none"},
        4,
        "only engine 'fsdp2'",
    ),
    "nvme": ({"memory__weights": "nvme"}, 2, "memory.weights = 'nvme'"),
    "halves on the host": ({"memory__weights": "cpu"}, 2, "set them alike"),
    "no engine on the host": (
        {"memory__weights": "cpu", "memory__optimizer": "cpu", "parallel__engine": "none"},
        2,
        "choose 'fsdp2'",
    ),
    "deepspeed and tp": ({"parallel__engine": "deepspeed", "parallel__tp": 2}, 2, "parallel.tp"),
    "bf16 weights, fp32 products": ({"parallel__weights": "bf16"}, 2, "set precision to"),
    "fp64 in DeepSpeed": (
        {"parallel__engine": "deepspeed", "train__precision": "fp64"},
        2,
        "train.precision",
    ),
    "bf16 weights elsewhere": (
        {"parallel__engine": "none", "parallel__weights": "bf16"},
        2,
        "parallel.weights",
    ),
}


@pytest.mark.parametrize(("changes", "processes", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_an_impossible_engine_is_refused_before_anything_is_written(
    settings, changes, processes, words, tmp_path
):
    with pytest.raises(InputError, match=words):
        prepare(settings("refused", **changes), processes)
    assert not (tmp_path / "refused").exists()
