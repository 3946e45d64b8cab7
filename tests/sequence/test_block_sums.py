"""Sums over blocks of documents are the same, and known to every rank, however they are split."""

import itertools

import pytest
import torch
from torch import Tensor

from longctx.sequence.block_sums import (
    MEANS,
    Blocks,
    block_pieces,
    block_sums,
    block_sums_traffic,
    joined_pieces,
)
from longctx.sequence.expected import WIDTHS, Share
from longctx.sequence.ledger import Ledger
from longctx.sequence.placement import place
from longctx.sequence.plan import Plan
from longctx.sequence.sharded import ShardedView, Transports
from longctx.sequence.simulator import run_ranks
from longctx.sequence.view import SequenceView
from tests.sequence.links import simulated_links
from tests.tolerances import assert_close

LENGTH, HEADS, SIZE = 37, 2, 3
DOCUMENTS = ((0, 9, 10, 30), (0, 25), (0,))
SHORT = (tuple(range(LENGTH)),) * 2
SPLITS = tuple(itertools.product((1, 2, 3, 4), ("contiguous", "zigzag")))


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def whole_blocks(documents, block: int, stride: int) -> list[tuple[int, int]]:
    """(row, first token) of all whole blocks, in order."""
    return [
        (row, first)
        for row, starts in enumerate(documents)
        for start, stop in itertools.pairwise((*starts, LENGTH))
        for first in range(start, stop - block + 1, stride)
    ]


def weighted(view: SequenceView, x_BTJD: Tensor, block: int, stride: int) -> Tensor:
    """Sums of tokens times a weight for each place in a block."""
    pieces_NLJD = block_pieces(view, x_BTJD, block, stride)
    weight_L = torch.arange(1, block + 1).to(x_BTJD)[:, None, None]
    return joined_pieces(view, (pieces_NLJD * weight_L).sum(1), block, stride).sum(1)


def evaluate(view: SequenceView, x_BTJD: Tensor, block: int, stride: int, weight_UJD: Tensor):
    """Sums, and the gradient of a weighted sum of them."""
    x_BTJD = x_BTJD.clone().requires_grad_()
    sums = weighted(view, x_BTJD, block, stride)
    if stride == block:
        sums = sums + block_sums(view, x_BTJD, block)
    return sums, torch.autograd.grad((sums * weight_UJD).sum(), x_BTJD)[0]


@pytest.mark.parametrize(("block", "stride"), [(4, 4), (6, 2), (1, 1), (20, 20), (16, 8)])
def test_sums_and_their_gradients_do_not_depend_on_the_split(block, stride):
    x_BGJD = normal(0, len(DOCUMENTS), LENGTH, HEADS, SIZE).requires_grad_()
    place_L = torch.arange(1, block + 1).double() + (stride == block)
    found = whole_blocks(DOCUMENTS, block, stride)
    sums = [place_L @ x_BGJD[row, i : i + block].flatten(1) for row, i in found]
    expected_UJD = torch.stack(sums).unflatten(1, (HEADS, SIZE))
    weights = [normal(rank + 1, *expected_UJD.shape) for rank in range(4)]
    for ranks, name in SPLITS:
        placement = place(name, ranks, LENGTH)

        def work(rank, hub, placement=placement, ranks=ranks):
            plan = Plan(placement, rank, DOCUMENTS)
            view = ShardedView(plan, simulated_links(hub, rank, ranks, 1, Ledger()), Transports())
            here = plan.token_ids_BT[0]
            return here, *evaluate(view, x_BGJD.detach()[:, here], block, stride, weights[rank])

        total = (expected_UJD * sum(weights[:ranks])).sum()
        (gradient_BGJD,) = torch.autograd.grad(total, x_BGJD, retain_graph=True)
        for here, sums_UJD, gradient_BTJD in run_ranks(ranks, work):
            assert_close(sums_UJD, expected_UJD, "fp64")
            assert_close(gradient_BTJD, gradient_BGJD[:, here], "fp64")


@pytest.mark.parametrize("has_gradient", [True, False])
@pytest.mark.parametrize("documents", [DOCUMENTS, SHORT], ids=["documents", "no whole block"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_pieces_travel_as_the_formula_says(dtype, documents, has_gradient):
    block, stride, precision = 6, 3, "bf16" if dtype == torch.bfloat16 else "fp64"
    for ranks, name in SPLITS:
        placement = place(name, ranks, LENGTH)

        def work(rank, hub, placement=placement, ranks=ranks):
            ledger, plan = Ledger(), Plan(placement, rank, documents)
            view = ShardedView(plan, simulated_links(hub, rank, ranks, 1, ledger), Transports())
            shape = (len(documents), plan.length, HEADS, SIZE)
            x_BTJD = normal(rank, *shape, dtype=dtype).requires_grad_(has_gradient)
            sums = weighted(view, x_BTJD, block, stride)
            assert len(sums) == len(whole_blocks(documents, block, stride))
            assert sums.dtype == torch.promote_types(dtype, torch.float32)
            if has_gradient:
                sums.sum().backward()
            return {(label.verb, label.backward): t for label, t in ledger.traffic().items()}

        for rank, recorded in enumerate(run_ranks(ranks, work)):
            share = Share(
                rank, placement, len(documents), Transports(), WIDTHS[precision], documents
            )
            elements = HEADS * SIZE
            assert recorded == block_sums_traffic(share, block, elements, stride, has_gradient)


def test_a_rank_sends_the_blocks_it_has_tokens_of():
    """Contiguous thirds of 36 tokens; blocks of 8 that begin every 4th token."""
    plan = Plan(place("contiguous", 3, 36), 0, ((0, 5),))
    blocks = Blocks(plan, 8, 4)
    assert blocks.documents == {(0, 0): (0, 0), (0, 5): (0, 6)}
    assert [blocks.of_rank(rank).tolist() for rank in range(3)] == [
        [0, 1],
        [0, 1, 2, 3, 4],
        [3, 4, 5],
    ]
    share = Share(0, plan.placement, 1, Transports(), WIDTHS["bf16"], plan.documents)
    traffic = block_sums_traffic(share, 8, 10, 4)
    assert traffic[MEANS, False] == (1, 2 * 5 * 10 * 4)
