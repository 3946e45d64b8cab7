"""Muon under every engine is the plain one; what travels for it is known."""

import importlib
import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from longctx.checkpoint import open_checkpoint
from longctx.config import decode
from longctx.errors import InputError
from longctx.model.decoder import Decoder, initialise
from longctx.model.matrices import HiddenMatrix, hidden_matrices
from longctx.parallel import Mesh, ParallelConfig, resolve
from longctx.parallel.box import Box
from longctx.parallel.matrices import Matrix, Seat, deal, matrices_traffic, spread
from longctx.parallel.megatron import drop_tensor_groups
from longctx.parallel.muon import MUON, Wholes, orthogonalised
from longctx.parallel.tensor_parallel import split_decoder
from longctx.sequence.ledger import Traffic
from longctx.train.engines import build_engine, settle_engine
from longctx.train.optim import OptimConfig, build_optimizer
from longctx.train.prepare import prepare
from longctx.train.settings import Settings
from longctx.train.trainer import train
from tests.dist import run_gloo
from tests.train.processes import run

VOCABULARY = 61
STEPS = 3
TABLES = {
    "model": {
        "width": 24,
        "depth": 4,
        "pattern": "MGSR",
        "mlp_hidden": 42,
        "base_width": 12,
        "mixers": {
            "M": {
                "kind": "mamba2",
                "num_heads": 4,
                "head_dim": 12,
                "state_size": 5,
                "num_groups": 2,
            },
            "G": {"kind": "gla", "num_heads": 2, "decay_rank": 3},
            "S": {"kind": "softmax", "num_heads": 4, "num_kv_heads": 2},
            "R": {"kind": "mosa", "num_heads": 2, "head_dim": 5, "sparsity": 2, "group": 8},
        },
    },
    "optim": {"kind": "muon", "lr": 0.02, "warmup_steps": 0, "clip_norm": 0.5},
    "train": {"seq_len": 32, "batch_size": 4, "steps": STEPS, "precision": "fp64"},
}
TWO = {
    "none": {"engine": "none"},
    "fsdp2 over tokens": {"sp": 2},
    "fsdp2": {},
    "replicas alone": {"replicas": 2},
    "on the host": {"sp": 2, "place": "cpu"},
    "tp": {"tp": 2},
}
FOUR = {
    "uneven rows": {},
    "replicas": {"replicas": 2, "sp": 2},
    "tp and sp": {"tp": 2, "sp": 2},
    "tp, copies": {"tp": 2, "engine": "none"},
    "tp, two replicas": {"tp": 2, "replicas": 2},
}


def small(precision: str = "fp64", place: str = "device", **parallel) -> Settings:
    tables = {
        "train": TABLES["train"] | {"precision": precision},
        "memory": {"weights": place, "optimizer": place},
        "parallel": parallel,
    }
    return decode(Settings, TABLES | tables, file="test")


def course(settings: Settings, processes: int) -> tuple[dict, list[Box], Mesh]:
    """Losses and norms of a few steps, what this process would save, and its mesh."""
    split = resolve(settings.parallel, settings.model.layers, processes, 32)
    split = settle_engine(settings, split)
    mesh = Mesh(split, torch.device("cpu"), 60)
    engine = build_engine(settings, VOCABULARY, mesh)
    tokens = torch.randint(VOCABULARY, (4, 33), generator=torch.Generator().manual_seed(1))
    rows = 4 // mesh.split.dp
    ids = tuple(range(mesh.dp_rank * rows, (mesh.dp_rank + 1) * rows))
    here = torch.cat([torch.arange(start, stop) for start, stop in mesh.segments(32)])
    own, figures = tokens[list(ids)], {}
    for step in range(STEPS):
        mesh.ledger.clear()
        view = mesh.view(((0,),) * rows, 32).keyed(0, step, ids)
        loss = engine.model(own[:, here], own[:, here + 1], view).cross_entropy / 128
        engine.backward(loss)
        figures[f"loss {step}"] = float(mesh.sum(loss.detach(), "loss"))
        figures[f"norm {step}"] = float(engine.gradient_norm())
        figures[f"change {step}"] = float(engine.update(0.02))
    return figures, engine.boxes(), mesh


def check_cases(ranks: int, cases: dict[str, dict]) -> None:
    """Each of these splits finds what one process finds, and sends what is predicted."""
    expected, boxes, _ = course(small(), 1)
    whole = {box.name: box.tensor for box in boxes}
    matrices = hidden_matrices(Decoder(small().model, VOCABULARY))

    def work(_rank: int) -> None:
        for name, parallel in cases.items():
            figures, own, mesh = course(small(**parallel), ranks)
            for figure, value in expected.items():
                assert abs(figures[figure] - value) < 1e-10, (name, figure)
            assert {box.name for box in own} <= whole.keys()
            for box in own:
                block = tuple(slice(a, a + n) for a, n in zip(box.offsets, box.tensor.shape))
                found = whole[box.name][block]
                torch.testing.assert_close(found, box.tensor, rtol=0, atol=1e-10, msg=box.name)
            held = torch.tensor(float(sum(box.tensor.numel() for box in own)))
            assert mesh.sum_over_all(held, "test") == sum(x.numel() for x in whole.values())
            check_traffic(matrices, mesh)
            if mesh.tensor_group:
                drop_tensor_groups()

    run_gloo(ranks, work)


def check_traffic(matrices: dict[str, HiddenMatrix], mesh: Mesh) -> None:
    split, size = mesh.split, mesh.size // mesh.split.replicas
    cuts = (
        mesh.tensor_group
        and split_decoder(Decoder(small().model, VOCABULARY), mesh.tensor_group, mesh.device).cuts
    )
    spread_out = spread(matrices, cuts, split.engine == "fsdp2")
    seat = Seat(size // split.tp, split.tp, mesh.rank % size)
    expected = matrices_traffic(spread_out, seat, torch.float64)
    assert mesh.ledger.traffic().get(MUON, Traffic(0, 0)) == expected


@pytest.fixture(scope="module")
def imported():
    """What every process would import for seconds, before they are forked."""
    warnings.simplefilter("ignore")
    importlib.import_module("megatron.core.parallel_state")


@pytest.mark.cluster
@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize(("ranks", "cases"), [(2, TWO), (4, FOUR)], ids=["two", "four"])
def test_every_split_finds_what_one_process_does(ranks, cases):
    check_cases(ranks, cases)


STAGES = (
    (4, {"parallel__sp": 2, "parallel__replicas": 2, "train__stop_after": 2}),
    (2, {"parallel__engine": "none", "train__stop_after": 4}),
    (4, {"parallel__tp": 2, "train__stop_after": 5}),
    (1, {}),
)


@pytest.mark.cluster
@pytest.mark.usefixtures("imported")
def test_a_run_may_stop_and_change_its_engine_and_its_processes(settings, rows):
    muon = {"optim__kind": "muon", "train__precision": "fp64", "model__mixers.S.balance_weight": 0}
    whole = settings("whole", **muon)
    train(whole)
    for ranks, changes in STAGES:
        run(ranks, settings("parts", **muon, **changes))
    for a, b in zip(rows(whole), rows(settings("parts")), strict=True):
        for figure in ("loss", "grad_norm"):
            assert abs(a[figure] - b[figure]) < 1e-9


@pytest.mark.cluster
def test_a_run_that_stops_goes_on_bit_for_bit(settings, rows):
    muon = {"optim__kind": "muon", "parallel__sp": 2}
    whole, parts = settings("whole", **muon), settings("parts", **muon)
    run(2, whole)
    run(2, settings("parts", train__stop_after=3, **muon))
    run(2, parts)
    kept = ("loss", "grad_norm", "update_norm")
    first, second = ([[row[k] for k in kept] for row in rows(c)] for c in (whole, parts))
    assert first == second
    ends = [open_checkpoint(c.run.path / "checkpoints/step-6") for c in (whole, parts)]
    assert sum(name.endswith("/momentum_buffer") for name in ends[0].names) == 34
    for name in ends[0].names:
        assert torch.equal(ends[0].read(name), ends[1].read(name)), name


def slow_muon(weight, gradients, sizes, config: OptimConfig) -> torch.Tensor:
    """The weight after an update with each gradient, one matrix after another."""
    momentum = torch.zeros_like(weight)
    for gradient in gradients:
        momentum = config.momentum * momentum + (1 - config.momentum) * gradient
        ahead = config.momentum * momentum + (1 - config.momentum) * gradient
        weight = (1 - config.lr * config.weight_decay) * weight
        stacked = ahead if ahead.dim() == 3 else ahead.split(sizes)
        changes = []
        for matrix in stacked:
            x = matrix / matrix.square().sum().sqrt()
            for _ in range(config.ns_steps):
                x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
            changes.append(0.2 * math.sqrt(max(matrix.shape)) * x)
        change = torch.stack(changes) if ahead.dim() == 3 else torch.cat(changes)
        weight = weight - config.lr * change
    return weight


def test_one_process_does_what_the_definition_says():
    config = OptimConfig(kind="muon", lr=0.02)
    model = Decoder(replace(small().model, base_width=0), VOCABULARY).double()
    initialise(model, 0)
    matrices = hidden_matrices(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = alone(model, config)
    torch.manual_seed(0)
    gradients = [{name: torch.randn_like(x) for name, x in before.items()} for _ in range(3)]
    for each in gradients:
        for name, parameter in model.named_parameters():
            parameter.grad = each[name].clone()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if name in matrices:
            told = [each[name] for each in gradients]
            expected = slow_muon(before[name], told, matrices[name].sizes, config)
            torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-12, msg=name)
            assert list(optimizer.state[parameter]) == ["momentum_buffer"]
        else:
            assert set(optimizer.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}


def alone(model: Decoder, config: OptimConfig) -> Any:
    """Muon for a model of one process."""
    layers = model.config.layers
    mesh = Mesh(resolve(ParallelConfig(), layers, 1, 32), torch.device("cpu"), 60)
    wholes = Wholes(mesh, spread(hidden_matrices(model), None, False), torch.float64)
    return build_optimizer(model, config, wholes)


def test_it_is_pytorchs(monkeypatch):
    """PyTorch's iterates in bf16 whatever the weights are; here it is kept from that."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    config = OptimConfig(kind="muon", lr=0.1)
    model = Decoder(replace(small().model, base_width=0), VOCABULARY).double()
    own = model.blocks[2].mlp.up.weight
    theirs = nn.Parameter(own.detach().clone())
    optimizer = alone(model, config)
    other = torch.optim.Muon(
        [theirs], lr=0.1, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    torch.manual_seed(0)
    for _ in range(3):
        own.grad = torch.randn_like(own)
        theirs.grad = own.grad.clone()
        optimizer.step()
        other.step()
    torch.testing.assert_close(own, theirs, rtol=0, atol=1e-12)


def test_iterations_in_bf16_are_near():
    torch.manual_seed(0)
    momentum = torch.randn(64, 40)
    exact = orthogonalised(momentum.double(), 5)
    error = (orthogonalised(momentum.bfloat16(), 5) - exact).norm() / exact.norm()
    assert error < 0.03


def test_what_is_orthogonalised_has_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((40, 24), (24, 40), (3, 16, 16)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(shape).double(), 5))
        assert values.min() > 0.3
        assert values.max() < 1.3


def test_matrices_of_all_kinds_are_muons_and_other_weights_are_not():
    found = hidden_matrices(Decoder(small().model, VOCABULARY))
    assert found["blocks.0.mixer.project_in.weight"].sizes == (48, 48, 10, 10, 4)
    assert found["blocks.3.mixer.query.weight"] == ((2, 24, 5), (2,))
    assert found["blocks.1.mlp.up.weight"] == ((42, 24), (42,))
    assert "blocks.1.mixer.decay.up.weight" in found
    assert "blocks.0.mixer.convolve.weight" not in found
    assert not {name for name in found if not name.startswith("blocks.")}


@pytest.mark.parametrize("size", [1, 3, 64])
def test_every_matrix_is_dealt_to_one_process_and_evenly(size):
    sides = [(1 + i * 37 % 40, 1 + i * 11 % 23) for i in range(90)]
    matrices = [Matrix(side, side[:1], None, True) for side in sides]
    rounds = deal(matrices, size)
    dealt = sorted(i for owners in rounds for numbers in owners for i in numbers)
    assert dealt == list(range(90))
    largest = max(matrix.numel for matrix in matrices)
    for owners in rounds:
        assert len(owners) == size
        assert all(sum(matrices[i].numel for i in numbers) <= largest for numbers in owners)
    loads = [sum(matrices[i].cost for o in rounds for i in o[process]) for process in range(size)]
    assert max(loads) <= min(loads) + max(matrix.cost for matrix in matrices)


def test_deepspeed_is_refused():
    with pytest.raises(InputError, match=r"optim.kind = 'muon': engine 'deepspeed'"):
        prepare(small("fp32", engine="deepspeed"), 2)
