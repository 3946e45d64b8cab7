import pytest
import torch
from longctx_kernels.selected_rows import gather_rows, scatter_rows
from torch._dynamo.testing import CompileCounterWithBackend

from tests.tolerances import assert_close

B, T, H, E, D = 2, 13, 3, 5, 20


def noise(seed, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def selection(is_full=False, count=E):
    """Tokens of each head in any order, in part of its slots; the first head has the last token."""
    generator = torch.Generator().manual_seed(3)
    order = torch.rand(B, H, T, generator=generator).argsort(-1)[..., :count]
    if not is_full:
        order[torch.rand(order.shape, generator=generator) < 0.3] = -1
    order[:, 0, 0] = T - 1
    order[:, 0, 1:] = order[:, 0, 1:].masked_fill(order[:, 0, 1:] == T - 1, -1)
    return order


def gathered(x_BTD, index_BHE):
    """Slot by slot."""
    rows = [
        x_BTD[b, t] * (t >= 0)
        for b, slots in enumerate(index_BHE.flatten(1).tolist())
        for t in slots
    ]
    return torch.stack(rows).view(*index_BHE.shape, -1)


def scattered(rows_BHED, index_BHE, length, weight_BHE=None):
    """Token by token."""
    if weight_BHE is not None:
        rows_BHED = rows_BHED * weight_BHE[..., None]
    tokens = [
        (rows_BHED[b] * (index_BHE[b] == t)[..., None]).sum((0, 1))
        for b in range(len(rows_BHED))
        for t in range(length)
    ]
    return torch.stack(tokens).view(len(rows_BHED), length, -1)


def results(op, first, *others, weight=None, **options):
    """Output and gradients."""
    leaves = [first] if weight is None else [first, weight]
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = op(leaves[0], *others, *leaves[1:], **options)
    dout = noise(9, *out.shape).bfloat16().to(out)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def check(precision="fp64", dtype=torch.float64, backend="auto", index=None, weighted=True):
    index = selection() if index is None else index
    x, rows = noise(0, B, T, D, dtype=dtype), noise(1, *index.shape, D, dtype=dtype)
    weight = noise(2, *index.shape, dtype=dtype) if weighted else None
    expected = results(gathered, x.double(), index)
    for a, e in zip(results(gather_rows, x, index, backend=backend), expected):
        assert_close(a, e, precision, "gather")
        assert a.dtype == dtype
    wide = None if weight is None else weight.double()
    expected = results(scattered, rows.double(), index, T, weight=wide)
    actual = results(scatter_rows, rows, index, T, weight=weight, backend=backend)
    for name, a, e in zip(("out", "drows", "dweight"), actual, expected):
        assert_close(a, e, precision, name)
        assert a.dtype == dtype


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("count", [1, E, T])
def test_they_equal_the_definitions(count, weighted):
    check(index=selection(count=count), weighted=weighted)


def test_indices_may_be_int32():
    check(index=selection().int())


def test_all_slots_may_be_empty():
    check(index=torch.full((B, H, E), -1))


def test_putting_back_what_was_taken_counts_the_heads():
    x, index = noise(0, B, T, D), selection()
    heads_BT = torch.stack([(index == t).sum((1, 2)) for t in range(T)], 1)
    again = scatter_rows(gather_rows(x, index), index, T)
    assert_close(again, x * heads_BT[..., None], "fp64")


def test_derivatives_equal_differences():
    index, rows, weight = selection(), noise(0, B, H, E, 2), noise(1, B, H, E)
    leaves = rows.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda r, w: scatter_rows(r, index, T, w), leaves)


def test_weights_may_be_wider_than_rows():
    index = selection()
    rows, weight = noise(1, *index.shape, D, dtype=torch.bfloat16), noise(2, *index.shape).float()
    out, drows, dweight = results(scatter_rows, rows, index, T, weight=weight)
    assert out.dtype == drows.dtype == torch.bfloat16
    assert dweight.dtype == torch.float32


def test_the_ops_keep_the_rules_of_custom_ops():
    index, rows = selection(), noise(0, B, H, E, D).requires_grad_()
    weight = noise(1, B, H, E).requires_grad_()
    torch.library.opcheck(torch.ops.longctx.scatter_rows.default, (rows, index, weight, T, "auto"))
    torch.library.opcheck(torch.ops.longctx.scatter_rows.default, (rows, index, None, T, "auto"))
    x = noise(0, B, T, D).requires_grad_()
    torch.library.opcheck(torch.ops.longctx.gather_rows.default, (x, index, "auto"))


def test_they_compile_whole_and_equal_eager():
    def both(x, index, weight):
        return scatter_rows(gather_rows(x, index), index, T, weight)

    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend=counter)
    x, index, weight = noise(0, B, T, D), selection(), noise(1, B, H, E)
    expected = results(both, x, index, weight=weight)
    assert all(map(torch.equal, results(compiled, x, index, weight=weight), expected))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows_BHED": torch.zeros(2, 3, 4)}, "rows must be floats"),
        ({"rows_BHED": torch.zeros(2, 3, 0, 4)}, "rows must be floats"),
        ({"index_BHE": torch.zeros(2, 3, 5, dtype=torch.int64)}, "index must be"),
        ({"index_BHE": torch.zeros(2, 3, 4)}, "index must be int32 or int64"),
        ({"index_BHE": torch.zeros(2, 3, 4, dtype=torch.int64, device="meta")}, "index must be on"),
        ({"weight_BHE": torch.zeros(2, 3)}, "weight must be"),
        ({"length": 0}, "length must be"),
        ({"backend": "fla"}, "backend 'fla'"),
        ({"backend": "triton"}, "backend 'triton' needs"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    arguments = {"rows_BHED": torch.zeros(2, 3, 4, 8), "length": 6}
    arguments["index_BHE"] = torch.zeros(2, 3, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        scatter_rows(**(arguments | change))


def test_a_bad_sequence_is_refused():
    index = torch.zeros(2, 3, 4, dtype=torch.int64)
    for x, message in ((torch.zeros(2, 5), "x must be"), (torch.zeros(3, 5, 4), "index must be")):
        with pytest.raises(ValueError, match=message):
            gather_rows(x, index)
