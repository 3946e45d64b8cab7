"""Softmax attention over a sharded sequence, scheduled by hand.

Queries stay; keys and values come to them: all at once (`allgather`, by chunks of heads), in turn
(`ring`), or, with a window, just the tokens before each segment (`halo`). The backward pass uses
the saved output and log-sum-exp and never repeats a forward tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
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

Tensors = tuple[Tensor, ...]


class Wires(NamedTuple):
    """Whom an attention talks to, and under which name it is counted."""

    communicator: Communicator
    label: Label


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


class _Transport(Protocol):
    """Brings keys to queries; fills (out, lse), or adds to the gradients of q, k, v."""

    def forward(self, operands: Tensors, results: Tensors) -> None: ...

    def backward(
        self, dout_HTV: Tensor, operands: Tensors, results: Tensors, gradients: Tensors
    ) -> None: ...


class _AttentionCore(torch.autograd.Function):
    """Hands the loop over blocks to a transport; own keys always come first."""

    @staticmethod
    def forward(
        ctx: Any, q_HTK: Tensor, k_JTK: Tensor, v_JTV: Tensor, transport: _Transport
    ) -> Tensor:
        wide = torch.promote_types(q_HTK.dtype, torch.float32)
        out_HTV = q_HTK.new_empty(*q_HTK.shape[:2], v_JTV.shape[-1], dtype=wide)
        lse_HT = out_HTV.new_empty(q_HTK.shape[:2])
        transport.forward((q_HTK, k_JTK, v_JTV), (out_HTV, lse_HT))
        out_HTV = out_HTV.to(v_JTV.dtype)
        ctx.save_for_backward(q_HTK, k_JTK, v_JTV, out_HTV, lse_HT)
        ctx.transport = transport
        return out_HTV

    @staticmethod
    def backward(ctx: Any, dout_HTV: Tensor) -> Any:
        q_HTK, k_JTK, v_JTV, out_HTV, lse_HT = ctx.saved_tensors
        operands = (q_HTK, k_JTK, v_JTV)
        gradients = tuple(torch.zeros_like(x, dtype=lse_HT.dtype) for x in operands)
        ctx.transport.backward(dout_HTV, operands, (out_HTV, lse_HT), gradients)
        return *(dx.to(x.dtype) for dx, x in zip(gradients, operands)), None


def _scale(q_HTK: Tensor) -> float:
    return q_HTK.shape[-1] ** -0.5


@dataclass(frozen=True)
class _Ring:
    """Blocks of keys travel round; in the backward pass their gradients travel with them."""

    plan: Plan
    wires: Wires

    def _shift(self, block: tuple[Tensor, ...], source: int, label: Label) -> Pending:
        """Passes the block of rank `source` on and receives that of the rank before it."""
        communicator, lengths = self.wires.communicator, self.plan.placement.lengths
        size, tokens = communicator.size, lengths[(source - 1) % communicator.size]
        message = _pack(block)
        shape = (message.numel() // lengths[source] // self.plan.rows, self.plan.rows * tokens)
        right, left = (communicator.rank + 1) % size, (communicator.rank - 1) % size
        return communicator.exchange([(right, message)], [(left, shape)], message, label)

    def forward(self, operands: Tensors, results: Tensors) -> None:
        q_HTK, *block = operands
        communicator = self.wires.communicator
        for hop in range(communicator.size):
            source = (communicator.rank - hop) % communicator.size
            pending = None
            if hop + 1 < communicator.size:
                pending = self._shift(tuple(block), source, self.wires.label)
            attend((q_HTK, *block), results, block_tiles(self.plan, source), _scale(q_HTK))
            if pending:
                block = _unpack(pending.wait()[0], operands[1:])

    def backward(
        self, dout_HTV: Tensor, operands: Tensors, results: Tensors, gradients: Tensors
    ) -> None:
        q_HTK, *block = operands
        communicator, label = self.wires.communicator, self.wires.label.reversed()
        size, travelling = communicator.size, None
        for hop in range(size):
            source = (communicator.rank - hop) % size
            pending = None
            if hop + 1 < size:
                pending = self._shift(tuple(block), source, label)
            grads = [torch.zeros_like(x, dtype=gradients[0].dtype) for x in block]
            tiles = block_tiles(self.plan, source)
            attend_backward(
                dout_HTV, (q_HTK, *block), results, (gradients[0], *grads), tiles, _scale(q_HTK)
            )
            if travelling:
                arrived = _unpack(travelling.wait()[0], gradients[1:])
                grads = [dx + other for dx, other in zip(grads, arrived)]
            if size > 1:
                travelling = self._shift(tuple(grads), source, label)
            if pending:
                block = _unpack(pending.wait()[0], operands[1:])
        home = _unpack(travelling.wait()[0], gradients[1:]) if travelling else grads
        for dx, value in zip(gradients[1:], home):
            dx.copy_(value)


def _pack(block: tuple[Tensor, ...]) -> Tensor:
    """Keys and values in one message: `[J * (K + V), M]` with tokens last."""
    return torch.cat([x.mT.flatten(0, 1) for x in block])


def _unpack(message: Tensor, like: tuple[Tensor, ...]) -> list[Tensor]:
    rows = [x.shape[0] * x.shape[2] for x in like]
    return [
        part.view(x.shape[0], x.shape[2], -1).mT.contiguous()
        for part, x in zip(message.split(rows), like)
    ]


@dataclass(frozen=True)
class _Gather:
    """All keys at once, `heads` key heads at a time (0: all); the next chunk comes during work."""

    plan: Plan
    wires: Wires
    heads: int

    def _chunks(self, operands: Tensors) -> list[tuple[slice, slice]]:
        """Query heads and key heads of each chunk."""
        query_heads, key_heads = operands[0].shape[0], operands[1].shape[0]
        group, size = query_heads // key_heads, self.heads or key_heads
        starts = range(0, key_heads, size)
        return [
            (slice(j * group, (j + size) * group), slice(j, min(key_heads, j + size)))
            for j in starts
        ]

    def _gathered(
        self, operands: Tensors, label: Label
    ) -> Iterator[tuple[slice, slice, list[list[Tensor]]]]:
        chunks = self._chunks(operands)
        pending = self._start(operands, chunks[0][1], label)
        for i, (queries, keys) in enumerate(chunks):
            parts = pending.wait()
            if i + 1 < len(chunks):
                pending = self._start(operands, chunks[i + 1][1], label)
            yield queries, keys, [_unpack(x, tuple(o[keys] for o in operands[1:])) for x in parts]

    def _start(self, operands: Tensors, keys: slice, label: Label) -> Pending:
        message = _pack(tuple(x[keys] for x in operands[1:]))
        tokens = (self.plan.rows * n for n in self.plan.placement.lengths)
        shapes = [(message.shape[0], n) for n in tokens]
        return self.wires.communicator.all_gather(message, label, shapes)

    def _sources(self) -> list[int]:
        """Own block first: it leaves no query without a key."""
        communicator = self.wires.communicator
        return [(communicator.rank - hop) % communicator.size for hop in range(communicator.size)]

    def forward(self, operands: Tensors, results: Tensors) -> None:
        for queries, _, blocks in self._gathered(operands, self.wires.label):
            q_HTK, chunk = operands[0][queries], tuple(x[queries] for x in results)
            for source in self._sources():
                tiles = block_tiles(self.plan, source)
                attend((q_HTK, *blocks[source]), chunk, tiles, _scale(q_HTK))

    def backward(
        self, dout_HTV: Tensor, operands: Tensors, results: Tensors, gradients: Tensors
    ) -> None:
        label, wide = self.wires.label.reversed(), gradients[0].dtype
        for queries, keys, blocks in self._gathered(operands, label):
            q_HTK, dq_HTK = operands[0][queries], gradients[0][queries]
            messages = []
            for source in range(self.wires.communicator.size):
                grads = tuple(torch.zeros_like(x, dtype=wide) for x in blocks[source])
                attend_backward(
                    dout_HTV[queries],
                    (q_HTK, *blocks[source]),
                    tuple(x[queries] for x in results),
                    (dq_HTK, *grads),
                    block_tiles(self.plan, source),
                    _scale(q_HTK),
                )
                messages.append(_pack(grads))
            own = self.wires.communicator.reduce_scatter(messages, label).wait()[0]
            for dx, value in zip(
                gradients[1:], _unpack(own, tuple(g[keys] for g in gradients[1:]))
            ):
                dx[keys] = value
