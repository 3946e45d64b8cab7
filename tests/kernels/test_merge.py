"""Partial results of disjoint keys: how they join, and that nothing seen is their identity."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from longctx_kernels import lifetime_attention as op
from longctx_kernels.lifetime_attention import NORMALISERS, Score, Sight
from torch.nn import functional as F

from longctx.sequence.verbs import top_monoid
from tests.kernels.test_lifetime_attention import operands, windowed
from tests.tolerances import assert_close

Part = tuple[torch.Tensor, torch.Tensor]
SIZES = st.lists(st.integers(0, 4), min_size=3, max_size=3)
SEEDS = st.integers(0, 2**31)


class Keys(NamedTuple):
    """Scores of two queries, which of the keys they see, and values."""

    scores_TU: torch.Tensor
    seen_TU: torch.Tensor
    v_UV: torch.Tensor


def drawn(seed: int, count: int) -> Keys:
    generator = torch.Generator().manual_seed(seed)
    scores, chances = torch.randn(2, 2, count, generator=generator, dtype=torch.float64)
    values = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return Keys(5 * scores, chances > -0.5, values)


def part_of(keys: Keys, normaliser: str) -> Part:
    """The definition for one head: numerator over denominator, and log of the latter."""
    scores, seen, v = keys
    sizes, signs = scores.exp(), torch.ones_like(scores)
    if normaliser == "signed":
        sizes, signs = scores.abs().exp(), scores.sign()
    if normaliser == "softplus":
        sizes = F.softplus(scores, threshold=40)
    if normaliser in ("sigmoid", "relu"):
        weights = scores.sigmoid() if normaliser == "sigmoid" else scores.relu()
        return (weights * seen @ v)[:, None], scores.new_zeros(2, 1)
    sizes = sizes * seen
    total = sizes.sum(-1)
    out = (sizes * signs) @ v / total.where(total > 0, 1.0)[:, None]
    return out[:, None], total.log()[:, None]


def parts_of(seed: int, sizes: list[int], normaliser: str) -> tuple[list[Part], Part]:
    """Results of each part and of the whole."""
    keys = drawn(seed, sum(sizes))
    pieces = zip(
        keys.scores_TU.split(sizes, 1), keys.seen_TU.split(sizes, 1), keys.v_UV.split(sizes)
    )
    return [part_of(Keys(*piece), normaliser) for piece in pieces], part_of(keys, normaliser)


def assert_same(actual: Part, expected: Part) -> None:
    empty = expected[1] == -torch.inf
    assert torch.equal(actual[1] == -torch.inf, empty)
    for a, e in zip(actual, expected):
        a, e = (x.masked_fill(empty if x.dim() == 2 else empty[..., None], 0.0) for x in (a, e))
        assert (a - e).abs().max() <= 1e-14 * max(1.0, float(e.abs().max()))
    assert not actual[0][empty].any()


@pytest.mark.parametrize("normaliser", NORMALISERS)
@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, sizes=SIZES)
def test_merge_is_associative_and_equals_the_whole(normaliser, seed, sizes):
    (a, b, c), whole = parts_of(seed, sizes, normaliser)
    left = op.merge(op.merge(a, b, normaliser), c, normaliser)
    right = op.merge(a, op.merge(b, c, normaliser), normaliser)
    assert_same(left, right)
    assert_same(left, whole)


@pytest.mark.parametrize("normaliser", NORMALISERS)
@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, size=st.integers(0, 4))
def test_nothing_seen_changes_no_bit(normaliser, seed, size):
    (nothing, part, _), _ = parts_of(seed, [0, size, 0], normaliser)
    assert not nothing[0].any()
    for merged in (op.merge(nothing, part, normaliser), op.merge(part, nothing, normaliser)):
        assert all(torch.equal(x, y) for x, y in zip(merged, part))


@pytest.mark.parametrize("far", [-1e4, -750.0, 750.0, 1e4])
def test_sums_of_any_size_join(far):
    out = torch.ones(2, 1, 3, dtype=torch.float64)
    near, other = torch.zeros(2, 1, dtype=torch.float64), torch.full((2, 1), far).double()
    merged, lse = op.merge((out, near), (2 * out, other))
    assert torch.equal(lse, near.maximum(other))
    assert torch.equal(merged, out * (1 + (far > 0)))


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("sizes", [[0, 0, 0], [0, 2, 0], [3, 0, 0], [0, 0, 2], [2, 1, 2]])
def test_gradients_of_merged_parts_are_finite_and_those_of_the_whole(normaliser, sizes):
    parts, whole = parts_of(7, sizes, normaliser)
    leaves = [x.requires_grad_() for part in parts for x in part]
    a, b, c = zip(leaves[::2], leaves[1::2])
    out, lse = op.merge(op.merge(a, b, normaliser), c, normaliser)
    assert_same((out.detach(), lse.detach()), whole)
    dout = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    loss = (out * dout).sum() + (lse.masked_fill(lse == -torch.inf, 0.0) * 0.3).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=normaliser in ("sigmoid", "relu"))
    if normaliser in ("sigmoid", "relu"):
        assert all(torch.equal(g, dout.expand_as(g)) for g in grads[::2])
        return
    for (part_out, part_lse), dpart, dlse in zip((a, b, c), grads[::2], grads[1::2]):
        share = (part_lse - whole[1]).exp().masked_fill(whole[1] == -torch.inf, 0.0).detach()
        assert_close(dpart, share[..., None] * dout, "fp64")
        assert_close(dlse, share * (((part_out - whole[0]) * dout).sum(-1) + 0.3), "fp64")


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_merged_key_ranges_equal_one_pass(normaliser):
    sight = windowed(100, 40)
    q, k, v, *_ = (
        None if x is None else x.detach()
        for x in operands(sight, 2, (16, 16), False, torch.float64)
    )
    score = Score(0.4, normaliser)
    whole = op.lifetime_forward(q, k, v, sight, score)
    parts = []
    for keys in (slice(0, 30), slice(30, 31), slice(31, 100)):
        part = Sight(sight.query_positions, sight.key_positions[keys], sight.expiry[keys])
        parts.append(op.lifetime_forward(q, k[keys], v[keys], part, score))
    merged = op.merge(op.merge(parts[0], parts[1], normaliser), parts[2], normaliser)
    for a, e in zip(merged, whole):
        assert_close(a, e, "fp64")


@settings(max_examples=80, deadline=None)
@given(seed=SEEDS, sizes=SIZES, count=st.integers(1, 6), levels=st.integers(1, 6))
def test_the_best_of_parts_join_associatively(seed, sizes, count, levels):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(0, levels, (2, sum(sizes)), generator=generator).double()
    key = torch.arange(sum(sizes)).expand(2, -1)[..., None]
    best = top_monoid(count)
    nothing = score[:, :0], key[:, :0]
    parts = [best.join(nothing, x) for x in zip(score.split(sizes, 1), key.split(sizes, 1))]
    a, b, c = parts
    left, right = best.join(best.join(a, b), c), best.join(a, best.join(b, c))
    order = score.sort(dim=1, descending=True, stable=True).indices[:, :count]
    for joined in (left, right):
        assert torch.equal(joined[0], score.gather(1, order))
        assert torch.equal(joined[1][..., 0], order)
    padded = best.identity((torch.zeros(2, count), torch.zeros(2, count, 1, dtype=torch.int64)))
    width = left[0].shape[1]
    assert torch.equal(best.join(left, padded)[1][:, :width], left[1])
    assert torch.equal(best.join(padded, left)[1][:, :width], left[1])
