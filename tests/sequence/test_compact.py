"""Which tokens lanes take, how they lie in slots, and that no split changes either."""

import random

import pytest
import torch

from longctx.sequence.compact import DISTANCES, attend_selected, distances, select
from longctx.sequence.ledger import Ledger
from longctx.sequence.local import LocalView
from longctx.sequence.placement import place
from longctx.sequence.plan import Plan
from longctx.sequence.selection_rules import Best, FirstCome
from longctx.sequence.sharded import ShardedView, Transports
from longctx.sequence.simulator import run_ranks
from tests.sequence.links import simulated_links

LENGTH, LANES = 45, 3
DOCUMENTS = ((0,), (0, 1, 9, 22, 23), (0, 40))
PLAN = Plan(place("contiguous", 1, LENGTH), 0, DOCUMENTS)
SPLITS = [("contiguous", 2), ("contiguous", 4), ("zigzag", 3), ("zigzag", 4)]
splits = pytest.mark.parametrize(("placement", "ranks"), SPLITS)


def drawn(*values: float) -> torch.Tensor:
    """One of these for each token and lane."""
    chance = random.Random(5)
    shape = (len(DOCUMENTS), LENGTH, LANES)
    count = torch.Size(shape).numel()
    return torch.tensor([chance.choice(values) for _ in range(count)]).view(shape)


def on_ranks(placement: str, ranks: int, work):
    """(local view, what `work(view)` gives) on every rank."""
    where = place(placement, ranks, LENGTH)

    def run(rank, hub):
        links = simulated_links(hub, rank, ranks, 1, Ledger())
        view = ShardedView(Plan(where, rank, DOCUMENTS), links, Transports())
        return view.token_ids_BT[0], work(view)

    return run_ranks(ranks, run)


def documents():
    """(row, tokens) of each."""
    for row, starts in enumerate(DOCUMENTS):
        for start, stop in zip(starts, (*starts[1:], LENGTH), strict=True):
            yield row, slice(start, stop)


def best_by_hand(score_BTL: torch.Tensor, sparsity: int) -> torch.Tensor:
    taken = torch.zeros_like(score_BTL, dtype=torch.bool)
    for row, tokens in documents():
        for lane in range(LANES):
            scores = score_BTL[row, tokens, lane].tolist()
            order = sorted(range(len(scores)), key=lambda t: (-scores[t], t))
            for t in order[: max(2, len(scores) // sparsity)]:
                taken[row, tokens.start + t, lane] = True
    return taken


def first_by_hand(wish_BTL: torch.Tensor, group: int, most: int) -> torch.Tensor:
    taken = torch.zeros_like(wish_BTL)
    for row, tokens in documents():
        for lane in range(LANES):
            found = 0
            for t in range(tokens.stop - tokens.start):
                found = 0 if t % group == 0 else found
                wants = bool(wish_BTL[row, tokens.start + t, lane])
                taken[row, tokens.start + t, lane] = wants and found < most
                found += wants
    return taken


RULES = {
    "best": (Best(3), drawn(0.0, 0.5, 1.0), lambda x: best_by_hand(x, 3)),
    "best-all-equal": (Best(4), drawn(1.0), lambda x: best_by_hand(x, 4)),
    "first": (FirstCome(8, 3), drawn(0, 1, 1).bool(), lambda x: first_by_hand(x, 8, 3)),
    "first-of-31": (
        FirstCome(31, 9),
        drawn(0, 1).bool(),
        lambda x: first_by_hand(x, 31, 9),
    ),
    "first-of-one": (FirstCome(1, 1), drawn(0, 1).bool(), lambda x: first_by_hand(x, 1, 1)),
}
rules = pytest.mark.parametrize(("rule", "wish", "by_hand"), RULES.values(), ids=RULES)


@rules
def test_one_process_takes_what_the_rule_says(rule, wish, by_hand):
    taken = by_hand(wish)
    assert torch.equal(rule.taken(LocalView(DOCUMENTS, LENGTH), wish), taken)
    assert 0.1 < taken.float().mean() < 0.9


@rules
@splits
def test_ranks_take_the_same_tokens_ties_included(rule, wish, by_hand, placement, ranks):
    taken = by_hand(wish)
    for ids_T, own in on_ranks(
        placement, ranks, lambda view: rule.taken(view, wish[:, view.token_ids_BT[0]])
    ):
        assert torch.equal(own, taken[:, ids_T])


@rules
def test_slots_suffice_and_hold_what_is_taken_in_order(rule, wish, by_hand):
    selection = select(LocalView(DOCUMENTS, LENGTH), wish, rule)
    taken_LM = by_hand(wish).flatten(0, 1).T
    for index_E, taken_M in zip(selection.index_LE, taken_LM, strict=True):
        tokens = taken_M.nonzero()[:, 0]
        assert torch.equal(index_E[: len(tokens)], tokens)
        assert (index_E[len(tokens) :] == -1).all()
    lengths = [tokens.stop - tokens.start for _, tokens in documents()]
    assert selection.counts == (sum(int(rule.up_to(torch.tensor(n))) for n in lengths),)


@splits
def test_distances_do_not_depend_on_the_split(placement, ranks):
    wish, expected = drawn(0, 0, 1).bool(), torch.zeros(DISTANCES, dtype=torch.int64)
    for row, tokens in documents():
        for lane in range(LANES):
            gaps = wish[row, tokens, lane].nonzero()[:, 0].diff()
            expected += gaps.double().log2().long().bincount(minlength=DISTANCES)
    rule = FirstCome(1, 1)
    parts = on_ranks(
        placement,
        ranks,
        lambda view: distances(select(view, wish[:, view.token_ids_BT[0]], rule)),
    )
    assert torch.equal(sum(own for _, own in parts), expected)
    assert (expected[:3] > 0).all()


def test_a_lane_that_takes_nothing_gives_zeros_and_finite_gradients():
    view = LocalView(DOCUMENTS, LENGTH)
    wish = drawn(0, 1).bool()
    wish[..., 1] = False
    selection = select(view, wish, FirstCome(8, 3))
    q = torch.randn(*selection.index_LE.shape, 4, dtype=torch.float64, requires_grad=True)
    out_LEV = attend_selected(view, (q, q, q), selection)
    out_LEV.square().sum().backward()
    assert (out_LEV[1] == 0).all()
    assert (out_LEV[0] != 0).any()
    assert q.grad.isfinite().all()
    assert (q.grad[1] == 0).all()


def test_places_that_int32_cannot_hold_are_refused():
    length, lanes = 2**20, 2048
    view = LocalView.whole(1, length)
    wish = torch.zeros(1, 1, 1, dtype=torch.bool).expand(1, length, 1)
    selection = select(view, wish, FirstCome(length, 1))
    wide = selection._replace(
        **{
            name: getattr(selection, name).expand(lanes, -1)
            for name in ("index_LE", "place_LE", "order_LU", "key_place_LU", "expiry_LU")
        }
    )
    q = torch.zeros(lanes, 1, 1)
    with pytest.raises(ValueError, match="use fewer rows"):
        attend_selected(view, (q, q, q), wide)
