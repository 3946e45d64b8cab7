import pytest
import torch
from longctx_kernels import softmax_attention as op
from longctx_kernels.softmax_attention import (
    softmax_attention,
    softmax_attention_after,
    softmax_attention_reference,
)

from tests.tolerances import assert_close

PIECES = {"T=1": (1, None), "T=75": (75, None), "packed": (75, [0, 1, 33, 34, 75])}


def operands(batch: int, length: int, key_size: int, value_size: int, key_heads: int = 2):
    generator = torch.Generator().manual_seed(length)
    shapes = ((4, key_size), (key_heads, key_size), (key_heads, value_size))
    return [
        torch.randn(batch, length, *s, generator=generator, dtype=torch.float64).requires_grad_()
        for s in shapes
    ]


def results(call, tensors, window, cuts):
    cu_seqlens = None if cuts is None else torch.tensor(cuts)
    out = call(*tensors, window, None, cu_seqlens)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return out, *torch.autograd.grad(out, tensors, dout)


@pytest.mark.parametrize("window", [0, 1, 9, 40, 75, 200])
@pytest.mark.parametrize("sizes", [(8, 8), (5, 7)], ids=["flash", "unequal sizes"])
@pytest.mark.parametrize(("length", "cuts"), PIECES.values(), ids=PIECES.keys())
def test_tiles_equal_the_definition(length, cuts, sizes, window, monkeypatch):
    monkeypatch.setattr(op, "QUERY_TILE", 16)
    op.plan_tiles.cache_clear()
    tensors = operands(2 if cuts is None else 1, length, *sizes)
    expected = results(softmax_attention_reference, tensors, window, cuts)
    actual = results(softmax_attention, tensors, window, cuts)
    op.plan_tiles.cache_clear()
    for name, a, e in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        assert_close(a, e, "fp64", name)


@pytest.mark.parametrize("window", [0, 9, 40])
@pytest.mark.parametrize("sizes", [(8, 8), (5, 7)], ids=["flash", "unequal sizes"])
def test_persistent_keys_are_seen_by_every_query(sizes, window, monkeypatch):
    monkeypatch.setattr(op, "PERSISTENT_TILE", 20)
    q, k, v = operands(1, 75, *sizes)
    cuts = torch.tensor([0, 1, 30, 72])

    def differentiated(call):
        out = call(q[:, 3:], k, v, window, None, cuts, persistent=3)
        return *torch.autograd.grad(out.cos().sum(), (q, k, v)), out

    expected = differentiated(softmax_attention_reference)
    actual = differentiated(softmax_attention)
    for name, a, e in zip(("dq", "dk", "dv", "out"), actual, expected, strict=True):
        assert_close(a, e, "fp64", name)
    alone = softmax_attention_reference(q[:, 3:], k[:, 3:], v[:, 3:], window, None, cuts)
    assert (alone - actual[3]).abs().max() > 1e-2


def test_persistent_keys_are_seen_in_generation():
    q, k, v = operands(1, 43, 8, 8)
    expected = softmax_attention(q[:, 3:], k, v, 5, persistent=3)[:, -7:]
    actual = softmax_attention_after(q[:, -7:], k, v, 5, 8**-0.5, persistent=3)
    assert_close(actual, expected, "fp64")


@pytest.mark.parametrize("window", [0, 5, 30])
def test_queries_after_a_memory_equal_the_last_rows(window):
    q, k, v = operands(2, 40, 8, 8)
    expected = softmax_attention(q, k, v, window)[:, -7:]
    assert_close(softmax_attention_after(q[:, -7:], k, v, window, 8**-0.5), expected, "fp64")


def test_log_sum_exp_of_a_tile_is_natural():
    q, k, v = (x[0].transpose(0, 1) for x in operands(1, 6, 8, 8, key_heads=4))
    tile = op.Tile(0, 6, 0, 6, lead=0)
    _, lse_HT = op.tile_forward(q, k, v, tile, 0.3)
    scores_HTT = (q @ k.mT * 0.3).masked_fill(~torch.ones(6, 6).tril().bool(), -torch.inf)
    assert_close(lse_HT, scores_HTT.logsumexp(-1), "fp64")


def test_heads_that_do_not_divide_are_refused():
    q, k, v = operands(1, 6, 8, 8, key_heads=3)
    with pytest.raises(ValueError, match="heads that divide"):
        softmax_attention(q, k, v)


def test_merging_tiles_equals_one_pass_and_empty_stays_empty():
    q, k, v = (x[0].transpose(0, 1).detach() for x in operands(1, 12, 8, 8, key_heads=4))
    whole = op.tile_forward(q, k, v, op.Tile(0, 12, 0, 12, op.FULL), 0.3)
    parts = [
        op.tile_forward(q, k[:, s], v[:, s], op.Tile(0, 12, 0, 1, op.FULL), 0.3)
        for s in (slice(0, 5), slice(5, 6), slice(6, 12))
    ]
    for order in ((0, 1, 2), (2, 0, 1)):
        a, b, c = (parts[i] for i in order)
        for actual, expected in zip(op.merge(op.merge(a, b), c), whole):
            assert_close(actual, expected, "fp64")
    empty = torch.zeros_like(whole[0]), torch.full_like(whole[1], -torch.inf)
    assert torch.equal(op.merge(empty, whole)[0], whole[0])
    out, lse = op.merge(empty, empty)
    assert torch.equal(out, empty[0])
    assert torch.equal(lse, empty[1])
