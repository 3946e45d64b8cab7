import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from longctx_kernels.top_lifetime import top_deaths, top_deaths_reference


def drawn(seed: int, lanes: int, items: int, levels: int) -> torch.Tensor:
    """Scores of `levels` values (0: all different), every seventh or so -inf."""
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(lanes, items, generator=generator, dtype=torch.float64)
    if levels:
        score = torch.randint(0, levels, (lanes, items), generator=generator).double()
    return score.masked_fill(torch.rand(lanes, items, generator=generator) < 0.15, -torch.inf)


def starts_of(cuts: set[int], items: int) -> torch.Tensor:
    edges = [0, *sorted(c for c in cuts if 0 < c < items), items]
    return torch.tensor(
        [start for start, stop in zip(edges, edges[1:]) for _ in range(start, stop)],
        dtype=torch.int64,
    )


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    lanes=st.integers(1, 6),
    items=st.integers(1, 70),
    levels=st.sampled_from((0, 1, 2, 5)),
    cuts=st.sets(st.integers(1, 69), max_size=4),
    count=st.integers(1, 80),
    later_wins=st.booleans(),
)
def test_deaths_equal_those_of_a_heap(seed, lanes, items, levels, cuts, count, later_wins):
    score, starts = drawn(seed, lanes, items, levels), starts_of(cuts, items)
    found = top_deaths(score, starts, count, later_wins)
    assert torch.equal(found, top_deaths_reference(score, starts, count, later_wins))


@pytest.mark.parametrize("later_wins", [False, True])
@pytest.mark.parametrize("count", [1, 3, 40])
def test_many_items_of_lanes_with_groups_of_their_own(count, later_wins):
    starts = torch.stack([starts_of(cuts, 777) for cuts in ({1, 2, 300}, set(), {776})])
    for levels in (0, 3):
        score = drawn(count, 3, 777, levels)
        found = top_deaths(score, starts, count, later_wins)
        assert torch.equal(found, top_deaths_reference(score, starts, count, later_wins))


def test_deaths_of_a_small_case():
    score = torch.tensor([[1.0, 3.0, 2.0, 2.0, -torch.inf, 9.0, 0.0]])
    starts = torch.tensor([0, 0, 0, 0, 0, 5, 5])
    assert top_deaths(score, starts, 2).tolist() == [[2, 7, 7, 3, 4, 7, 7]]
    assert top_deaths(score, starts, 2, later_wins=True).tolist() == [[2, 7, 3, 7, 4, 7, 7]]
    assert top_deaths(score[:, :0], starts[:0], 2).shape == (1, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kept_items_are_the_best_so_far_and_carry_no_gradient(dtype):
    score = drawn(5, 2, 50, 0).to(dtype).requires_grad_()
    death = top_deaths(score, starts_of(set(), 50), 6)
    assert not death.requires_grad
    for t in range(50):
        past = score.detach()[:, : t + 1].float()
        best = past.sort(dim=1, descending=True, stable=True).indices[:, :6]
        kept = torch.zeros_like(past, dtype=torch.bool).scatter_(1, best, True)
        assert torch.equal(death[:, : t + 1] > t, kept & past.isfinite())


def test_later_items_do_not_change_earlier_deaths():
    score, starts = drawn(8, 4, 60, 0), starts_of({20}, 60)
    other = torch.cat((score[:, :40], drawn(9, 4, 20, 0)), 1)
    for later_wins in (False, True):
        a, b = (top_deaths(x, starts, 9, later_wins)[:, :40] for x in (score, other))
        assert torch.equal(a.clamp(max=40), b.clamp(max=40))
        assert not torch.equal(a, b)


@pytest.mark.parametrize(
    ("shape", "starts", "count", "message"),
    [
        ((4,), (4,), 1, "score must be"),
        ((2, 4), (3,), 1, "starts must be"),
        ((2, 4), (4,), 0, "count 0"),
    ],
)
def test_wrong_calls_are_refused(shape, starts, count, message):
    with pytest.raises(ValueError, match=message):
        top_deaths(torch.zeros(shape), torch.zeros(starts, dtype=torch.int64), count)
