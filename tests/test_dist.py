"""The launcher of real ranks returns what they return, and says what went wrong with which."""

import time

import pytest
import torch
import torch.distributed as dist

from tests.dist import run_gloo

pytestmark = pytest.mark.alone


def add_up(rank: int, start: float) -> float:
    x = torch.tensor(start + rank)
    dist.all_reduce(x)
    return x.item()


def fail_on_the_last_rank(rank: int) -> None:
    if rank == 2:
        raise ValueError("the reason")
    dist.barrier()


def hang_on_the_first_rank(rank: int) -> None:
    if rank == 0:
        time.sleep(600)
    dist.barrier()


def test_results_come_in_order_of_ranks():
    assert run_gloo(3, add_up, 0.5) == [4.5] * 3
    assert run_gloo(2, lambda rank: rank) == [0, 1]


def test_the_traceback_of_a_rank_reaches_the_test():
    with pytest.raises(AssertionError, match=r"(?s)rank 2: .*ValueError: the reason"):
        run_gloo(3, fail_on_the_last_rank)


def test_ranks_that_hang_say_where_they_hang():
    with pytest.raises(AssertionError, match=r"(?s)rank 0: .*in hang_on_the_first_rank"):
        run_gloo(2, hang_on_the_first_rank, timeout=1)
