"""Simulated ranks: what can be reckoned by hand, and what cannot must still make sense."""

import time
from functools import partial

import pytest

from longctx.plan.clusters import LinkConfig
from longctx.plan.events import STEADY, Jitter, Program, simulate
from longctx.plan.programs import Crew, Sharded, Work, gather, local, ring, scan, serial, step

ALPHA, BETA, SIZE = 1e-5, 2e10, 1e6
HOP = ALPHA + SIZE / BETA
LINKS = {"node": LinkConfig(ALPHA, BETA), "fabric": LinkConfig(ALPHA, BETA / 4)}
ONLY_SENDS = Work(0, 0, 0, size=SIZE)


def crew(ranks: int) -> Crew:
    """All in one node."""
    return Crew(tuple(range(ranks)), ranks)


def run(scheme, ranks, work, jitter=STEADY, layers=1):
    """A forward and a backward pass of so many layers."""
    program = Program()
    step(program, crew(ranks), [(work, work)] * layers, scheme)
    return simulate(program, LINKS, jitter)


def once(scheme, ranks, work):
    """Seconds of one pass of one layer."""
    program = Program()
    scheme(program, crew(ranks), work)
    return simulate(program, LINKS).seconds


@pytest.mark.parametrize("ranks", [1, 2, 5, 64])
def test_a_serial_chain_takes_a_hop_and_its_work_for_each_rank(ranks):
    assert once(serial, ranks, ONLY_SENDS) == pytest.approx((ranks - 1) * HOP)
    work = Work(2e-3, 1e-3, 5e-4, rest=4e-3, size=SIZE)
    assert once(serial, ranks, work) == pytest.approx(7e-3 + ranks * 5e-4 + (ranks - 1) * HOP)


@pytest.mark.parametrize("blocks", [1, 4, 16])
@pytest.mark.parametrize("ranks", [2, 3, 64])
def test_a_chain_of_blocks_is_pipelined(ranks, blocks):
    block = ALPHA + SIZE / blocks / BETA
    expected = (ranks - 2 + blocks) * block
    assert once(partial(scan, blocks=blocks), ranks, ONLY_SENDS) == pytest.approx(expected)


def test_a_chain_is_hidden_while_there_is_work_beside_it():
    chain = (8 - 2 + 4) * (ALPHA + SIZE / 4 / BETA)
    scheme = partial(scan, blocks=4)
    for beside in (chain / 3, chain * 3):
        work = Work(1e-3, beside, 2e-3, size=SIZE)
        assert once(scheme, 8, work) == pytest.approx(3e-3 + max(chain, beside))


def test_a_gather_waits_for_the_slowest_and_is_hidden_or_not():
    time_of_gather = 7 * (ALPHA + SIZE / BETA)
    work = Work(1e-3, 2e-4, 1e-3, size=SIZE)
    assert once(gather, 8, work) == pytest.approx(2e-3 + max(2e-4, time_of_gather))
    before = partial(gather, overlapped=False)
    assert once(before, 8, work) == pytest.approx(2.2e-3 + time_of_gather)
    program = Program()
    gather(program, crew(8), work)
    slow = simulate(program, LINKS, Jitter(slow={3: 5.0})).seconds
    assert slow == pytest.approx(5e-3 + max(5 * 2e-4, time_of_gather) + 5e-3)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_ring_takes_the_longer_of_work_and_transfers(ranks):
    long, short = Work(0, ranks * 3 * HOP, 0, size=SIZE), Work(0, ranks * HOP / 3, 0, size=SIZE)
    assert once(ring, ranks, long) == pytest.approx(ranks * 3 * HOP)
    assert once(ring, ranks, short) == pytest.approx((ranks - 1) * HOP + HOP / 3)


def test_a_block_of_a_chain_is_sent_on_only_after_it_came():
    program = Program()
    scan(program, Crew((1, 2, 3), 2), ONLY_SENDS, blocks=4)
    fast, slow = ALPHA + SIZE / 4 / BETA, ALPHA + SIZE / BETA
    assert simulate(program, LINKS).seconds == pytest.approx(4 * slow + fast)


def test_a_ring_sends_on_what_came_into_room_for_two_blocks():
    program = Program()
    ring(program, Crew((1, 2, 3), 2), Work(0, 3 * HOP, 0, size=SIZE))
    timeline = simulate(program, LINKS, Jitter(slow={2: 20.0}))

    def spans(stream: tuple[int, str], kind: str) -> list[tuple[float, float]]:
        all_of_them = zip(timeline.operations, timeline.starts, timeline.ends)
        return [(a, b) for op, a, b in all_of_them if stream in op.streams and op.kind == kind]

    came, sent = spans((2, "ring in"), "ring"), spans((2, "ring out"), "ring")
    assert sent[1][0] == came[0][1] > sent[0][1]
    blocks = spans((2, "compute"), "block")
    assert [start for start, _ in came] == pytest.approx([0, blocks[0][1]])


def test_messages_between_nodes_cross_the_fabric_and_collectives_use_every_line():
    program = Program()
    serial(program, Crew((0, 1, 2, 3), 2), ONLY_SENDS)
    slow_hop = ALPHA + 4 * SIZE / BETA
    assert simulate(program, LINKS).seconds == pytest.approx(2 * HOP + slow_hop)
    program = Program()
    gather(program, Crew((0, 1, 2, 3), 2), ONLY_SENDS)
    expected = 3 * (ALPHA + SIZE / 2 / (BETA / 4))
    assert simulate(program, LINKS).seconds == pytest.approx(expected)


def test_ranks_that_only_wait_for_a_neighbour_pay_a_chain_once_for_all_layers():
    work = Work(2e-3, 0, 1e-3, size=SIZE)
    expected = 2 * 10 * 3e-3 + 2 * 7 * (1e-3 + HOP)
    assert run(serial, 8, work, layers=10).seconds == pytest.approx(expected)


def test_gathered_weights_bring_ranks_into_step_in_each_layer():
    work, program = Work(2e-3, 0, 1e-3, size=SIZE), Program()
    step(program, crew(8), [(work, work)] * 10, serial, Sharded(0.0, 0.0))
    free = run(serial, 8, work, layers=10).seconds
    one_after_another = 20 * (3e-3 + 7 * (1e-3 + HOP))
    assert 1.4 * free < simulate(program, LINKS).seconds < one_after_another


def test_weights_of_the_next_layer_come_while_one_computes():
    work, program = Work(1e-3, 0, 0), Program()
    step(program, crew(4), [(work, work)] * 3, local, Sharded(4 * SIZE, 4 * SIZE))
    gathered = 3 * HOP
    assert gathered < 1e-3
    expected = gathered + 6 * 1e-3 + gathered
    assert simulate(program, LINKS).seconds == pytest.approx(expected)


def test_without_exchange_a_slow_rank_is_all_that_matters():
    work = Work(1e-3, 1e-3, 1e-3, rest=1e-3)
    timeline = run(local, 4, work, Jitter(slow={2: 1.5}), layers=2)
    assert timeline.seconds == pytest.approx(4 * 4e-3 * 1.5)
    assert timeline.idle(2) == pytest.approx(0)
    assert timeline.idle(0) == pytest.approx(timeline.seconds / 3)


def test_the_same_seed_gives_the_same_delays():
    work = Work(1e-3, 1e-3, 1e-3, size=SIZE)
    runs = [run(gather, 8, work, Jitter(0.2, 0.2, seed=s)).seconds for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert run(gather, 8, work, Jitter(seed=7)).seconds == run(gather, 8, work).seconds


def test_delays_have_the_mean_that_was_asked_for():
    program = Program()
    for _ in range(20000):
        program.compute(0, "compute", 1.0)
    mean = simulate(program, {}, Jitter(compute=0.5)).seconds / 20000
    assert mean == pytest.approx(1.0, abs=0.02)


def test_ranks_that_wait_for_one_another_feel_jitter_more():
    work = Work(1e-3, 1e-3, 1e-3, size=1.0)
    jitter = Jitter(compute=0.2, seed=3)
    alone, together = (run(s, 32, work, jitter, layers=8).seconds for s in (local, gather))
    assert 48e-3 < alone < together


def test_the_critical_path_has_no_gaps_and_adds_up():
    work = Work(1e-3, 3e-4, 1e-3, size=SIZE)
    timeline = run(partial(scan, blocks=2), 16, work, Jitter(0.1, 0.1, {5: 1.3}), layers=3)
    assert sum(timeline.critical_seconds().values()) == pytest.approx(timeline.seconds)
    path = timeline.critical_path()
    assert timeline.starts[path[0]] == 0
    for before, after in zip(path, path[1:]):
        assert timeline.ends[before] == timeline.starts[after]


def test_nothing_overlaps_on_a_stream():
    work = Work(1e-3, 3e-4, 1e-3, size=SIZE)
    timeline = run(ring, 4, work, Jitter(0.3, 0.3), layers=2)
    last: dict[tuple[int, str], float] = {}
    for operation, start, end in zip(timeline.operations, timeline.starts, timeline.ends):
        for stream in operation.streams:
            assert last.get(stream, 0.0) <= start
            last[stream] = end
        assert all(timeline.ends[i] <= start for i in operation.after)


def test_a_step_of_many_ranks_takes_seconds():
    work = Work(1e-3, 1e-3, 1e-3, size=SIZE)
    begin = time.process_time()
    timeline = run(partial(scan, blocks=8), 256, work, layers=2)
    assert time.process_time() - begin < 5
    chain = (256 - 2 + 8) * (ALPHA + SIZE / 8 / BETA)
    assert timeline.seconds == pytest.approx(12e-3 + 2 * (chain - 1e-3))


def test_nothing_can_wait_for_what_comes_later():
    program = Program()
    with pytest.raises(AssertionError):
        program.compute(0, "compute", 1.0, (0,))


def test_an_empty_program_takes_no_time():
    timeline = simulate(Program(), {})
    assert timeline.seconds == 0
    assert timeline.critical_path() == []
