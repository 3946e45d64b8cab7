"""Every verb, transport and mixer on real gloo ranks: the simulator's numbers, one process's too.

All jobs of a number of ranks share one forked group. A counter beside our ledger watches what
torch.distributed is asked for.
"""

import functools
from dataclasses import replace

import pytest
import torch

from longctx.sequence.ledger import Ledger, Traffic
from tests.dist import Outcome, fork_ranks
from tests.sequence.c10d_counter import C10dCounter
from tests.sequence.cases import Result, Setting, errors, expected_of, run_shard, run_simulated
from tests.sequence.gloo_jobs import (
    Job,
    jobs_of,
    mixer_jobs,
    scattered_jobs,
    single_precision_jobs,
    verb_jobs,
)
from tests.sequence.links import gloo_links
from tests.tolerances import LARGEST_ERROR, error_of

pytestmark = pytest.mark.alone

WORLDS = (2, 3, 4)
SAME_SUMS = 1e-12
"""Gloo adds up in another order than the simulator."""
FLOOR = 2e-6
"""Of errors in fp32: a few roundings."""
SECONDS = 300


def seat(rank: int, job: Job) -> tuple[int, Setting]:
    """This rank's number in its sequence, and its batch."""
    for number, ranks in enumerate(job.sequences):
        if rank in ranks:
            return ranks.index(rank), job.setting.with_seed(number)
    return rank, job.setting


def do_all(rank: int, jobs: list[Job]) -> list[Result]:
    results = []
    for job in jobs:
        with C10dCounter() as counter:
            links = gloo_links(job.setting.transports.heads, Ledger(), job.sequences)
            number, setting = seat(rank, job)
            results.append(run_shard(job.case, setting, number, links))
        results[-1].counted = counter.total()
    return results


@functools.cache
def outcomes_of(world: int) -> list[Outcome]:
    return fork_ranks(world, do_all, [jobs_of(world)], timeout=SECONDS)


def results_of(world: int, job: Job) -> list[Result]:
    """What the ranks found, in order."""
    outcomes = outcomes_of(world)
    assert not any(o.error for o in outcomes), [o.error for o in outcomes]
    place = jobs_of(world).index(job)
    return [outcome.value[place] for outcome in outcomes]


EXACT_JOBS = [(world, job) for world in WORLDS for job in verb_jobs(world) + mixer_jobs(world)]


def name_of(value: object) -> str:
    return str(value)


@pytest.mark.parametrize(("world", "job"), EXACT_JOBS, ids=name_of)
def test_real_ranks_equal_one_process_and_the_simulator(world: int, job: Job):
    results = results_of(world, job)
    found = errors(results, expected_of(job.case, job.reference))
    assert max(found.values()) <= LARGEST_ERROR["fp64"], found
    for real, simulated in zip(results, run_simulated(job.case, job.setting)):
        assert real.traffic == simulated.traffic
        for name, value in (simulated.per_token | simulated.shared).items():
            error = error_of((real.per_token | real.shared)[name], value, "fp64")
            assert error <= SAME_SUMS, f"{name}: {error:.1e}"


@pytest.mark.parametrize("world", WORLDS)
def test_the_ledger_equals_an_independent_count(world: int):
    silent = set()
    for job in jobs_of(world):
        for result in results_of(world, job):
            calls = sum(t.calls for t in result.traffic.values())
            received = sum(t.received for t in result.traffic.values())
            assert result.counted == Traffic(calls, received), job
            if not calls:
                silent.add(job.case.name)
    assert silent == {"softmax-window-1"}


@pytest.mark.parametrize("job", scattered_jobs(), ids=name_of)
def test_groups_that_are_neither_the_world_nor_neighbours(job: Job):
    results = results_of(4, job)
    for number, ranks in enumerate(job.sequences):
        expected = expected_of(job.case, job.reference.with_seed(number))
        found = errors([results[rank] for rank in ranks], expected)
        assert max(found.values()) <= LARGEST_ERROR["fp64"], found


SINGLE = [(world, job) for world in WORLDS for job in single_precision_jobs(world)]


@pytest.mark.parametrize(("world", "job"), SINGLE, ids=name_of)
def test_single_precision_errs_no_more_than_one_process(world: int, job: Job):
    exact = expected_of(job.case, job.reference)
    alone = errors([whole_as_result(job)], exact)
    for name, error in errors(results_of(world, job), exact).items():
        assert error <= 2 * alone[name] + FLOOR, f"{name}: {error:.1e}, alone {alone[name]:.1e}"


def whole_as_result(job: Job) -> Result:
    single = replace(job.reference, dtype=torch.float32)
    return Result(torch.arange(single.length), *expected_of(job.case, single))
