"""Policies show what their definitions say, and a rank fetches just what its queries see."""

import pytest
import torch

from longctx.sequence.expected import WIDTHS, Share, Sizes
from longctx.sequence.fetch import Routes
from longctx.sequence.patterned import patterned_traffic
from longctx.sequence.placement import place
from longctx.sequence.plan import Plan
from longctx.sequence.policy import (
    BlockPattern,
    Fixed,
    Full,
    Lifetime,
    Neighbourhood,
    Power,
    Sharded,
    Strided,
    Window,
)
from longctx.sequence.sharded import Transports

LENGTH = 70


def power_of_two(distance: int) -> bool:
    return distance > 0 and distance & (distance - 1) == 0


DEFINITIONS = {
    Full(): lambda h, i, j: True,
    Window(9): lambda h, i, j: i - j < 9,
    Window(9, sinks=3): lambda h, i, j: i - j < 9 or j < 3,
    Neighbourhood(11, 4): lambda h, i, j: j > i // 4 * 4 + 3 - 11,
    Fixed(8, 2): lambda h, i, j: i // 8 == j // 8 or j % 8 >= 6,
    Fixed(8, 2, verticals=3, heads=4): lambda h, i, j: (
        i // 8 == j // 8 or 6 - 2 * (h % 3) <= j % 8 < 8 - 2 * (h % 3)
    ),
    Sharded(4, 2, 3, heads=3): lambda h, i, j: i // 4 - j // 4 < 2 or (j // 4 + h) % 3 == 0,
    Sharded(4, 1, 4, heads=3, dense_heads=1): lambda h, i, j: (
        h == 0 or i // 4 == j // 4 or (j // 4 + 2 * (h - 1)) % 4 == 0
    ),
    Power(4, 2, sinks=1): lambda h, i, j: (
        i // 4 - j // 4 < 2 or power_of_two(i // 4 - j // 4) or j < 4
    ),
    Strided(1, 5, 6): lambda h, i, j: i - j < 5 or (i - j) % 6 == 0,
    Strided(4, 2, 3): lambda h, i, j: i // 4 - j // 4 < 2 or (i // 4 - j // 4) % 3 == 0,
}
policies = pytest.mark.parametrize("policy", DEFINITIONS, ids=str)


def mask(policy) -> torch.Tensor:
    """`[patterns, queries, keys]` by definition."""
    shows = DEFINITIONS[policy]
    tokens = range(LENGTH)
    return torch.tensor(
        [
            [[j <= i and shows(h, i, j) for j in tokens] for i in tokens]
            for h in range(policy.patterns)
        ]
    )


@policies
def test_a_policy_shows_what_its_definition_says(policy):
    tokens, expected = torch.arange(LENGTH), mask(policy)
    assert torch.equal(policy.sees(tokens[:, None], tokens), expected)
    assert torch.equal(policy.counts(LENGTH), expected.sum(-1))
    assert expected.diagonal(dim1=1, dim2=2).all()


@policies
def test_wanted_are_the_keys_that_some_query_sees(policy):
    expected = mask(policy)
    for start, stop in ((0, 5), (13, 14), (32, 47), (48, 64), (63, LENGTH)):
        wanted = policy.wanted(start, stop)
        assert torch.equal(wanted, expected[:, start:stop, :start].any(1)), (start, stop)


@pytest.mark.parametrize("policy", [p for p in DEFINITIONS if isinstance(p, Lifetime)], ids=str)
def test_keys_are_counted_that_later_queries_see(policy):
    expected = mask(policy)
    for start, stop in ((0, 5), (2, 3), (13, 29), (40, 40)):
        for later in ([], [stop, stop + 1], [stop + 3, stop + 9, LENGTH - 1]):
            found = policy.outliving(start, stop, torch.tensor(later, dtype=torch.int64))
            assert found == expected[:, later, start:stop].sum(), (start, stop, later)


@policies
def test_keys_with_lifetimes_never_come_back(policy):
    """What lets a cache forget them; patterns of blocks make no such promise."""
    seen = mask(policy)
    births = torch.eye(LENGTH, dtype=torch.bool)
    returns = (seen[:, 1:] & ~seen[:, :-1] & ~births[1:]).any()
    assert not (isinstance(policy, Lifetime) and returns)
    assert not (isinstance(policy, BlockPattern) and policy.block > 1 and not returns)


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_power_attention_fetches_a_whole_shard_for_each_power_of_two(ranks):
    block, blocks = 4, 4
    shard = block * blocks
    placement = place("contiguous", ranks, ranks * shard)
    for rank in range(ranks):
        plan = Plan(placement, rank, ((0,),))
        arriving = plan.once(Routes, Power(block, window=blocks)).arriving
        distances = sorted(rank - owner for owner in arriving)
        assert distances == [2**m for m in range(ranks) if 2**m <= rank]
        assert all(len(items) == shard for items in arriving.values())
    assert len(arriving) == (ranks - 1).bit_length()
    share = Share(ranks - 1, placement, 3, Transports(), WIDTHS["bf16"])
    sizes = Sizes(8, 2, 5, 7)
    traffic = patterned_traffic(share, sizes, Power(block, window=blocks))
    chunk = 3 * shard * sizes.key_heads * (sizes.key_dim + sizes.value_dim) * 2
    assert traffic["fetch", False].received == len(arriving) * chunk


def test_s2_fetches_the_columns_of_each_head_and_the_blocks_just_before():
    block, local, stride, ranks, shard = 4, 2, 4, 4, 32
    policy = Sharded(block, local, stride, heads=4)
    placement = place("contiguous", ranks, ranks * shard)
    for rank in range(ranks):
        share = Share(rank, placement, 1, Transports(), WIDTHS["fp32"])
        traffic = patterned_traffic(share, Sizes(4, 4, 3, 3), policy).get(("fetch", False))
        # Of earlier tokens a head has one block in `stride`; the block before is its in one head.
        columns = rank * shard // stride * policy.heads
        halo = block * (local - 1) * (policy.heads - 1) if rank else 0
        assert (traffic.received if traffic else 0) == (columns + halo) * 6 * 4


def test_a_window_fetches_its_keys_once_though_two_segments_want_them():
    """Segments of a zigzag that lie next to each other, or near, share their neighbours."""
    placement = place("zigzag", 2, 16)
    plan = Plan(placement, 1, ((0,),))
    assert plan.segments == ((4, 8), (8, 12))
    arriving = plan.once(Routes, Window(7)).arriving
    assert {rank: items.tolist() for rank, items in arriving.items()} == {0: [0, 1, 2, 3]}
