"""Research layers written with the verbs of a view give the same under every split."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from longctx.sequence.ledger import Ledger
from longctx.sequence.local import LocalView
from longctx.sequence.placement import place
from longctx.sequence.plan import Plan
from longctx.sequence.sharded import ShardedView, Transports
from longctx.sequence.simulator import run_ranks
from longctx.sequence.verbs import AFFINE
from longctx.sequence.view import Persistent, SequenceView
from tests.sequence.links import simulated_links
from tests.tolerances import assert_close

LENGTH, WIDTH = 37, 4
DOCUMENTS = ((0, 9, 10, 30), (0, 25))


def pieces_by_segment(view: SequenceView) -> dict[tuple[int, int], list]:
    found: dict[tuple[int, int], list] = {}
    for piece in view.plan.pieces:
        found.setdefault((piece.row, piece.segment), []).append(piece)
    return found


def decayed_sums(x_BTD: Tensor, view: SequenceView) -> Tensor:
    """Sums of earlier tokens of the document, decayed by what each token says, by AFFINE prefix."""
    flat, log_decay = x_BTD.flatten(0, 1), -x_BTD.flatten(0, 1)[:, :1].square()
    segments, rows = len(view.plan.segments), view.plan.rows
    added, kept, local = {}, {}, {}
    for key, pieces in pieces_by_segment(view).items():
        for piece in pieces:
            state, total = flat.new_zeros(WIDTH), flat.new_zeros(1)
            for t in range(piece.start, piece.stop):
                state, total = log_decay[t].exp() * state + flat[t], total + log_decay[t]
                local[t] = (state, total, key if piece is pieces[0] else None)
        added[key[::-1]], kept[key[::-1]] = state, total
    order = [(s, b) for s in range(segments) for b in range(rows)]
    shape = (segments, rows, 1, 1)
    elements = (
        torch.stack([added[key] for key in order]).view(*shape, WIDTH),
        torch.stack([kept[key] for key in order]).view(*shape, 1),
    )
    entering = view.prefix(elements, AFFINE)[0]
    out = []
    for t in range(len(flat)):
        state, total, key = local[t]
        if key is not None:
            state = state + total.exp() * entering[key[1], key[0], 0, 0]
        out.append(state)
    return torch.stack(out).view_as(x_BTD)


def gathered_mean(x_BTD: Tensor, view: SequenceView) -> Tensor:
    everything_BGD = view.gather(x_BTD.square())
    return x_BTD * everything_BGD.mean(1, keepdim=True)


def streamed_products(x_BTD: Tensor, view: SequenceView) -> Tensor:
    total = torch.zeros_like(x_BTD)
    for _, block_BTD in view.stream(x_BTD.tanh()):
        total = total + (x_BTD @ block_BTD.mT) @ block_BTD
    return total


def convolved(x_BTD: Tensor, view: SequenceView) -> Tensor:
    parts = view.halo(x_BTD, left=3, right=2)
    summed = [part.unfold(1, 6, 1) @ torch.arange(1.0, 7.0).to(x_BTD) for part in parts]
    return torch.cat(summed, 1)


def chosen_tokens(x_BTD: Tensor, view: SequenceView) -> Tensor:
    chosen_BK = view.top_k(x_BTD[..., 0], 5)
    is_chosen_BT = (view.token_ids_BT[..., None] == chosen_BK[:, None]).any(-1)
    return x_BTD * is_chosen_BT[..., None]


def reduced(x_BTD: Tensor, view: SequenceView) -> Tensor:
    return x_BTD * view.reduce(x_BTD.sum((0, 1))) + view.reduce_mean(x_BTD)


def handed_on(x_BTD: Tensor, view: SequenceView) -> Tensor:
    """A recurrence that no associative summary describes."""
    parts = x_BTD.split([segment.length for segment in view.plan.segments], 1)

    def work(state: Tensor, index: int) -> tuple[Tensor, Tensor]:
        outputs = []
        for x_BD in parts[index].unbind(1):
            state = (state * 0.9 + x_BD).tanh()
            outputs.append(state)
        return torch.stack(outputs, 1), state

    return torch.cat(view.handoff(x_BTD.new_zeros(x_BTD.shape[0], WIDTH), work), 1)


LAYERS = (
    decayed_sums,
    gathered_mean,
    streamed_products,
    convolved,
    chosen_tokens,
    reduced,
    handed_on,
)


def example() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (len(DOCUMENTS), LENGTH, WIDTH)
    x, w = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return x.requires_grad_(), w


def sharded(layer: Callable, ranks: int, placement: str, transports: Transports) -> list:
    x_BGD, weight_BGD = example()

    def work(rank: int, hub) -> tuple[Tensor, Tensor, Tensor]:
        plan = Plan(place(placement, ranks, LENGTH), rank, DOCUMENTS)
        view = ShardedView(plan, simulated_links(hub, rank, ranks, 1, Ledger()), transports)
        here = plan.token_ids_BT[0]
        x_BTD = x_BGD.detach()[:, here].requires_grad_()
        out_BTD = layer(x_BTD, view)
        (out_BTD * weight_BGD[:, here]).sum().backward()
        return here, out_BTD.detach(), x_BTD.grad

    return run_ranks(ranks, work)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
@pytest.mark.parametrize("placement", ["contiguous", "zigzag"])
@pytest.mark.parametrize(
    "transports", [Transports(), Transports(prefix="scan", stream="ring")], ids=["gather", "pass"]
)
def test_a_layer_of_verbs_does_not_depend_on_the_split(layer, placement, transports):
    x_BGD, weight_BGD = example()
    whole = layer(x_BGD, LocalView(DOCUMENTS, LENGTH))
    (whole * weight_BGD).sum().backward()
    for ranks in (1, 2, 3, 4):
        for here, out_BTD, grad_BTD in sharded(layer, ranks, placement, transports):
            assert_close(out_BTD, whole[:, here], "fp64", f"{ranks} ranks, output")
            assert_close(grad_BTD, x_BGD.grad[:, here], "fp64", f"{ranks} ranks, gradient")


def test_gradients_of_persistent_keys_do_not_hold_on_to_those_of_tokens():
    shared = [torch.randn(2, 3, size, requires_grad=True) for size in (4, 5)]
    tokens = [torch.randn(100, 3, size, requires_grad=True) for size in (4, 5)]
    sum(x.sin().sum() for x in Persistent(*shared).before(*tokens)).backward()
    for x in shared:
        assert x.grad is not None
        torch.testing.assert_close(x.grad, x.cos(), rtol=0, atol=1e-7)
        assert x.grad.untyped_storage().nbytes() == x.untyped_storage().nbytes()
