"""Convolutions, norms and selected rows in Triton's interpreter, against definitions in fp64."""

import pytest
import torch
from longctx_kernels.launch import is_interpreted
from longctx_kernels.norm_gate import ACTIVATIONS

from tests.kernels import test_norm_gate as norms
from tests.kernels import test_selected_rows as selections
from tests.kernels import test_short_convolution as convolutions
from tests.kernels.test_short_convolution import ages, operands

assert is_interpreted(), "kernels are interpreted only if TRITON_INTERPRET=1 is set"

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}
each_precision = pytest.mark.parametrize("precision", PRECISIONS)


def convolve(T, W, precision="fp32", age_BT=None, given=convolutions.NAMES, activation="silu"):
    made = operands(T, W, dtype=PRECISIONS[precision])
    made = {name: made[name] for name in given}
    convolutions.check(made, age_BT, precision, activation=activation, backend="triton")


@each_precision
@pytest.mark.parametrize(("T", "W"), [(1, 2), (3, 8), (33, 4)])
def test_a_convolution_equals_the_definition(T, W, precision):
    convolve(T, W, precision, ages(T, enter=1))


@pytest.mark.parametrize("T", [13, 14, 27])
def test_edges_of_chunks_do_not_show(T):
    """Backward, a program has BLOCK_T - W + 1 tokens of its own: 13 here."""
    convolve(T, 4, age_BT=ages(T, enter=2))


@pytest.mark.parametrize("given", [("x", "weight"), ("x", "weight", "bias")])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_convolution_needs_no_bias_halo_or_ages(given, activation):
    convolve(19, 3, given=given, activation=activation)


def test_tokens_may_lie_apart():
    T, W, C = 18, 4, convolutions.C
    made = operands(T, W, dtype=torch.float32)
    wide = torch.randn(2, T + W - 1, 3 * C)
    wide[:, W - 1 :, C : 2 * C], wide[:, : W - 1, C : 2 * C] = made["x"], made["before"]
    part = wide[..., C : 2 * C].detach()
    sliced = dict(made, x=part[:, W - 1 :], before=part[:, : W - 1])
    sliced = {name: x.detach().requires_grad_() for name, x in sliced.items()}
    assert not sliced["x"].is_contiguous()
    convolutions.check(sliced, ages(T, 1), "fp32", activation="silu", backend="triton")


def test_channels_fill_several_programs(monkeypatch):
    monkeypatch.setattr(convolutions, "C", 75)
    convolve(18, 4, age_BT=ages(18))


def test_shards_with_their_halos_equal_the_whole():
    T, W, cut = 21, 4, 8
    made, age_BT = operands(T, W, dtype=torch.float32), ages(T, enter=1)
    op, options = convolutions.short_convolution, {"activation": "silu", "backend": "triton"}
    whole = convolutions.call(op, made, age_BT, **options)
    halves = [dict(made, x=made["x"][:, :cut]), dict(made, x=made["x"][:, cut:])]
    halves[1]["before"] = made["x"][:, cut - W + 1 : cut]
    own = age_BT[:, :cut], age_BT[:, cut:]
    out = torch.cat([convolutions.call(op, x, age, **options) for x, age in zip(halves, own)], 1)
    assert torch.equal(out, whole)
    dout, leaves = torch.randn_like(whole), list(made.values())
    expected = torch.autograd.grad(whole, leaves, dout)
    for name, a, e in zip(made, torch.autograd.grad(out, leaves, dout), expected):
        convolutions.assert_close(a, e, "fp32", name)


def normalise(*shape, precision="fp32", given=norms.NAMES, activation="silu"):
    made = norms.operands(*shape, given=given, dtype=PRECISIONS[precision])
    norms.check(made, precision, activation=activation, backend="triton")


@each_precision
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 7), (2, 11, 3, 20), (2, 17, 2, 16)])
def test_a_norm_equals_the_definition(shape, activation, precision):
    normalise(*shape, precision=precision, activation=activation)


@pytest.mark.parametrize("given", [("x",), ("x", "gate"), ("x", "weight")])
def test_a_norm_needs_no_gate_or_weight(given):
    normalise(2, 3, 2, 6, given=given)


def test_rows_wider_than_the_table_knows_are_fine():
    normalise(3, 2, 700)


def test_rows_too_wide_are_refused():
    with pytest.raises(ValueError, match="at most 8192"):
        norms.norm_gate(torch.zeros(1, 8193), backend="triton")


@pytest.mark.parametrize("x", [-200.0, -30.0, 0.0, 30.0, 200.0])
def test_gates_far_from_zero_stay_finite(x):
    row = torch.linspace(1, 2, 8)
    gate = torch.full_like(row, x).requires_grad_()
    out = norms.norm_gate(row[None], gate[None], backend="triton")
    expected = norms.norm_gate_reference(row[None], gate[None].double())
    norms.assert_close(out, expected, "fp32")
    assert torch.isfinite(torch.autograd.grad(out.sum(), gate)[0]).all()


@each_precision
@pytest.mark.parametrize("weighted", [True, False])
def test_selected_rows_equal_the_definitions(weighted, precision):
    selections.check(precision, PRECISIONS[precision], "triton", weighted=weighted)
