"""Softmax attention over a sharded sequence, scheduled by hand.

Queries stay; keys and values come to them: all at once (`allgather`, by chunks of heads), in turn
(`ring`), or, with a window, just the tokens before each segment (`halo`). The backward pass uses
the saved output and log-sum-exp and never repeats a forward tile.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from longctx_kernels.keeping import recalled
from longctx_kernels.lifetime_attention import (
    Score,
    Sight,
    lifetime_backward,
    lifetime_forward,
    merge,
)
from longctx_kernels.softmax_attention import (
    FULL,
    Tile,
    attend,
    attend_backward,
)
from torch import Tensor

from longctx.sequence.communicator import Communicator, Pending
from longctx.sequence.ledger import Label
from longctx.sequence.plan import Piece, Plan
from longctx.sequence.sights import block_sight

Tensors = tuple[Tensor, ...]


class Wires(NamedTuple):
    """Whom an attention talks to, under which name it is counted, and who computes it."""

    communicator: Communicator
    label: Label
    backend: str


def sharded_softmax_attention(
    operands: tuple[Tensor, Tensor, Tensor], plan: Plan, wires: Wires, stream: str, heads: int
) -> Tensor:
    """q `[M, H, K]`, k and v `[M, J, D]`, the plan's local tokens; `heads` bounds a gather."""
    flat = tuple(x.transpose(0, 1).contiguous() for x in operands)
    transport: _Transport = _Ring(plan, wires) if stream == "ring" else _Gather(plan, wires, heads)
    return _AttentionCore.apply(*flat, transport).transpose(0, 1)


def block_tiles(plan: Plan, source: int) -> list[Tile]:
    """Tiles of this rank's queries against the keys of rank `source`."""
    keys: dict[tuple[int, int], list[Piece]] = {}
    for piece in plan.pieces_of(source):
        keys.setdefault((piece.row, piece.document), []).append(piece)
    tiles = []
    for mine in plan.pieces:
        for other in keys.get((mine.row, mine.document), ()):
            if other.position == mine.position:
                tiles.append(Tile(mine.start, mine.stop, other.start, other.stop, 0))
            elif other.position < mine.position:
                tiles.append(
                    Tile(mine.start, mine.stop, other.start, other.stop, FULL, first=False)
                )
    return sorted(tiles, key=lambda tile: not tile.first)


@dataclass(frozen=True)
class _Forward:
    """The tiles of a forward pass; they fill (out, lse). Own keys come first for every head."""

    plan: Plan
    backend: str
    operands: Tensors
    results: Tensors

    @property
    def key_heads(self) -> slice:
        """All of them."""
        return slice(0, self.operands[1].shape[0])

    def keys(self, heads: slice) -> Tensors:
        """Own keys and values of some key heads."""
        return tuple(x[heads] for x in self.operands[1:])

    def queries(self, heads: slice) -> slice:
        """The query heads that read these key heads."""
        group = self.operands[0].shape[0] // self.operands[1].shape[0]
        return slice(heads.start * group, heads.stop * group)

    def attend(self, block: Tensors, source: int, heads: slice) -> None:
        """Own queries against the keys of rank `source`."""
        queries = self.queries(heads)
        q_HTK, results = self.operands[0][queries], tuple(x[queries] for x in self.results)
        if self.backend == "triton":
            q, k, v = _by_token((q_HTK, *block))
            found = lifetime_forward(
                q, k, v, self.sight(source), Score(_scale(q)), True, self.backend
            )
            partial = _by_token(found)
            if source != self.plan.rank:
                partial = merge((results[0], results[1]), (partial[0], partial[1]))
            for kept, new in zip(results, partial):
                kept.copy_(new)
        else:
            attend((q_HTK, *block), results, self.plan.once(block_tiles, source), _scale(q_HTK))

    def sight(self, source: int) -> Sight:
        """Which keys of rank `source` own queries see."""
        return self.plan.once(block_sight, source, self.operands[0].device)


@dataclass(frozen=True)
class _Backward(_Forward):
    """The tiles of a backward pass; they add to the gradients of q, k, v."""

    dout_HTV: Tensor
    gradients: Tensors

    def attend_own(self, heads: slice) -> None:
        """Gradients of own queries and own keys: work that waits for nobody."""
        if heads.start < heads.stop:
            own = tuple(x[heads] for x in self.gradients[1:])
            self._add(self.keys(heads), own, self.plan.rank, heads)

    def attend_block(self, block: Tensors, source: int, heads: slice) -> list[Tensor]:
        """Adds to the gradient of own queries; gives those of another rank's keys."""
        grads = [torch.zeros_like(x, dtype=self.gradients[0].dtype) for x in block]
        self._add(block, grads, source, heads)
        return grads

    def _add(self, block: Tensors, grads: Sequence[Tensor], source: int, heads: slice) -> None:
        queries = self.queries(heads)
        operands = (self.operands[0][queries], *block)
        sums = (self.gradients[0][queries], *grads)
        dout_HTV, results = self.dout_HTV[queries], tuple(x[queries] for x in self.results)
        scale = _scale(operands[0])
        if self.backend == "triton":
            q, k, v, dout, out, lse = _by_token((*operands, dout_HTV, *results))
            sight, score = self.sight(source), Score(scale)
            found = lifetime_backward(
                dout, None, (q, k, v), (out, lse), sight, score, True, self.backend
            )
            for dx, value in zip(sums, _by_token(found[:3])):
                dx += value
        else:
            tiles = self.plan.once(block_tiles, source)
            attend_backward(dout_HTV, operands, results, sums, tiles, scale)

    def arrived(self, message: Tensor, heads: slice) -> None:
        """Adds what other ranks found for own keys."""
        own = tuple(x[heads] for x in self.gradients[1:])
        for dx, value in zip(own, _unpack(message, own)):
            dx += value


class _Transport(Protocol):
    """Brings keys to queries."""

    plan: Plan
    wires: Wires

    def forward(self, work: _Forward) -> None: ...

    def backward(self, work: _Backward) -> None: ...


class _AttentionCore(torch.autograd.Function):
    """Hands the loop over blocks to a transport."""

    @staticmethod
    def forward(
        ctx: Any, q_HTK: Tensor, k_JTK: Tensor, v_JTV: Tensor, transport: _Transport
    ) -> Tensor:
        out_HTV, lse_HT = recalled(lambda: _attended((q_HTK, k_JTK, v_JTV), transport))
        ctx.save_for_backward(q_HTK, k_JTK, v_JTV, out_HTV, lse_HT)
        ctx.transport = transport
        return out_HTV

    @staticmethod
    def backward(ctx: Any, dout_HTV: Tensor) -> Any:
        q_HTK, k_JTK, v_JTV, out_HTV, lse_HT = ctx.saved_tensors
        operands, results = (q_HTK, k_JTK, v_JTV), (out_HTV, lse_HT)
        gradients = tuple(torch.zeros_like(x, dtype=lse_HT.dtype) for x in operands)
        transport = ctx.transport
        backend = transport.wires.backend
        transport.backward(
            _Backward(transport.plan, backend, operands, results, dout_HTV, gradients)
        )
        return *(dx.to(x.dtype) for dx, x in zip(gradients, operands)), None


def _attended(operands: Tensors, transport: _Transport) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of own queries."""
    q_HTK, _, v_JTV = operands
    wide = torch.promote_types(q_HTK.dtype, torch.float32)
    out_HTV = q_HTK.new_empty(*q_HTK.shape[:2], v_JTV.shape[-1], dtype=wide)
    lse_HT = out_HTV.new_empty(q_HTK.shape[:2])
    results = out_HTV, lse_HT
    transport.forward(_Forward(transport.plan, transport.wires.backend, operands, results))
    return out_HTV.to(v_JTV.dtype), lse_HT


def _by_token(tensors: Sequence[Tensor]) -> Tensors:
    """`[H, T, ...]` as `[T, H, ...]`, or the other way round."""
    return tuple(x.transpose(0, 1) for x in tensors)


def _scale(q_HTK: Tensor) -> float:
    return q_HTK.shape[-1] ** -0.5


def _halves(heads: slice) -> tuple[slice, slice]:
    middle = (heads.start + heads.stop + 1) // 2
    return slice(heads.start, middle), slice(middle, heads.stop)


@dataclass
class _Ring:
    """Blocks of keys travel round; in the backward pass their gradients travel with them.

    Gradients of own keys stay at home: half of that work hides the first trip of the keys, half
    the last trip of the gradients.
    """

    plan: Plan
    wires: Wires

    def _shift(self, block: Sequence[Tensor], source: int, label: Label) -> Pending:
        """Passes the block of rank `source` on and receives that of the rank before it."""
        communicator, lengths = self.wires.communicator, self.plan.placement.lengths
        size, tokens = communicator.size, lengths[(source - 1) % communicator.size]
        message = _pack(block)
        shape = (message.numel() // lengths[source] // self.plan.rows, self.plan.rows * tokens)
        right, left = (communicator.rank + 1) % size, (communicator.rank - 1) % size
        return communicator.exchange([(right, message)], [(left, shape)], message, label)

    def _blocks(self, work: _Forward, label: Label) -> Iterator[tuple[int, Tensors]]:
        """(rank, its keys), own ones first; the next block comes while this one is worked on."""
        rank, size = self.wires.communicator.rank, self.wires.communicator.size
        block = work.keys(work.key_heads)
        for hop in range(size):
            source = (rank - hop) % size
            pending = self._shift(block, source, label) if hop + 1 < size else None
            yield source, block
            if pending:
                block = _unpack(pending.wait()[0], work.operands[1:])

    def forward(self, work: _Forward) -> None:
        for source, block in self._blocks(work, self.wires.label):
            work.attend(block, source, work.key_heads)

    def backward(self, work: _Backward) -> None:
        label, travelling = self.wires.label.reversed(), None
        early, late = _halves(work.key_heads)
        for source, block in self._blocks(work, label):
            if source == self.plan.rank:
                work.attend_own(early)
                continue
            grads = work.attend_block(block, source, work.key_heads)
            if travelling:
                for dx, value in zip(grads, _unpack(travelling.wait()[0], block)):
                    dx += value
            travelling = self._shift(grads, source, label)
        work.attend_own(late)
        if travelling:
            work.arrived(travelling.wait()[0], work.key_heads)


def _pack(block: Sequence[Tensor]) -> Tensor:
    """Keys and values in one message: `[J * (K + V), M]` with tokens last."""
    return torch.cat([x.mT.flatten(0, 1) for x in block])


def _unpack(message: Tensor, like: Tensors) -> Tensors:
    rows = [x.shape[0] * x.shape[2] for x in like]
    return tuple(
        part.view(x.shape[0], x.shape[2], -1).mT.contiguous()
        for part, x in zip(message.split(rows), like)
    )


@dataclass
class _Gather:
    """All keys at once, `heads` key heads at a time (0: all).

    A chunk comes, and the gradients of the one before it leave, while there is work on own keys or
    on another chunk.
    """

    plan: Plan
    wires: Wires
    heads: int

    def _chunks(
        self, work: _Forward, label: Label
    ) -> Iterator[tuple[slice, Callable[[], list[Tensor]]]]:
        """Key heads, and the call that waits for everybody's and asks for the next ones."""
        total = work.key_heads.stop
        size = self.heads or total
        chunks = [slice(j, min(j + size, total)) for j in range(0, total, size)]
        under_way = deque([self._start(work, chunks[0], label)])

        def receive(following: list[slice]) -> list[Tensor]:
            parts = under_way.popleft().wait()
            under_way.extend(self._start(work, heads, label) for heads in following)
            return parts

        for i, heads in enumerate(chunks):
            yield heads, partial(receive, chunks[i + 1 : i + 2])

    def _start(self, work: _Forward, heads: slice, label: Label) -> Pending:
        message = _pack(work.keys(heads))
        shapes = [(message.shape[0], self.plan.rows * n) for n in self.plan.placement.lengths]
        return self.wires.communicator.all_gather(message, label, shapes)

    def forward(self, work: _Forward) -> None:
        rank, size = self.wires.communicator.rank, self.wires.communicator.size
        for heads, receive in self._chunks(work, self.wires.label):
            own = work.keys(heads)
            work.attend(own, rank, heads)
            parts = receive()
            for source in ((rank - hop) % size for hop in range(1, size)):
                work.attend(_unpack(parts[source], own), source, heads)

    def backward(self, work: _Backward) -> None:
        communicator, label = self.wires.communicator, self.wires.label.reversed()
        leaving: tuple[Pending, slice] | None = None
        for heads, receive in self._chunks(work, label):
            early, late = _halves(heads)
            work.attend_own(early)
            own, parts, messages = work.keys(heads), receive(), []
            for source, part in enumerate(parts):
                if source == communicator.rank:
                    messages.append(torch.zeros_like(part, dtype=work.gradients[0].dtype))
                else:
                    messages.append(_pack(work.attend_block(_unpack(part, own), source, heads)))
            if leaving:
                work.arrived(leaving[0].wait()[0], leaving[1])
            leaving = communicator.reduce_scatter(messages, label), heads
            work.attend_own(late)
        if leaving:
            work.arrived(leaving[0].wait()[0], leaving[1])
