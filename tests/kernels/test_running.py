import pytest
import torch
from longctx_kernels import running
from longctx_kernels.running import (
    LogSumExp,
    running_log_sum_exp,
    running_log_sum_exp_reference,
    weighted_means_reference,
)
from torch._dynamo.testing import CompileCounterWithBackend

from tests.tolerances import assert_close

CUTS = {"one": (0, 41), "packed": (0, 1, 2, 7, 8, 30, 41), "length 1": tuple(range(42))}
NAMES = ("total", "kept", "added", "x", "initial")


def noise(seed, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def results(op, x, initial, cuts, used=(0, 1, 2)):
    """Results and gradients by name; the loss has only the results that are `used`."""
    leaves = [y.detach().clone().requires_grad_() for y in (x, initial) if y is not None]
    cu_seqlens = None if cuts is None else torch.tensor(cuts)
    sums = op(leaves[0], leaves[1] if initial is not None else None, cu_seqlens)
    loss = sum((sums[i] * noise(50 + i, *x.shape).to(sums[i])).sum() for i in used)
    return dict(zip(NAMES, [*sums, *torch.autograd.grad(loss, leaves)]))


def check(x, initial=None, cuts=None, used=(0, 1, 2), precision="fp64"):
    wide = results(
        running_log_sum_exp_reference,
        *(y if y is None else y.double() for y in (x, initial)),
        cuts,
        used,
    )
    for name, value in results(running_log_sum_exp, x, initial, cuts, used).items():
        assert_close(value, wide[name], precision, name)


@pytest.fixture(params=[1 << 16, 24, 3], ids=["one slab", "slabs", "slabs of one token"])
def slab_elements(request, monkeypatch):
    monkeypatch.setitem(running.SLAB_ELEMENTS, "cpu", request.param)


@pytest.mark.usefixtures("slab_elements")
@pytest.mark.parametrize("has_initial", [False, True], ids=["from nothing", "initial"])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_it_equals_the_definition(cuts, has_initial):
    x = 3 * noise(0, 1, 41, 3)
    check(x, 3 * noise(1, len(cuts) - 1, 3) if has_initial else None, cuts)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_results_can_be_left_out_of_the_loss(used):
    check(noise(0, 1, 41, 3), noise(1, 6, 3), CUTS["packed"], used)


def test_rows_of_a_batch_are_documents_and_rows_can_have_any_shape():
    check(noise(0, 3, 11, 2, 4), noise(1, 3, 2, 4))
    check(noise(0, 3, 11))


def test_pieces_with_nothing_behind_them_may_be_among_others():
    x, initial, cuts = noise(0, 1, 41, 3), noise(1, 6, 3), CUTS["packed"]
    initial[[0, 3]] = -torch.inf
    mixed, without = (results(running_log_sum_exp, x, y, cuts) for y in (initial, None))
    alone = torch.tensor([*range(1), *range(7, 8)])
    for name in ("total", "kept", "added", "x"):
        assert torch.equal(mixed[name][:, alone], without[name][:, alone])
        assert torch.isfinite(mixed[name]).all()
    assert (mixed["initial"][[0, 3]] == 0).all()


def test_going_on_later_equals_the_whole():
    x = 3 * noise(0, 2, 30, 4)
    whole, total, parts = running_log_sum_exp(x), None, []
    for part in x.split((7, 1, 1, 21), 1):
        parts.append(running_log_sum_exp(part, total))
        total = parts[-1].total[:, -1]
    for name, value in zip(LogSumExp._fields, whole):
        joined = torch.cat([getattr(part, name) for part in parts], 1)
        assert_close(joined, value, "fp64", name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_shares_are_never_above_one_and_large_numbers_do_not_overflow(dtype):
    x = 200 * noise(0, 1, 301, 5, dtype=dtype).sign() + noise(1, 1, 301, 5, dtype=dtype)
    x[0, 150:] *= 1e4
    found = results(running_log_sum_exp, x, None, (0, 100, 301))
    for name in ("total", "kept", "added", "x"):
        assert torch.isfinite(found[name]).all(), name
    assert (found["kept"] <= 0).all()
    assert (found["added"] <= 0).all()
    shares = found["kept"].exp() + found["added"].exp()
    shares[0, [0, 100]] -= 1
    assert_close(shares, torch.ones_like(shares), "fp32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_half_and_single_precision_are_computed_in_more(dtype):
    x = noise(0, 1, 41, 3, dtype=dtype)
    check(
        x,
        noise(1, 6, 3, dtype=dtype),
        CUTS["packed"],
        precision="fp32" if dtype == torch.float32 else "bf16",
    )
    assert all(y.dtype == torch.float32 for y in running_log_sum_exp(x))


def test_a_long_sequence_does_not_drift_in_single_precision():
    """Shares of the first token at the last one, from the products of 65536 factors."""
    x = noise(0, 1, 1 << 16, 4)
    wide = running_log_sum_exp(x)
    narrow = running_log_sum_exp(x.float())
    for a, b in zip(narrow, wide):
        assert_close(a, b, "fp32")
    products = narrow.kept.double().sum(1), wide.kept.sum(1)
    assert_close(*products, "fp32")


def test_derivatives_equal_differences():
    x, initial = noise(0, 1, 9, 2).requires_grad_(), noise(1, 3, 2).requires_grad_()
    cuts = torch.tensor((0, 1, 5, 9))
    assert torch.autograd.gradcheck(lambda a, b: running_log_sum_exp(a, b, cuts), (x, initial))
    assert torch.autograd.gradcheck(lambda a: running_log_sum_exp(a, None, cuts), (x,))


def test_the_ops_keep_the_rules_of_custom_ops():
    x, initial = noise(0, 9, 2).requires_grad_(), noise(1, 3, 2).requires_grad_()
    cuts, d = torch.tensor((0, 1, 5, 9)), noise(2, 9, 2)
    forward = torch.ops.longctx.running_log_sum_exp.default
    backward = torch.ops.longctx.running_log_sum_exp_backward.default
    for start in (initial, None):
        torch.library.opcheck(forward, (x, start, cuts))
        _, kept, added = (y.detach() for y in forward(x, start, cuts))
        begin = None if start is None else start.detach()
        torch.library.opcheck(backward, (d, None, d, kept, added, begin, cuts))


def test_it_compiles_whole_and_equals_eager_whatever_the_documents():
    x = noise(0, 1, 41, 3)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(running_log_sum_exp, fullgraph=True, backend=counter)
    for cuts in ((0, 5, 9, 41), (0, 30, 31, 41)):
        actual, expected = (results(op, x, None, cuts) for op in (compiled, running_log_sum_exp))
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert counter.frame_count == 1


def test_means_of_the_definition_are_softmax_means():
    log_weight, v = noise(0, 12, 2, 3), noise(1, 12, 2, 5)
    means = weighted_means_reference(log_weight, torch.ones_like(log_weight), v, (0, 4, 12))
    for t in range(12):
        seen = slice(0 if t < 4 else 4, t + 1)
        expected = torch.einsum("chr,chv->hrv", log_weight[seen].softmax(0), v[seen])
        assert_close(means[t], expected, "fp64")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4)}, "x must be floats"),
        ({"x": torch.zeros(1, 0, 2)}, "x must be floats"),
        ({"x": torch.zeros(1, 4, 2, dtype=torch.int32)}, "x must be floats"),
        ({"initial": torch.zeros(2, 2)}, "initial must be"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, "cu_seqlens must be a vector of ints"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens must rise strictly"),
        ({"cu_seqlens": torch.tensor([0, 4], device="meta")}, "cu_seqlens must be on the CPU"),
        ({"x": torch.zeros(2, 2, 2), "cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens needs B = 1"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        running_log_sum_exp(**({"x": torch.zeros(1, 4, 2)} | change))
