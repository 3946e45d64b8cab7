"""The blocking, differentiable verbs: any mixer can be written with them.

Each is an autograd.Function on plain exchanges in which every rank takes part, forwards and
backwards, whether or not its own result depends on others.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from longctx_kernels.keeping import recalled
from torch import Tensor

from longctx.sequence.affine import kept, links, own_places
from longctx.sequence.communicator import Communicator
from longctx.sequence.ledger import Label
from longctx.sequence.plan import Plan


class Wire(NamedTuple):
    """Where a verb runs: the batch's plan, the group, and the name it is counted under."""

    plan: Plan
    communicator: Communicator
    label: Label


class Gather(torch.autograd.Function):
    """`[B, T, ...]` to `[B, G, ...]` in order of positions; the gradient is a reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, x_BT: Tensor, wire: Wire) -> Tensor:
        ctx.wire = wire
        lengths = wire.plan.placement.lengths
        shapes = [(x_BT.shape[0], n, *x_BT.shape[2:]) for n in lengths]
        parts = wire.communicator.all_gather(x_BT, wire.label, shapes).wait()
        return torch.cat(parts, 1)[:, _order(wire.plan).to(x_BT.device)]

    @staticmethod
    def backward(ctx: Any, dout_BG: Tensor) -> Any:
        plan, communicator, label = ctx.wire
        wide = dout_BG.to(torch.promote_types(dout_BG.dtype, torch.float32))
        by_rank = wide[:, _order(plan).argsort().to(wide.device)]
        parts = by_rank.split(plan.placement.lengths, 1)
        own = communicator.reduce_scatter(parts, label.reversed()).wait()[0]
        return own.to(dout_BG.dtype), None


def _order(plan: Plan) -> Tensor:
    segments = (s for own in plan.placement.segments for s in own)
    return torch.cat([torch.arange(s.start, s.stop) for s in segments]).argsort()


class Reduce(torch.autograd.Function):
    """Sum over ranks, on every rank. The gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, communicator: Communicator, label: Label) -> Tensor:
        ctx.communicator, ctx.label = communicator, label
        return recalled(lambda: communicator.all_reduce(x, label))

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        return ctx.communicator.all_reduce(dout, ctx.label.reversed()), None, None


class _Circulate(torch.autograd.Function):
    """Blocks of all ranks, own one first, passed from rank to rank; their gradients travel back.

    One node, so that a rank that leaves a block out still takes part in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x_BT: Tensor, wire: Wire) -> tuple[Tensor, ...]:
        ctx.wire = wire
        blocks = [x_BT]
        for hop in range(1, wire.communicator.size):
            blocks.append(_shifted(blocks[-1], hop, 1, wire))
        return tuple(blocks)

    @staticmethod
    def backward(ctx: Any, *dblocks: Tensor) -> Any:
        wire = ctx.wire._replace(label=ctx.wire.label.reversed())
        wide = torch.promote_types(dblocks[0].dtype, torch.float32)
        travelling = dblocks[-1].to(wide)
        for hop in reversed(range(wire.communicator.size - 1)):
            travelling = dblocks[hop] + _shifted(travelling, hop, -1, wire)
        return travelling.to(dblocks[0].dtype), None


def _shifted(block: Tensor, hop: int, step: int, wire: Wire) -> Tensor:
    """Passes a block on; what comes belongs to the rank `hop` before this one."""
    communicator, lengths = wire.communicator, wire.plan.placement.lengths
    me, size = communicator.rank, communicator.size
    shape = (block.shape[0], lengths[(me - hop) % size], *block.shape[2:])
    to, source = (me + step) % size, (me - step) % size
    return communicator.exchange([(to, block)], [(source, shape)], block, wire.label).wait()[0]


def stream(x_BT: Tensor, wire: Wire, transport: str) -> Iterator[tuple[int, Tensor]]:
    """(rank, its tokens) of every rank, own ones first; any of them may be left out."""
    lengths = wire.plan.placement.lengths
    size, me = wire.communicator.size, wire.communicator.rank
    ranks = [(me - hop) % size for hop in range(size)]
    if transport == "ring":
        return zip(ranks, _Circulate.apply(x_BT, wire))
    gathered = Gather.apply(x_BT, wire)
    blocks = gathered[:, _order(wire.plan).argsort().to(x_BT.device)].split(lengths, 1)
    return zip(ranks, [blocks[rank] for rank in ranks])


class _TakePart(torch.autograd.Function):
    """`x`, tied to tensors it may not depend on, so that their backward exchange always runs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.others = [(other.shape, other.dtype, other.device) for other in others]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Any:
        zeros = (torch.zeros(s, dtype=dtype, device=device) for s, dtype, device in ctx.others)
        return dx, *zeros


class Monoid(NamedTuple):
    """An associative summary of the past: how two join, and what leaves a summary unchanged."""

    join: Callable[[Any, Any], Any]
    identity: Callable[[Any], Any]


def prefix(
    elements: tuple[Tensor, ...], monoid: Monoid, wire: Wire, rightwards: bool = True
) -> tuple[Tensor, ...]:
    """What enters each own segment: tensors `[S, B, ...]`, folded document by document.

    Elements of all segments are gathered; states have AffinePrefix, whose gradient is cheaper.
    """
    plan = wire.plan
    gathered = [gather_segments(x, wire) for x in elements]
    order = plan.placement.order
    passes = kept(plan, [plan.placement.segments[r][i] for r, i in order], elements[0]) > 0
    linked = links(plan, elements[0])[..., 0, 0, 0] > 0
    identity = monoid.identity(tuple(x[0] for x in gathered))
    state, entering = identity, []
    places = range(len(order))
    for place in places if rightwards else reversed(places):
        border = place if rightwards else place + 1
        is_linked = linked[border] if border < len(order) else torch.zeros_like(linked[0])
        state = _choose(is_linked, state, identity)
        entering.append(state)
        inner = _choose(passes[place], state, identity)
        element = tuple(x[place] for x in gathered)
        state = monoid.join(inner, element) if rightwards else monoid.join(element, inner)
    if not rightwards:
        entering.reverse()
    mine = [entering[place] for place in own_places(plan)]
    return tuple(_TakePart.apply(torch.stack(parts), *gathered) for parts in zip(*mine))


def _choose(yes_B: Tensor, left: Sequence[Tensor], right: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(
        torch.where(yes_B.view(-1, *(1,) * (a.dim() - 1)), a, b) for a, b in zip(left, right)
    )


def gather_segments(x_SB: Tensor, wire: Wire) -> Tensor:
    """Elements of all segments in order of positions."""
    counts = tuple(len(own) for own in wire.plan.placement.segments)
    return GatherParts.apply(x_SB, counts, wire)[
        torch.tensor([sum(counts[:r]) + i for r, i in wire.plan.placement.order])
    ]


class GatherParts(torch.autograd.Function):
    """Rows of all ranks, so many of each, in order of ranks; the gradient is a reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, x_SB: Tensor, counts: tuple[int, ...], wire: Wire) -> Tensor:
        ctx.wire, ctx.counts = wire, counts
        shapes = [(count, *x_SB.shape[1:]) for count in counts]
        gathered = wire.communicator.all_gather
        return recalled(lambda: torch.cat(gathered(x_SB, wire.label, shapes).wait()))

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        parts = dout.to(torch.promote_types(dout.dtype, torch.float32)).split(ctx.counts)
        label = ctx.wire.label.reversed()
        own = ctx.wire.communicator.reduce_scatter(parts, label).wait()[0]
        return own.to(dout.dtype), None, None


def _join_log_sum_exp(left: Any, right: Any) -> Any:
    (left_m, *left_sums), (right_m, *right_sums) = left, right
    m = torch.maximum(left_m, right_m)
    finite = m.masked_fill(m == -torch.inf, 0.0)
    scales = (left_m - finite).exp(), (right_m - finite).exp()
    sums = (a * scales[0] + b * scales[1] for a, b in zip(left_sums, right_sums))
    return (m, *sums)


AFFINE = Monoid(
    lambda left, right: (
        left[0] * right[1].exp() + right[0],
        left[1] + right[1],
    ),
    lambda like: tuple(torch.zeros_like(x) for x in like),
)
"""Elements (what a segment adds to a state, log of what it keeps of it), earlier then later."""


DENSE_AFFINE = Monoid(
    lambda left, right: (right[1] @ left[0] + right[0], right[1] @ left[1]),
    lambda like: (
        torch.zeros_like(like[0]),
        torch.eye(like[1].shape[-1], dtype=like[1].dtype, device=like[1].device).expand_as(like[1]),
    ),
)
"""Elements (what a segment adds to a state, the matrix that a state is multiplied by)."""


LOG_SUM_EXP = Monoid(
    _join_log_sum_exp,
    lambda like: (torch.full_like(like[0], -torch.inf), *(torch.zeros_like(x) for x in like[1:])),
)
"""Elements (m, u, w, ...): a log scale and sums at that scale, all broadcastable to each other."""


def top_monoid(count: int) -> Monoid:
    """Elements (score `[B, n]`, payload `[B, n, D]`): the `count` best, earlier ones at a tie."""

    def join(left: Any, right: Any) -> Any:
        score = torch.cat((left[0], right[0]), -1)
        best = score.sort(dim=-1, descending=True, stable=True).indices[..., :count]
        payload = torch.cat((left[1], right[1]), 1)
        index = best[..., None].expand(*best.shape, payload.shape[-1])
        return score.gather(-1, best), payload.gather(1, index)

    def identity(like: Any) -> Any:
        return torch.full_like(like[0], -torch.inf), torch.zeros_like(like[1])

    return Monoid(join, identity)


def top_k(score_BT: Tensor, count: int, wire: Wire) -> Tensor:
    """Positions `[B, count]` of the best scores of each whole row, rising; earlier ones win ties.

    Only each rank's own best travel. Positions carry no gradient.
    """
    return recalled(lambda: _top_k(score_BT, count, wire))


def _top_k(score_BT: Tensor, count: int, wire: Wire) -> Tensor:
    position_BT = wire.plan.token_ids_BT.to(score_BT.device)
    own = min(count, score_BT.shape[1])
    best = score_BT.detach().sort(dim=-1, descending=True, stable=True).indices[:, :own]
    shapes = [(len(best), min(count, n), 2) for n in wire.plan.placement.lengths]
    candidates = torch.stack((score_BT.detach().gather(1, best), position_BT.gather(1, best)), -1)
    message = candidates.to(torch.float64)
    parts = wire.communicator.all_gather(message, wire.label, shapes).wait()
    score, position = torch.cat(parts, 1).unbind(-1)
    by_position = position.argsort(1)
    score, position = score.gather(1, by_position), position.gather(1, by_position)
    chosen = score.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return position.gather(1, chosen).long().sort(-1).values


class _Receive(torch.autograd.Function):
    """A state from another rank; its gradient goes back there."""

    @staticmethod
    def forward(
        ctx: Any, like: Tensor, source: int, communicator: Communicator, label: Label
    ) -> Tensor:
        ctx.source, ctx.communicator, ctx.label = source, communicator, label
        wires = [(source, tuple(like.shape))]
        return recalled(lambda: communicator.exchange([], wires, like, label).wait()[0])

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        ctx.communicator.exchange([(ctx.source, dout)], [], dout, ctx.label.reversed()).wait()
        return torch.zeros_like(dout), None, None, None


class _Send(torch.autograd.Function):
    """Hands a state to another rank; returns a zero that the loss must contain."""

    @staticmethod
    def forward(
        ctx: Any, state: Tensor, to: int, communicator: Communicator, label: Label
    ) -> Tensor:
        ctx.to, ctx.communicator, ctx.label, ctx.shape = to, communicator, label, tuple(state.shape)
        recalled(lambda: communicator.exchange([(to, state)], [], state, label).wait())
        return state.new_zeros(())

    @staticmethod
    def backward(ctx: Any, dzero: Tensor) -> Any:
        wire = [(ctx.to, ctx.shape)]
        label = ctx.label.reversed()
        return ctx.communicator.exchange([], wire, dzero, label).wait()[0], None, None, None


def handoff(
    initial: Tensor, work: Callable[[Tensor, int], tuple[Tensor, Tensor]], wire: Wire
) -> list[Tensor]:
    """Segment after segment, `work(state, own index)` gives (output, next state).

    Serial over ranks, for memories that no associative summary describes. Returns the outputs of
    this rank's segments. Gradients need `backward()`: `autograd.grad` of chosen inputs skips the
    way back over a cut.
    """
    if torch.is_grad_enabled() and not initial.requires_grad:
        initial = initial.detach().requires_grad_()  # so that a gradient goes back
    order, me = wire.plan.placement.order, wire.plan.rank
    outputs, state = [], initial
    for place in own_places(wire.plan):
        before = order[place - 1][0] if place else me
        if before != me:
            state = _Receive.apply(initial, before, wire.communicator, wire.label)
        output, state = work(state, order[place][1])
        after = order[place + 1][0] if place + 1 < len(order) else me
        if after != me:
            output = output + _Send.apply(state, after, wire.communicator, wire.label)
        outputs.append(output)
    return outputs
