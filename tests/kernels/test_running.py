from functools import partial

import pytest
import torch
from longctx_kernels import running
from longctx_kernels.decay_attention import decay_attention
from longctx_kernels.running import (
    LogSumExp,
    running_log_sum_exp,
    running_log_sum_exp_reference,
    weighted_means_reference,
)
from torch._dynamo.testing import CompileCounterWithBackend

from tests.tolerances import assert_close

CUTS = {"one": (0, 41), "packed": (0, 1, 2, 7, 8, 30, 41), "length 1": tuple(range(42))}


def noise(seed, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def definition(x, initial, cu_seqlens, scale):
    """With weights at a given scale."""
    total = running_log_sum_exp_reference(x, initial, cu_seqlens)
    return LogSumExp(total, total - scale, x - scale, None)


def results(op, x, initial, cuts, used=("total", "whole", "own")):
    """Results and gradients by name; the loss has only the results that are `used`."""
    leaves = [y.detach().clone().requires_grad_() for y in (x, initial) if y is not None]
    cu_seqlens = None if cuts is None else torch.tensor(cuts)
    sums = op(leaves[0], leaves[1] if initial is not None else None, cu_seqlens)._asdict()
    loss = sum((sums[name] * noise(50 + len(name), *x.shape)).sum() for name in used)
    return sums | dict(zip(("gradient", "initial"), torch.autograd.grad(loss, leaves)))


def check(x, initial=None, cuts=None, used=("total", "whole", "own"), precision="fp64"):
    actual = results(running_log_sum_exp, x, initial, cuts, used)
    scale = (actual["total"] - actual["whole"]).detach().double()
    op = partial(definition, scale=scale)
    wide = [y if y is None else y.double() for y in (x, initial)]
    expected = results(op, *wide, cuts, used)
    for name in actual.keys() - {"decay"}:
        assert_close(actual[name], expected[name], precision, name)
    assert not actual["decay"].requires_grad
    return actual


def weighed(x, initial, cuts, v):
    """Sums of exp(x - L) v by decay attention, from sums of that kind."""
    sums = running_log_sum_exp(x[None], initial[0], torch.tensor(cuts))
    out, _ = decay_attention(
        (-sums.whole).exp()[..., None],
        sums.own.exp()[..., None],
        v[None],
        gk=sums.decay[..., None],
        scale=1.0,
        initial_state=initial[1],
        cu_seqlens=torch.tensor(cuts),
    )
    return sums, out[0]


@pytest.fixture(params=[1 << 16, 24, 3], ids=["one slab", "slabs", "slabs of one token"])
def slab_elements(request, monkeypatch):
    monkeypatch.setitem(running.SLAB_ELEMENTS, "cpu", request.param)


@pytest.mark.usefixtures("slab_elements")
@pytest.mark.parametrize("has_initial", [False, True], ids=["from nothing", "initial"])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_it_equals_the_definition(cuts, has_initial):
    x = 3 * noise(0, 1, 41, 3)
    check(x, 3 * noise(1, len(cuts) - 1, 3) if has_initial else None, cuts)


@pytest.mark.parametrize("used", [("total",), ("whole",), ("total", "own")], ids=str)
def test_results_can_be_left_out_of_the_loss(used):
    check(noise(0, 1, 41, 3), noise(1, 6, 3), CUTS["packed"], used)
    check(noise(0, 1, 41, 3), None, CUTS["packed"], used[-1:])


def test_rows_of_a_batch_are_documents_and_rows_can_have_any_shape():
    check(noise(0, 3, 11, 2, 4), noise(1, 3, 2, 4))
    check(noise(0, 3, 11))


def test_pieces_with_nothing_behind_them_may_be_among_others():
    x, initial, cuts = noise(0, 1, 41, 3), noise(1, 6, 3), CUTS["packed"]
    initial[[0, 3]] = -torch.inf
    mixed, without = (results(running_log_sum_exp, x, y, cuts) for y in (initial, None))
    for name in ("total", "whole", "own", "decay", "gradient"):
        assert torch.equal(mixed[name][:, [0, 7]], without[name][:, [0, 7]])
        assert torch.isfinite(mixed[name]).all()
    assert (mixed["initial"][[0, 3]] == 0).all()


@pytest.mark.usefixtures("slab_elements")
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_weights_at_the_scale_make_means_of_the_past(cuts):
    x, v = 3 * noise(0, 41, 3), noise(1, 41, 3, 2)
    _, out = weighed(x, (None, None), cuts, v)
    expected = weighted_means_reference(x[..., None], torch.ones_like(x)[..., None], v, cuts)
    assert_close(out, expected[:, :, 0], "fp64")


def test_going_on_later_equals_the_whole():
    """Also in the scale of states: that of a piece's end is that of its sum."""
    x, v = 3 * noise(0, 30, 3, dtype=torch.float32), noise(1, 30, 3, 2, dtype=torch.float32)
    sums, whole = weighed(x, (None, None), (0, 30), v)
    totals, parts, behind = [], [], (None, None)
    for tokens in torch.arange(30).split((7, 1, 1, 21)):
        cu_seqlens = (0, len(tokens))
        part, out = weighed(x[tokens], behind, cu_seqlens, v[tokens])
        _, state = decay_attention(
            torch.ones_like(part.own)[..., None],
            part.own.exp()[..., None],
            v[None, tokens],
            gk=part.decay[..., None],
            scale=1.0,
            initial_state=behind[1],
            output_final_state=True,
        )
        behind = part.total[:, -1], state
        totals.append(part.total[0])
        parts.append(out)
    assert_close(torch.cat(totals), sums.total[0], "fp32")
    assert_close(torch.cat(parts), whole, "fp32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_exponents_are_bounded_and_large_numbers_do_not_overflow(dtype):
    x = 200 * noise(0, 1, 301, 5, dtype=dtype).sign() + noise(1, 1, 301, 5, dtype=dtype)
    x[0, 150:] *= 1e4
    x[0, :, 4] = torch.linspace(0, 500, 301)
    found = results(running_log_sum_exp, x, None, (0, 100, 301))
    assert all(torch.isfinite(value).all() for value in found.values())
    assert (found["decay"] <= 0).all()
    assert (found["own"] <= 1).all()
    assert ((found["whole"] > -1e-3) & (found["whole"] <= 1)).all()


def test_the_scale_rises_in_whole_steps_and_so_seldom():
    x = noise(0, 1, 1 << 14, 4, dtype=torch.float32)
    decay = running_log_sum_exp(x).decay[0, :-1]
    assert torch.equal(decay, decay.round())
    assert (decay != 0).sum(0).max() < 20


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_half_and_single_precision_are_computed_in_more(precision):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    x, initial = noise(0, 1, 41, 3, dtype=dtype), noise(1, 6, 3, dtype=dtype)
    found = check(x, initial, CUTS["packed"], precision=precision)
    assert all(found[name].dtype == torch.float32 for name in LogSumExp._fields)


@pytest.mark.parametrize("rising", [False, True], ids=["noise", "rising"])
def test_a_long_sequence_does_not_drift_in_single_precision(rising):
    """Means over 65536 tokens, and their gradients; the largest number may be new all the time."""
    length = 1 << 16
    x, v = noise(0, length, 2), noise(1, length, 2, 2)
    if rising:
        x = x + torch.linspace(0, 40, length)[:, None]
    found = []
    for dtype in (torch.float64, torch.float32):
        leaves = [y.float().to(dtype).requires_grad_() for y in (x, v)]
        sums, out = weighed(leaves[0], (None, None), (0, length), leaves[1])
        loss = (out * noise(2, *out.shape)).sum() + (sums.total * noise(3, *x.shape)).sum()
        found.append((sums.total, out, *torch.autograd.grad(loss, leaves)))
    for wide, narrow in zip(*found):
        assert_close(narrow, wide, "fp32")


def test_derivatives_equal_differences():
    x, initial = noise(0, 1, 9, 2).requires_grad_(), noise(1, 3, 2).requires_grad_()
    cuts = torch.tensor((0, 1, 5, 9))
    assert torch.autograd.gradcheck(lambda *y: running_log_sum_exp(*y, cuts)[0], (x, initial))
    assert torch.autograd.gradcheck(lambda y: running_log_sum_exp(y, None, cuts)[0], (x,))


def test_the_ops_keep_the_rules_of_custom_ops():
    x, initial = noise(0, 9, 2).requires_grad_(), noise(1, 3, 2).requires_grad_()
    cuts, d = torch.tensor((0, 1, 5, 9)), noise(2, 9, 2)
    forward = torch.ops.longctx.running_log_sum_exp.default
    backward = torch.ops.longctx.running_log_sum_exp_backward.default
    for start in (initial, None):
        torch.library.opcheck(forward, (x, start, cuts))
        _, *saved = (y.detach() for y in forward(x, start, cuts))
        begin = None if start is None else start.detach()
        torch.library.opcheck(backward, (d, None, d, *saved, begin, cuts))


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
