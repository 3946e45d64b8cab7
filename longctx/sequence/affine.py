"""Exchange of recurrent states: segments as affine maps `S_out = A S_in + E`, in either direction.

Three transports give the same values. `allgather`: one collective each way. `scan`: a chain from
segment to segment in blocks of the value dimension, beside the local work. `serial`: the same
chain in one block, before the local work.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from longctx_kernels.keeping import recalled
from torch import Tensor

from longctx.sequence.communicator import Communicator
from longctx.sequence.ledger import Label
from longctx.sequence.placement import Segment
from longctx.sequence.plan import Plan


@dataclass(frozen=True)
class Transitions:
    """How much of an incoming state survives each segment.

    `own` has a factor for each of this rank's segments `[S, B, H, K or 1, 1]`, or a matrix
    `[S, B, H, K, K]`, zero where a document starts inside. `linked` says, per global segment and
    row, whether it goes on with the document before it. `everyone` has the factors of all global
    segments in order, if no exchange is needed to know them.
    """

    own: Tensor
    linked: Tensor
    everyone: Tensor | None = None


def constant_transitions(plan: Plan, log_decay_H: Tensor) -> Transitions:
    """Transitions of a constant decay per head, which every rank knows for all segments."""
    segments = [plan.placement.segments[rank][i] for rank, i in plan.placement.order]
    factors_GH = torch.stack([(log_decay_H * s.length).exp() for s in segments])
    everyone = (factors_GH[:, None] * kept(plan, segments, log_decay_H)[..., None])[..., None, None]
    own = everyone[own_places(plan)]
    return Transitions(own, links(plan, own), everyone)


def kept(plan: Plan, segments: Sequence[Segment], like: Tensor) -> Tensor:
    """`[S, B]`: 1 where no document starts inside a segment, else 0."""
    rows = range(plan.rows)
    return torch.tensor([[not plan.resets(row, s) for row in rows] for s in segments]).to(like)


def links(plan: Plan, like: Tensor) -> Tensor:
    """`[G, B, 1, 1, 1]`: 1 where a global segment goes on with the document before it, else 0."""
    segments = [plan.placement.segments[rank][i] for rank, i in plan.placement.order]
    rows = range(plan.rows)
    linked_GB = torch.tensor([[plan.continues(row, s) for row in rows] for s in segments])
    return linked_GB.to(like)[..., None, None, None]


def carried(factor: Tensor, state: Tensor) -> Tensor:
    """A state `[.., K, V]` after a segment with this factor or matrix, without what it adds."""
    return factor @ state if factor.shape[-1] > 1 else factor * state


def carried_back(factor: Tensor, dstate: Tensor) -> Tensor:
    """The gradient of `carried` with respect to the state."""
    return factor.mT @ dstate if factor.shape[-1] > 1 else factor * dstate


def own_places(plan: Plan) -> list[int]:
    """Place in the global order of each of this rank's segments."""
    return [i for i, (rank, _) in enumerate(plan.placement.order) if rank == plan.rank]


class Prefix(ABC):
    """One exchange; elements and states are `[S, B, H, K, V]` with this rank's segments.

    Rightwards, a segment hands `A S_in + E` to its right neighbour; leftwards `A^T S_in + E` to its
    left one. The gradient of either is the other: dS_in travels where E did not.
    """

    def __init__(self, plan: Plan, transitions: Transitions, communicator: Communicator):
        self.plan, self.transitions, self.communicator = plan, transitions, communicator

    @abstractmethod
    def rightwards(self, added: Tensor, label: Label) -> Callable[[], Tensor]:
        """Sends what segments add; the call gives what enters each from the left."""

    @abstractmethod
    def leftwards(self, added: Tensor, label: Label) -> Callable[[], Tensor]:
        """Sends what segments add; the call gives what enters each from the right."""


class GatheredPrefix(Prefix):
    """Everybody gets what all segments add and folds what lies on the one side of its own.

    Factors that others cannot know travel with the first exchange and are kept for the second.
    """

    def __init__(self, plan: Plan, transitions: Transitions, communicator: Communicator):
        super().__init__(plan, transitions, communicator)
        self._factors = transitions.everyone

    def _gather(self, added: Tensor, label: Label) -> Callable[[], list[tuple[Tensor, ...]]]:
        """What each global segment adds, its factor and its link, in order."""
        message, own = added.flatten(1), self.transitions.own
        if self._factors is None:
            message = torch.cat((message, own.flatten(1)), 1)
        shapes = [(len(s), message.shape[1]) for s in self.plan.placement.segments]
        pending = self.communicator.all_gather(message, label, shapes)

        def finish() -> list[tuple[Tensor, ...]]:
            parts = pending.wait()
            gathered = torch.stack([parts[r][i] for r, i in self.plan.placement.order])
            if self._factors is None:
                gathered, factors = gathered.split((added[0].numel(), own[0].numel()), 1)
                # A copy: a view would hold the states of all segments until the backward pass.
                self._factors = factors.reshape(-1, *own.shape[1:]).clone()
            everything = gathered.reshape(-1, *added.shape[1:])
            return list(zip(everything, self._factors, self.transitions.linked))

        return finish

    def rightwards(self, added: Tensor, label: Label) -> Callable[[], Tensor]:
        gathered = self._gather(added, label)

        def finish() -> Tensor:
            state, entering = torch.zeros_like(added[0]), []
            for added_there, factor, linked in gathered():
                state = linked * state
                entering.append(state)
                state = carried(factor, state) + added_there
            return torch.stack([entering[place] for place in own_places(self.plan)])

        return finish

    def leftwards(self, added: Tensor, label: Label) -> Callable[[], Tensor]:
        gathered = self._gather(added, label)

        def finish() -> Tensor:
            state, entering = torch.zeros_like(added[0]), []
            for added_there, factor, linked in reversed(gathered()):
                entering.append(state)
                state = linked * (added_there + carried_back(factor, state))
            entering.reverse()
            return torch.stack([entering[place] for place in own_places(self.plan)])

        return finish


class ChainedPrefix(Prefix):
    """States pass from each segment to the next, block after block, and never more than once."""

    def __init__(
        self,
        plan: Plan,
        transitions: Transitions,
        communicator: Communicator,
        blocks: int,
        beside: bool,
    ):
        super().__init__(plan, transitions, communicator)
        self._blocks, self._beside = blocks, beside

    def rightwards(self, added: Tensor, label: Label) -> Callable[[], Tensor]:
        linked = self.transitions.linked

        def leave(place: int, index: int, block: Tensor, state: Tensor) -> Tensor:
            kept = carried(self.transitions.own[index], state) + block
            return linked[place + 1] * kept

        return self._run(added, label, 1, leave)

    def leftwards(self, added: Tensor, label: Label) -> Callable[[], Tensor]:
        linked = self.transitions.linked

        def leave(place: int, index: int, block: Tensor, state: Tensor) -> Tensor:
            return linked[place] * (block + carried_back(self.transitions.own[index], state))

        return self._run(added, label, -1, leave)

    def _run(
        self, own: Tensor, label: Label, step: int, leave: Callable[..., Tensor]
    ) -> Callable[[], Tensor]:
        arriving = torch.zeros_like(own)

        def walk() -> None:
            with torch.no_grad():
                self._walk(own, arriving, label, step, leave)

        return _beside(walk, arriving) if self._beside else _before(walk, arriving)

    def _walk(
        self, own: Tensor, arriving: Tensor, label: Label, step: int, leave: Callable[..., Tensor]
    ) -> None:
        """Receives, transforms and hands on every block of every own segment."""
        order = self.plan.placement.order
        places = [(p, order[p][1]) for p in own_places(self.plan)][::step]
        ranges = own.shape[-1] * torch.arange(self._blocks + 1) // self._blocks
        blocks = [slice(a, b) for a, b in zip(ranges.tolist(), ranges[1:].tolist()) if a < b]
        sent = []
        for place, index in places:
            before, after = place - step, place + step
            for block in blocks:
                part = own[index][..., block]
                if 0 <= before < len(order) and order[before][0] != self.plan.rank:
                    wire = (order[before][0], tuple(part.shape))
                    pending = self.communicator.exchange([], [wire], own, label)
                    arriving[index][..., block] = pending.wait()[0]
                if not 0 <= after < len(order):
                    continue
                leaving = leave(place, index, part, arriving[index][..., block])
                if order[after][0] == self.plan.rank:
                    arriving[order[after][1]][..., block] = leaving
                else:
                    sent.append(
                        self.communicator.exchange([(order[after][0], leaving)], [], own, label)
                    )
        for pending in sent:
            pending.wait()


def _before(walk: Callable[[], None], result: Tensor) -> Callable[[], Tensor]:
    walk()
    return lambda: result


def _beside(walk: Callable[[], None], result: Tensor) -> Callable[[], Tensor]:
    """Runs a chain beside what the caller does next: on a thread, or on a CUDA stream."""
    if result.is_cuda:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            walk()

        def finish_stream() -> Tensor:
            torch.cuda.current_stream().wait_stream(stream)
            return result

        return finish_stream
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            walk()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()

    def finish_thread() -> Tensor:
        thread.join()
        if errors:
            raise errors[0]
        return result

    return finish_thread


class AffinePrefix(torch.autograd.Function):
    """What enters each segment from the left (or right), with gradients to factors as well.

    These are numbers or matrices: how a segment makes a state that enters it into one that leaves.
    """

    @staticmethod
    def forward(
        ctx: Any, added: Tensor, factors: Tensor, prefix: Prefix, label: Label, rightwards: bool
    ) -> Tensor:
        walk = prefix.rightwards if rightwards else prefix.leftwards
        entering = recalled(lambda: walk(added, label)())
        ctx.save_for_backward(entering, factors)
        ctx.prefix, ctx.label, ctx.rightwards = prefix, label, rightwards
        return entering

    @staticmethod
    def backward(ctx: Any, dentering: Tensor) -> Any:
        entering, factors = ctx.saved_tensors
        walk = ctx.prefix.leftwards if ctx.rightwards else ctx.prefix.rightwards
        dadded = walk(dentering, ctx.label.reversed())()
        if factors.shape[-1] > 1:
            return dadded, dadded @ entering.mT, None, None, None
        dfactors = (dadded * entering).sum_to_size(factors.shape)
        return dadded, dfactors, None, None, None


def affine_prefix(
    added: Tensor,
    factors: Tensor,
    plan: Plan,
    make_prefix: Callable[[Transitions], Prefix],
    label: Label,
    rightwards: bool,
) -> Tensor:
    """What enters each segment, of what they add and their factors or matrices."""
    factors = factors * kept(plan, plan.segments, added)[..., None, None, None]
    crossed = factors.detach()
    if not rightwards and factors.shape[-1] > 1:
        crossed = crossed.mT  # leftwards transposes, as it is made for gradients
    exchange = make_prefix(Transitions(crossed, links(plan, added)))
    return AffinePrefix.apply(added, factors, exchange, label, rightwards)
