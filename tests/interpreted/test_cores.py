"""Cores with interpreted kernels, whole or on simulated ranks, equal PyTorch's in fp64."""

from dataclasses import replace

import pytest
import torch
from longctx_kernels.launch import is_interpreted

from longctx.sequence.local import LocalView
from longctx.sequence.sharded import Transports
from longctx.sequence.view import Persistent, SequenceView
from tests.sequence.cases import Case, Setting, Values, errors, run_simulated, run_whole
from tests.tolerances import LARGEST_ERROR

assert is_interpreted(), "kernels are interpreted only if TRITON_INTERPRET=1 is set"

HEADS, SIZE = 4, 16
SETTINGS = (
    Setting(2, "zigzag", Transports("allgather", "ring")),
    Setting(3, "contiguous", Transports("scan", "allgather", gather_heads=1)),
    Setting(2, "contiguous", Transports("ulysses", "ring", heads=2)),
    Setting(4, "mirror", Transports("serial", "allgather", heads=2)),
)


def case(name: str, core, shared=None, **tokens: tuple[int, ...]) -> Case:
    return Case(
        name,
        tokens,
        lambda shard, inputs: core(shard.view, inputs),
        lambda setting, inputs: core(LocalView(setting.documents, setting.length), inputs),
        shared or {},
    )


def softmax(window: int, persistent: int = 0) -> Case:
    def core(view: SequenceView, x: Values) -> torch.Tensor:
        shown = Persistent(x["pk"], x["pv"]) if persistent else None
        return view.softmax_attention(x["q"], x["k"], x["v"], window, persistent=shown)

    shared = {name: (persistent, 2, SIZE) for name in ("pk", "pv") if persistent}
    name = f"window {window}, {persistent} persistent"
    return case(name, core, shared, q=(HEADS, SIZE), k=(2, SIZE), v=(2, SIZE))


def decay(name: str, *gate: int) -> Case:
    def core(view: SequenceView, x: Values) -> torch.Tensor:
        g = -x["g"].square() if gate else torch.tensor([0.0, -0.01, -0.4, -5.0])
        return view.decay_attention(x["q"], x["k"], x["v"], g)

    extra = {"g": gate} if gate else {}
    return case(name, core, q=(HEADS, SIZE), k=(HEADS, SIZE), v=(HEADS, SIZE), **extra)


CASES = (
    softmax(0),
    softmax(6),
    softmax(6, persistent=3),
    decay("constant"),
    decay("scalar", HEADS),
    decay("diagonal", HEADS, SIZE),
)


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that were launched."""
    from longctx_kernels import decay_triton, lifetime_triton

    names = []
    for module in (decay_triton, lifetime_triton):
        right = module.launch

        def counted(kernel, *args, right=right, **options):
            names.append(kernel.__name__)
            right(kernel, *args, **options)

        monkeypatch.setattr(module, "launch", counted)
    return names


def whole_in_fp64(what: Case, setting: Setting) -> tuple[Values, Values]:
    return run_whole(what, replace(setting, dtype=torch.float64))


@pytest.mark.parametrize("what", CASES, ids=lambda c: c.name)
def test_one_process(what, launches):
    setting = Setting(1, dtype=torch.float32)
    expected, _ = whole_in_fp64(what, setting)
    assert not launches
    actual, _ = run_whole(what, setting)
    assert launches
    for name, value in actual.items():
        error = (value - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1)
        assert error <= LARGEST_ERROR["fp32"], name


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("what", CASES, ids=lambda c: c.name)
def test_simulated_ranks(what, setting, launches):
    setting = replace(setting, dtype=torch.float32)
    found = errors(run_simulated(what, setting), whole_in_fp64(what, setting))
    assert launches
    assert max(found.values()) <= LARGEST_ERROR["fp32"], found
