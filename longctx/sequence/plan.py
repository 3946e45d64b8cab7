"""What one rank must know about a batch, worked out on the host once."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from longctx.sequence.placement import Placement, Segment

Made = TypeVar("Made")

Documents = tuple[tuple[int, ...], ...]
"""For every row of the batch the positions at which its documents start, rising from 0."""


class Piece(NamedTuple):
    """The part of one document in one segment of one row: local tokens `start..stop`."""

    row: int
    segment: int
    start: int
    stop: int
    position: int
    document: int
    """Position at which its document starts; earlier than `position` if it goes on from there."""


@dataclass(frozen=True)
class Plan:
    """A batch as rank `rank` of a placement holds it: rows end to end, segments rising in each."""

    placement: Placement
    rank: int
    documents: Documents
    _made: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def rows(self) -> int:
        """Sequences of the batch."""
        return len(self.documents)

    @property
    def length(self) -> int:
        """Tokens of a row on this rank."""
        return self.placement.lengths[self.rank]

    @property
    def segments(self) -> tuple[Segment, ...]:
        """This rank's segments."""
        return self.placement.segments[self.rank]

    def pieces_of(self, rank: int) -> tuple[Piece, ...]:
        """All pieces of a rank, in the order of its local tokens."""
        return self.once(Plan._cut, rank)

    def _cut(self, rank: int) -> tuple[Piece, ...]:
        pieces, local = [], 0
        for row, starts in enumerate(self.documents):
            for index, segment in enumerate(self.placement.segments[rank]):
                inner = [s for s in starts if segment.start < s < segment.stop]
                document = max(s for s in starts if s <= segment.start)
                edges = [segment.start, *inner, segment.stop]
                for begin, end in zip(edges, edges[1:]):
                    if begin != segment.start:
                        document = begin
                    stop = local + end - begin
                    pieces.append(Piece(row, index, local, stop, begin, document))
                    local = stop
        return tuple(pieces)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """This rank's pieces."""
        return self.pieces_of(self.rank)

    @cached_property
    def cuts(self) -> tuple[int, ...]:
        """Edges of the pieces in the local tokens laid end to end."""
        return (0, *(piece.stop for piece in self.pieces))

    @cached_property
    def positions_BT(self) -> Tensor:
        """Position of every local token within its document."""
        parts = [
            torch.arange(p.position - p.document, p.position - p.document + p.stop - p.start)
            for p in self.pieces
        ]
        return torch.cat(parts).view(self.rows, self.length)

    @cached_property
    def token_ids_BT(self) -> Tensor:
        """Position of every local token within the whole sequence."""
        parts = [torch.arange(s.start, s.stop) for s in self.segments]
        return torch.cat(parts).expand(self.rows, -1)

    def once(self, make: Callable[..., Made], *arguments: Any) -> Made:
        """`make(self, *arguments)`, worked out once for all layers of a batch."""
        key = (make, arguments)
        if key not in self._made:
            self._made[key] = make(self, *arguments)
        return self._made[key]

    def continues(self, row: int, segment: Segment) -> bool:
        """Whether the first token of a segment goes on with the document before it."""
        return segment.start not in self.documents[row] and segment.start > 0

    def goes_on(self, row: int, segment: Segment) -> bool:
        """Whether the last document of a segment goes on in the next one."""
        return segment.stop not in self.documents[row] and segment.stop < self.placement.length

    def resets(self, row: int, segment: Segment) -> bool:
        """Whether a document starts in a segment, so that nothing from before it gets through."""
        return any(segment.start <= s < segment.stop for s in self.documents[row])


def document_starts(documents_BT: Tensor) -> Documents:
    """Starts of documents from an id per token of whole rows."""
    changes_BT = documents_BT[:, 1:] != documents_BT[:, :-1]
    return tuple((0, *(row.nonzero()[:, 0] + 1).tolist()) for row in changes_BT)
