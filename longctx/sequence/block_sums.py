"""Sums over blocks of documents, wherever their tokens lie, known to every rank.

A rank's tokens of a block are a piece of it. Every rank sums its pieces, pieces of all ranks are
gathered, and those of a block are added. Blocks are whole ones: an end of a document that fills no
block has none.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longctx.sequence.expected import Expected, Share, both_ways
from longctx.sequence.ledger import Traffic
from longctx.sequence.placement import Placement
from longctx.sequence.plan import Documents, Plan
from longctx.sequence.running import wide
from longctx.sequence.verbs import GatherParts
from longctx.sequence.view import SequenceView

MEANS = "means"


@dataclass(frozen=True)
class Blocks:
    """Blocks of `block` tokens, one from every `stride`-th token of each document on, numbered
    through all documents of all rows. The stride divides the block; smaller ones overlap."""

    plan: Plan
    block: int
    stride: int

    @cached_property
    def documents(self) -> dict[tuple[int, int], tuple[int, int]]:
        """(first block, how many) of each document, by its row and the position it starts at."""
        found, first = {}, 0
        for row, starts in enumerate(self.plan.documents):
            stops = (*starts[1:], self.plan.placement.length)
            for start, stop in zip(starts, stops):
                count = max(0, (stop - start - self.block) // self.stride + 1)
                found[row, start] = first, count
                first += count
        return found

    @cached_property
    def total(self) -> int:
        """Blocks of all documents."""
        return sum(count for _, count in self.documents.values())

    @cached_property
    def last_tokens(self) -> Tensor:
        """Position of the last token of every block in the rows laid end to end."""
        length = self.plan.placement.length
        parts = [
            row * length + start + torch.arange(count) * self.stride + self.block - 1
            for (row, start), (_, count) in self.documents.items()
        ]
        return torch.cat(parts)

    def of_rank(self, rank: int) -> Tensor:
        """Numbers of the blocks that a rank has tokens of, rising."""
        return torch.cat([torch.arange(*touched) for touched in self._touched(rank)]).unique()

    def _touched(self, rank: int) -> list[tuple[int, int]]:
        """Ranges of the blocks that each of a rank's pieces has tokens of; both ends rise."""
        found = []
        for piece in self.plan.pieces_of(rank):
            first, count = self.documents[piece.row, piece.document]
            start = piece.position - piece.document
            last = start + piece.stop - piece.start - 1
            begin = max(0, (start - self.block) // self.stride + 1)
            found.append((first + begin, first + max(begin, min(count, last // self.stride + 1))))
        return found

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Pieces of each rank."""
        counts = []
        for rank in range(self.plan.placement.ranks):
            count = before = 0
            for begin, end in self._touched(rank):
                count += max(0, end - max(begin, before))
                before = max(before, end)
            counts.append(count)
        return tuple(counts)


class PieceTables(NamedTuple):
    """Which rows stand where; -1 is none."""

    tokens_NL: Tensor
    """Own token in each slot of own pieces."""
    slots_MR: Tensor
    """Slots of each own token, one for every block that it can be in."""
    pieces_UQ: Tensor
    """Pieces of each block, among those of all ranks."""
    places_N1: Tensor
    """Place of each piece in that."""


class _Lay(torch.autograd.Function):
    """Rows by number, zeros for -1; the gradient gathers too, so that nothing is added in turn."""

    @staticmethod
    def forward(ctx: Any, x_M: Tensor, number_N: Tensor, back_MR: Tensor) -> Tensor:
        ctx.save_for_backward(back_MR)
        return _rows(x_M, number_N)

    @staticmethod
    def backward(ctx: Any, dout_N: Tensor) -> Any:
        (back_MR,) = ctx.saved_tensors
        return _rows(dout_N, back_MR.flatten()).unflatten(0, back_MR.shape).sum(1), None, None


def lay(x_M: Tensor, number_N: Tensor, back_MR: Tensor) -> Tensor:
    """Rows of `x` by number, zeros for -1; `back` has for each row of `x` where it stands."""
    return _Lay.apply(x_M, number_N, back_MR)


def _rows(x_M: Tensor, number_N: Tensor) -> Tensor:
    if not len(x_M):
        return x_M.new_zeros(len(number_N), *x_M.shape[1:])
    rows = x_M.index_select(0, number_N.clamp(min=0))
    return rows.masked_fill((number_N < 0).view(-1, *(1,) * (rows.dim() - 1)), 0.0)


@torch.compiler.disable
def block_pieces(view: SequenceView, x_BTJD: Tensor, block: int, stride: int = 0) -> Tensor:
    """Own tokens in their blocks, `[N, block, J, D]`, zeros for those of other ranks."""
    tables = view.plan.once(_tables, block, stride or block, x_BTJD.device)
    rows = lay(x_BTJD.flatten(0, 1), tables.tokens_NL.flatten(), tables.slots_MR)
    return rows.unflatten(0, tables.tokens_NL.shape)


@torch.compiler.disable
def joined_pieces(view: SequenceView, x_ND: Tensor, block: int, stride: int = 0) -> Tensor:
    """What ranks made of their pieces, in at least fp32, `[U, Q, ...]` by block, zeros for none."""
    tables = view.plan.once(_tables, block, stride or block, x_ND.device)
    counts = view.plan.once(Blocks, block, stride or block).counts
    x_ND = wide(x_ND)
    if any(counts):
        x_ND = GatherParts.apply(x_ND, counts, view.wire(MEANS))
    rows = lay(x_ND, tables.pieces_UQ.flatten(), tables.places_N1)
    return rows.unflatten(0, tables.pieces_UQ.shape)


def block_sums(view: SequenceView, x_BTJD: Tensor, block: int) -> Tensor:
    """Sums over all whole blocks of all documents, `[U, J, D]`, in at least fp32."""
    dtype = torch.promote_types(x_BTJD.dtype, torch.float32)
    pieces_NJD = block_pieces(view, x_BTJD, block).sum(1, dtype=dtype)
    return joined_pieces(view, pieces_NJD, block).sum(1)


def block_sums_traffic(
    share: Share, block: int, elements: int, stride: int = 0, has_gradient: bool = True
) -> Expected:
    """Of pieces of so many elements: `(P - 1) n elements` of a state's width each way, n the
    largest number of pieces of a rank."""
    counts = piece_counts(share.placement, share.plan.documents, block, stride or block)
    received = (share.placement.ranks - 1) * max(counts) * elements * share.widths.state
    each = Traffic(int(any(counts)), received)
    return both_ways(MEANS, each, each if has_gradient else Traffic(0, 0))


@lru_cache(maxsize=32)
def piece_counts(
    placement: Placement, documents: Documents, block: int, stride: int
) -> tuple[int, ...]:
    """Pieces of each rank, for all ranks that ask."""
    each = [
        [rows * count for count in Blocks(Plan(placement, 0, (starts,)), block, stride).counts]
        for starts, rows in Counter(documents).items()
    ]
    return tuple(map(sum, zip(*each)))


def _tables(plan: Plan, block: int, stride: int, device: torch.device) -> PieceTables:
    blocks = plan.once(Blocks, block, stride)
    parts = *_own_slots(blocks), *_merged(blocks)
    return PieceTables(*(x.to(device) for x in parts))


def _own_slots(blocks: Blocks) -> tuple[Tensor, Tensor]:
    plan, block, stride = blocks.plan, blocks.block, blocks.stride
    lengths = torch.tensor([piece.stop - piece.start for piece in plan.pieces])
    known = torch.tensor([blocks.documents[p.row, p.document] for p in plan.pieces])
    first_M1, count_M1 = known.repeat_interleave(lengths, 0).split(1, 1)
    position_M1 = plan.positions_BT.flatten()[:, None]
    index_MR = position_M1 // stride - torch.arange(block // stride)
    numbers = blocks.of_rank(plan.rank)
    slots_MR = torch.searchsorted(numbers, first_M1 + index_MR) * block
    slots_MR += position_M1 - index_MR * stride
    slots_MR[(index_MR < 0) | (index_MR >= count_M1)] = -1
    tokens_NL = torch.full((len(numbers), block), -1)
    token, way = (slots_MR >= 0).nonzero().T
    tokens_NL.view(-1)[slots_MR[token, way]] = token
    return tokens_NL, slots_MR


def _merged(blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Pieces of all ranks by block, in order of ranks, and where each is."""
    numbers = torch.cat([blocks.of_rank(r) for r in range(blocks.plan.placement.ranks)])
    counts = numbers.bincount(minlength=blocks.total)
    most = int(counts.max()) if blocks.total else 1
    order = numbers.argsort(stable=True)
    behind = torch.arange(len(numbers)) - (counts.cumsum(0) - counts)[numbers[order]]
    places = torch.empty_like(numbers)
    places[order] = numbers[order] * most + behind
    pieces_UQ = torch.full((blocks.total, most), -1)
    pieces_UQ.view(-1)[places] = torch.arange(len(numbers))
    return pieces_UQ, places[:, None]
