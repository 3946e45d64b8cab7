"""Needs TRITON_INTERPRET=1 before Python starts."""

import pytest
import torch
from longctx_kernels import selected_blocks_triton
from longctx_kernels.launch import is_interpreted
from longctx_kernels.selected_blocks import selected_block_attention

from tests.kernels.test_selected_blocks import CASES, check, problem, seen_alone

assert is_interpreted(), "kernels are interpreted only if TRITON_INTERPRET=1 is set"


@CASES
def test_kernels_equal_the_definition(N, J, group, block_size, sizes):
    check(problem(N, J, group, block_size, sizes, torch.float32), "fp32", backend="triton")


@pytest.mark.parametrize("block_size", [16, 128])
def test_half_precision(block_size):
    check(problem(7, 2, 3, block_size, (20, 28), torch.float16), "fp16", backend="triton")


@pytest.mark.parametrize("block_size", [16, 128])
def test_what_many_list_is_summed_in_parts(block_size, monkeypatch):
    monkeypatch.setattr(selected_blocks_triton, "SMALLEST_CHUNK", 4)
    check(problem(23, 2, 3, block_size, (16, 16), torch.float32), "fp32", backend="triton")


def test_a_query_gets_the_same_bits_whatever_others_hold_list_and_see():
    alone = seen_alone(problem(9, 1, 2, 16, (16, 16), torch.float32), "triton")
    assert all(map(torch.equal, *alone))


def test_infinite_gradients_of_queries_that_see_nothing_go_nowhere():
    operands, (blocks, size), where = problem(3, 1, 2, 16, (16, 16), torch.float32)
    where["query_positions_N"] = where["query_positions_N"] - 1000
    out, lse = selected_block_attention(*operands, blocks, size, **where, backend="triton")
    assert not out.any()
    assert (lse == -torch.inf).all()
    cotangents = torch.ones_like(out), torch.full_like(lse, torch.inf)
    assert not any(g.any() for g in torch.autograd.grad((out, lse), operands, cotangents))


def test_blocks_that_no_kernel_has_are_left_to_torch():
    made = problem(3, 1, 2, 7, (16, 16), torch.float32)
    check(made, "fp32")
    with pytest.raises(ValueError, match="needs block_size 16, 32, 64, 128"):
        check(made, "fp32", backend="triton")
