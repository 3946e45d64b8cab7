import itertools

import pytest
import torch
from longctx_kernels.short_convolution import short_convolution, short_convolution_reference
from torch._dynamo.testing import CompileCounterWithBackend

from tests.tolerances import assert_close

B, C = 2, 5
STARTS = ((0,), (0, 1, 3, 7, 8))
"""Where documents start in each of the two rows."""
NAMES = ("x", "weight", "bias", "before")


def noise(seed, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def operands(T, W, seed=0, dtype=torch.float64):
    shapes = ((B, T, C), (C, W), (C,), (B, W - 1, C))
    made = {n: noise(seed + i, *s, dtype=dtype) for i, (n, s) in enumerate(zip(NAMES, shapes))}
    return {name: x.requires_grad_() for name, x in made.items()}


def ages(T, enter=0):
    """Distance of each token from its document's start; `enter` of the first document's lie before
    the first token."""
    age_BT = torch.arange(T).repeat(B, 1) + enter
    for row, starts in enumerate(STARTS):
        for start in starts[1:]:
            if start < T:
                age_BT[row, start:] = torch.arange(T - start)
    return age_BT


def call(op, operands, age_BT=None, **options):
    return op(
        operands["x"],
        operands["weight"],
        operands.get("bias"),
        before_BWC=operands.get("before"),
        age_BT=age_BT,
        **options,
    )


def results(op, operands, age_BT=None, **options):
    """Output and gradients by name."""
    out = call(op, operands, age_BT, **options)
    dout = noise(9, *out.shape).bfloat16().to(out)
    grads = torch.autograd.grad(out, list(operands.values()), dout)
    return {"out": out.detach()} | dict(zip(operands, grads))


def check(operands, age_BT=None, precision="fp64", backend="auto", **options):
    """Compares with the definition in fp64 from the same inputs."""
    wide = {name: x.detach().double().requires_grad_() for name, x in operands.items()}
    expected = results(short_convolution_reference, wide, age_BT, **options)
    actual = results(short_convolution, operands, age_BT, backend=backend, **options)
    for name, value in expected.items():
        assert_close(actual[name], value, precision, name)
        assert actual[name].is_contiguous()
        assert name == "out" or actual[name].dtype == operands[name].dtype


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("is_packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize(("T", "W"), [(1, 2), (1, 4), (2, 4), (3, 8), (17, 2), (17, 3), (29, 8)])
def test_it_equals_the_definition(T, W, is_packed, activation):
    check(operands(T, W), ages(T, enter=1) if is_packed else None, activation=activation)


@pytest.mark.parametrize("given", [(0, 0), (0, 1), (1, 0)])
def test_bias_and_tokens_before_can_be_left_out(given):
    made = operands(11, 4)
    for name, is_given in zip(("bias", "before"), given):
        if not is_given:
            del made[name]
    check(made, activation="silu")


def test_the_last_filter_column_belongs_to_the_token_itself():
    """As in flash-linear-attention and Mamba."""
    x_BTC = noise(0, B, 9, C)
    weight_CW = torch.zeros(C, 3, dtype=torch.float64)
    weight_CW[:, -1] = 1
    assert torch.equal(short_convolution(x_BTC, weight_CW), x_BTC)
    late_BTC = short_convolution(x_BTC, weight_CW.roll(-1, 1))
    assert torch.equal(late_BTC[:, 1:], x_BTC[:, :-1])


def test_it_is_the_causal_convolution_of_torch():
    made = operands(23, 4)
    x_BCT = torch.nn.functional.pad(made["x"].transpose(1, 2), (3, 0))
    expected = torch.nn.functional.conv1d(x_BCT, made["weight"][:, None], made["bias"], groups=C)
    actual = short_convolution(made["x"], made["weight"], made["bias"])
    assert_close(actual, expected.transpose(1, 2), "fp64")


def test_a_document_ignores_what_lies_before_it():
    T = 12
    made = operands(T, 4)
    whole = call(short_convolution, made, ages(T))
    for row, starts in enumerate(STARTS):
        for start, stop in itertools.pairwise((*starts, T)):
            alone = short_convolution(made["x"][row : row + 1, start:stop], made["weight"])
            alone = alone + made["bias"]
            if start > 0:
                assert_close(whole[row : row + 1, start:stop], alone, "fp64")


def test_what_is_not_finite_stays_in_its_document():
    T, start = 12, STARTS[1][3]
    made = operands(T, 4)
    with torch.no_grad():
        made["x"][1, start - 1] = torch.inf
    whole = call(short_convolution, made, ages(T))
    assert torch.isfinite(whole[1, start:]).all()


@pytest.mark.parametrize("widths", [(5, 9, 6), (1, 2, 17), (4, 15, 1)])
@pytest.mark.parametrize("W", [2, 4, 8])
def test_shards_with_their_halos_equal_the_whole(W, widths):
    """Outputs and all gradients, and those of a halo are what the neighbour's tokens lack."""
    T = sum(widths)
    made, age_BT = operands(T, W), ages(T, enter=1)
    expected = results(short_convolution, made, age_BT, activation="silu")
    padded = torch.cat([made["before"], made["x"]], 1).detach()
    dout = noise(9, B, T, C).bfloat16().double()
    dpadded, total = torch.zeros_like(padded), dict.fromkeys(("weight", "bias"), 0)
    start = 0
    for width in widths:
        shard = {"x": padded[:, start + W - 1 : start + W - 1 + width]}
        shard |= {"weight": made["weight"], "bias": made["bias"]}
        shard["before"] = padded[:, start : start + W - 1]
        leaves = {name: x.detach().requires_grad_() for name, x in shard.items()}
        own = slice(start, start + width)
        out = call(short_convolution, leaves, age_BT[:, own], activation="silu")
        assert_close(out, expected["out"][:, own], "fp64")
        grads = torch.autograd.grad(out, list(leaves.values()), dout[:, own])
        grads = dict(zip(leaves, grads))
        both = torch.cat([grads["before"], grads["x"]], 1)
        dpadded[:, start : start + W - 1 + width] += both
        total = {name: total[name] + grads[name] for name in total}
        start += width
    assert_close(dpadded[:, W - 1 :], expected["x"], "fp64")
    assert_close(dpadded[:, : W - 1], expected["before"], "fp64")
    for name, value in total.items():
        assert_close(value, expected[name], "fp64", name)


def test_half_precision_is_computed_in_fp32():
    made = operands(40, 4, dtype=torch.bfloat16)
    wide = {name: x.detach().float().requires_grad_() for name, x in made.items()}
    expected = results(short_convolution, wide, ages(40), activation="silu")
    actual = results(short_convolution, made, ages(40), activation="silu")
    for name, value in actual.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, expected[name].bfloat16()), name


def test_weights_may_be_wider_than_tokens():
    made = operands(9, 4, dtype=torch.bfloat16)
    for name in ("weight", "bias"):
        made[name] = made[name].detach().float().requires_grad_()
    grads = results(short_convolution, made, activation="silu")
    assert [grads[n].dtype for n in ("out", "x")] == [torch.bfloat16] * 2
    assert [grads[n].dtype for n in ("weight", "bias")] == [torch.float32] * 2


def test_slices_of_a_larger_tensor_are_fine():
    made = operands(13, 4)
    wide_BTC = torch.cat([made["x"].detach(), made["x"].detach()], 2)
    sliced = dict(made, x=wide_BTC[..., :C].requires_grad_())
    assert not sliced["x"].is_contiguous()
    expected = results(short_convolution, made, activation="silu")
    for name, value in results(short_convolution, sliced, activation="silu").items():
        assert torch.equal(value, expected[name]), name


def test_derivatives_equal_differences():
    made = operands(7, 3)

    def op(x, weight, bias, before):
        return short_convolution(
            x, weight, bias, before_BWC=before, age_BT=ages(7, 1), activation="silu"
        )

    assert torch.autograd.gradcheck(op, tuple(made.values()))


def test_the_op_keeps_the_rules_of_custom_ops():
    made = [x.detach().requires_grad_() for x in operands(9, 4).values()]
    op, age_BT = torch.ops.longctx.short_convolution.default, ages(9).int()
    torch.library.opcheck(op, (*made, age_BT, True, "auto"))
    torch.library.opcheck(op, (*made[:2], None, None, None, False, "auto"))


def test_it_compiles_whole_and_other_documents_do_not_compile_again():
    made = operands(16, 4)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(short_convolution, fullgraph=True, backend=counter)
    for enter in (0, 2):
        age_BT = ages(16, enter)
        actual = results(compiled, made, age_BT, activation="silu")
        expected = results(short_convolution, made, age_BT, activation="silu")
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_BTC": torch.zeros(2, 0, C)}, "x must be floats"),
        ({"x_BTC": torch.zeros(6, C)}, "x must be floats"),
        ({"x_BTC": torch.zeros(2, 6, C, dtype=torch.int32)}, "x must be floats"),
        ({"weight_CW": torch.zeros(C, 1)}, "weight must be"),
        ({"weight_CW": torch.zeros(C, 9)}, "weight must be"),
        ({"weight_CW": torch.zeros(C + 1, 4)}, "weight must be"),
        ({"bias_C": torch.zeros(C + 1)}, "bias must be"),
        ({"before_BWC": torch.zeros(2, 4, C)}, "before must be"),
        ({"before_BWC": torch.zeros(2, 3, C).half()}, "before must have x's dtype"),
        ({"age_BT": torch.zeros(6, dtype=torch.int32)}, "age must be"),
        ({"age_BT": torch.zeros(2, 6)}, "age must be ints"),
        ({"bias_C": torch.zeros(C, device="meta")}, "bias must be on cpu"),
        ({"activation": "relu"}, "activation 'relu'"),
        ({"backend": "fla"}, "backend 'fla'"),
        ({"backend": "triton"}, "backend 'triton' needs"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    arguments = {"x_BTC": torch.zeros(2, 6, C), "weight_CW": torch.zeros(C, 4)} | change
    with pytest.raises(ValueError, match=message):
        short_convolution(**arguments)
