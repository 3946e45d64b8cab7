import pytest
import torch
from longctx_kernels.norm_gate import ACTIVATIONS, norm_gate, norm_gate_reference
from torch._dynamo.testing import CompileCounterWithBackend

from tests.tolerances import assert_close

NAMES = ("x", "gate", "weight")
SHAPES = {"one row": (1, 1, 1, 7), "odd": (2, 11, 3, 5), "no heads": (3, 13, 24), "V 1": (2, 3, 1)}


def noise(seed, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def operands(*shape, given=NAMES, dtype=torch.float64):
    shapes = dict(zip(NAMES, (shape, shape, shape[-1:])))
    made = {n: noise(i, *s, dtype=dtype) for i, (n, s) in enumerate(shapes.items())}
    return {name: made[name].requires_grad_() for name in given}


def results(op, operands, **options):
    """Output and gradients by name."""
    out = op(*(operands.get(name) for name in NAMES), **options)
    dout = noise(9, *out.shape).bfloat16().to(out)
    grads = torch.autograd.grad(out, list(operands.values()), dout)
    return {"out": out.detach()} | dict(zip(operands, grads))


def by_row(x, gate=None, weight=None, eps=1e-6, activation="silu"):
    """The definition row by row, in numbers only."""
    rows = []
    gates = [None] * x[..., 0].numel() if gate is None else gate.flatten(0, -2)
    for row, gate_V in zip(x.flatten(0, -2), gates):
        out = row / (sum(value * value for value in row) / len(row) + eps).sqrt()
        out = out if weight is None else out * weight
        if gate_V is not None:
            shaped = {"none": 1, "sigmoid": 1}.get(activation, gate_V)
            factor = gate_V if activation == "none" else shaped / (1 + torch.exp(-gate_V))
            out = out * factor
        rows.append(out)
    return torch.stack(rows).view_as(x)


def check(operands, precision="fp64", backend="auto", **options):
    wide = {name: x.detach().double().requires_grad_() for name, x in operands.items()}
    expected = results(by_row, wide, **options)
    actual = results(norm_gate, operands, backend=backend, **options)
    for name, value in expected.items():
        assert_close(actual[name], value, precision, name)
        assert name == "out" or actual[name].dtype == operands[name].dtype
    for name, value in results(norm_gate_reference, wide, **options).items():
        assert_close(value, expected[name], "fp64", f"reference {name}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_it_equals_the_definition(shape, activation):
    check(operands(*shape), activation=activation)


@pytest.mark.parametrize("given", [("x",), ("x", "gate"), ("x", "weight")])
def test_gate_and_weight_can_be_left_out(given):
    check(operands(2, 3, 2, 6, given=given), eps=0.1)


def test_a_row_of_zeros_has_finite_gradients():
    made = operands(1, 3, 4)
    with torch.no_grad():
        made["x"][0, 1] = 0
    check(made)


def test_half_precision_is_computed_in_fp32():
    made = operands(2, 5, 2, 16, dtype=torch.bfloat16)
    made["weight"] = made["weight"].detach().float().requires_grad_()
    wide = {name: x.detach().float().requires_grad_() for name, x in made.items()}
    expected, actual = results(norm_gate, wide), results(norm_gate, made)
    assert actual["weight"].dtype == torch.float32
    for name in ("out", "x", "gate"):
        assert torch.equal(actual[name], expected[name].bfloat16())


def test_derivatives_equal_differences():
    made = tuple(operands(1, 3, 2, 4).values())
    for activation in ACTIVATIONS:
        assert torch.autograd.gradcheck(lambda *x, a=activation: norm_gate(*x, activation=a), made)


def test_slices_of_a_larger_tensor_are_fine():
    made = operands(2, 5, 3, 8)
    both = torch.cat([made["x"].detach(), made["gate"].detach()], -1)
    sliced = dict(made)
    sliced["x"], sliced["gate"] = (x.requires_grad_() for x in both.chunk(2, -1))
    expected = results(norm_gate, made)
    for name, value in results(norm_gate, sliced).items():
        assert_close(value, expected[name], "fp64", name)


def test_the_op_keeps_the_rules_of_custom_ops():
    op, made = torch.ops.longctx.norm_gate.default, tuple(operands(2, 3, 2, 4).values())
    torch.library.opcheck(op, (*made, 1e-6, "silu", "auto"))
    torch.library.opcheck(op, (made[0], None, None, 1e-6, "none", "auto"))


def test_it_compiles_whole_and_equals_eager():
    made = operands(2, 9, 2, 8)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(norm_gate, fullgraph=True, backend=counter)
    actual, expected = results(compiled, made), results(norm_gate, made)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_BTHV": torch.zeros(0, 4)}, "x must be floats"),
        ({"x_BTHV": torch.zeros(2, 4, dtype=torch.int32)}, "x must be floats"),
        ({"gate_BTHV": torch.zeros(2, 5)}, "gate must be"),
        ({"gate_BTHV": torch.zeros(2, 4).half()}, "gate must have x's dtype"),
        ({"weight_V": torch.zeros(5)}, "weight must be"),
        ({"weight_V": torch.zeros(4, device="meta")}, "weight must be on cpu"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"activation": "relu"}, "activation 'relu'"),
        ({"backend": "fla"}, "backend 'fla'"),
        ({"backend": "triton"}, "backend 'triton' needs"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        norm_gate(**({"x_BTHV": torch.zeros(2, 4)} | change))
