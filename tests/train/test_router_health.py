"""How evenly routers spread tokens, in numbers."""

import math

import pytest

from longctx.train.router_health import MOST_ROUTERS, MOST_SHARES, health_table, router_health

EVEN = [0.5, 0.5, 0.5, 0.5]


def test_each_list_of_shares_has_extremes_and_evenness():
    figures = {"update_norm": 1.0, "router/3/load": [0.5, 0.25, 0.25], "router/3/entropy": 0.7}
    health = router_health(figures)
    assert figures.items() <= health.items()
    assert (health["router/3/load_min"], health["router/3/load_max"]) == (0.25, 0.5)
    entropy = 0.5 * math.log(2) + 0.5 * math.log(4)
    assert health["router/3/load_evenness"] == pytest.approx(entropy / math.log(3), abs=1e-12)
    assert len(health) == 6


@pytest.mark.parametrize(
    ("shares", "evenness"),
    [(EVEN, 1.0), ([0.0, 2.0], 0.0), ([0.0, 0.0], None), ([0.3], 1.0), ([math.nan, 1.0], None)],
)
def test_evenness_is_1_for_equal_shares_and_0_for_a_collapsed_router(shares, evenness):
    assert router_health({"router/0/gate": shares})["router/0/gate_evenness"] == pytest.approx(
        evenness
    )


def test_long_lists_are_cut_after_their_health_is_known():
    shares = [1.0] * MOST_SHARES + [5.0]
    health = router_health({"router/0/near/load": shares, "router/0/near/distance": shares})
    assert len(health["router/0/near/load"]) == len(health["router/0/near/distance"]) == MOST_SHARES
    assert health["router/0/near/load_max"] == 5.0
    assert "router/0/near/distance_max" not in health


def test_the_table_has_a_line_for_each_list_of_shares():
    row = {"step": 4, "loss": 1.0, "router/0/near/drop_rate": 0.1, "router/9/entropy": 0.5}
    row |= router_health({"router/0/near/load": EVEN, "router/9/share_kept": [0.1, 0.3]})
    head, near, last = health_table(row)
    assert head == ["router", "shares", "min", "max", "evenness", "entropy", "drop_rate"]
    assert near == ["0/near", "load", 0.5, 0.5, 1.0, None, 0.1]
    assert last[:4] == ["9", "share_kept", 0.1, 0.3]
    assert last[5:] == [0.5, None]
    many = {f"router/{layer}/load": EVEN for layer in range(2 * MOST_ROUTERS)}
    assert len(health_table(router_health(many))) == 1 + MOST_ROUTERS
