"""Seconds of exchanges, reckoned by hand from latency and bandwidth."""

from dataclasses import replace
from functools import partial

import pytest

from longctx.plan.clusters import LinkConfig
from longctx.plan.exchange_time import Group, chained, gathered, group_of, passed, reduced, traded
from longctx.plan.waiting import Stream
from longctx.sequence.ledger import Traffic
from tests.plan.test_costs import CLUSTER

NODE, FABRIC = LinkConfig(1.0, 100.0), LinkConfig(10.0, 10.0)
group = partial(Group, node=NODE, fabric=FABRIC)


@pytest.mark.parametrize(
    ("size", "stride", "nodes"),
    [(1, 1, 1), (4, 1, 1), (8, 1, 2), (64, 1, 16), (4, 4, 4), (2, 2, 1), (4, 2, 2), (3, 1, 2)],
)
def test_a_group_spans_as_many_nodes_as_its_processes_sit_in(size, stride, nodes):
    found = group_of(CLUSTER, 64, size, stride)
    assert (found.size, found.nodes) == (size, nodes)
    assert group_of(replace(CLUSTER, processes_per_node=64), 64, size, stride).nodes == 1


def test_a_gather_takes_a_step_for_each_other_member_and_enters_each_node_once():
    assert gathered(group(1, 1), Traffic(5, 0)) == 0
    assert gathered(group(4, 1), Traffic(2, 300)) == 2 * 3 * 1 + 300 / 100
    # two nodes of two: two steps inside, one between; 200 of 300 bytes from outside by two ports
    assert gathered(group(4, 2), Traffic(1, 300)) == 2 * 1 + 10 + max(300 / 100, 200 / 2 / 10)
    assert gathered(group(2, 2), Traffic(1, 300)) == 10 + 300 / 10


def test_a_sum_goes_up_and_down_a_tree():
    assert reduced(group(8, 1), Traffic(3, 50)) == 3 * 2 * 3 * 1 + 50 / 100
    assert reduced(group(8, 2), Traffic(1, 70)) == 2 * 2 * 1 + 2 * 10 + max(0.7, 40 / 4 / 10)


def test_a_trade_is_with_all_at_once():
    assert traded(group(4, 1), Traffic(4, 300)) == 4 * 1 + 300 / 100
    assert traded(group(4, 2), Traffic(4, 300)) == 4 * 10 + max(100 / 100, 200 / 10)
    assert passed(group(4, 2), Traffic(4, 300)) == 4 * 10 + 300 / 10
    assert passed(group(1, 1), Traffic(4, 0)) == traded(group(1, 1), Traffic(4, 0)) == 0


def test_a_chain_takes_all_hops_and_the_other_blocks_behind_the_first():
    # P - 2 + K steps of a K-th of 80 bytes
    assert chained(group(4, 1), (3, 0), 1, 80, 2) == (4 - 2 + 2) * (1 + 40 / 100)
    assert chained(group(4, 1), (3, 0), 1, 80, 1) == 3 * (1 + 80 / 100)
    # three chains of 80 bytes, one after another
    assert chained(group(4, 1), (3, 0), 3, 240, 2) == pytest.approx(3 * 4 * (1 + 40 / 100))
    assert chained(group(4, 2), (2, 1), 1, 80, 2) == 2 * 1.4 + 14 + 14
    assert chained(group(1, 1), (0, 0), 1, 0, 4) == 0


def test_a_ring_hides_each_hop_beside_a_block():
    # 3 hops of 4 s beside blocks of 5 s: own keys are a quarter of the core
    assert Stream(12, 12, 0, (20, 40), 0.25).ring(3) == (0, 0)
    assert Stream(18, 0, 0, (20, 40), 0.25).ring(3) == (3 * (6 - 5), 0)
    # backward a hop brings 6 s of keys, and takes 12 s of gradients home, beside blocks of 10 s
    ahead, back = Stream(0, 18, 36, (20, 40), 0.25).ring(3)
    assert (ahead, back) == (0, (6 - 5) + 2 * (6 + 12 - 10) + (12 - 5))


def test_gathered_keys_are_hidden_beside_own_keys_or_another_chunk():
    assert Stream(12, 0, 0, (20, 40), 0.25).gather(1) == (12 - 5, 0)
    # four chunks: 3 s beside own keys (1.25 s), then beside a chunk of 5 s
    assert Stream(12, 0, 0, (20, 40), 0.25).gather(4) == (3 - 1.25, 0)
    assert Stream(40, 0, 0, (20, 40), 0.25).gather(4) == ((10 - 1.25) + 3 * (10 - 5), 0)
    assert Stream(0, 12, 24, (20, 40), 0.25).gather(1) == (0, (12 - 5) + (24 - 5))
