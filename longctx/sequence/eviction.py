"""How long keys that compete may be seen, and where their segments lie."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from longctx.sequence.fetch import Routes
from longctx.sequence.patterned import document_bounds
from longctx.sequence.plan import Plan
from longctx.sequence.policy import Window


@dataclass(frozen=True)
class Eviction:
    """Keys are seen for `window` tokens, and while they are among the `capacity` best."""

    capacity: int
    window: int
    delay: int = 0
    later_wins: bool = False
    """Which of two keys with the same score is the better."""
    biased: bool = False
    """Whether the score is added to what queries score, too."""

    @property
    def left(self) -> int:
        """Tokens before a segment that it needs."""
        return max(self.window - 1, self.delay)

    @property
    def policy(self) -> Window:
        """Who sees whom for sure."""
        return Window(self.left + 1)


class Keys(NamedTuple):
    """Of lanes `[L, J]`: keys with values, their scores and positions; -inf is no key."""

    pairs_LJUD: Tensor
    score_LJU: Tensor
    position_LJU: Tensor

    def chosen(self, index_LJE: Tensor) -> "Keys":
        """Some of each lane."""
        pairs = self.pairs_LJUD.take_along_dim(index_LJE[..., None], 2)
        rest = (x.take_along_dim(index_LJE, 2) for x in self[1:])
        return Keys(pairs, *rest)


class Layout(NamedTuple):
    """The part of a plan's segments, or of a sequence that goes on, that is worked on.

    Lane l is a segment of a row; slot u of it stands for the position `first + u`.
    """

    first_L: Tensor
    valid_LU: Tensor
    stop_LU: Tensor
    """Slot at which the document of a slot ends."""
    arrives_LT: Tensor
    """Whether a key starts to compete at an own token."""
    groups_LT: Tensor
    """Own token at which the document of each starts, 0 if it went on from before."""
    is_last_LT: Tensor
    """Whether a token is of the segment's last document."""


def best_of(score_LJU: Tensor, count: int, later_wins: bool) -> Tensor:
    """Where the best are, `[L, J, count]` or all, in rising order."""
    U = score_LJU.shape[-1]
    score = score_LJU.detach()
    if later_wins:
        score = score.flip(-1)
    best = score.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return (U - 1 - best if later_wins else best).sort(-1).values


def longest(plan: Plan) -> int:
    """Tokens of the longest segment of all ranks."""
    return max(segment.length for own in plan.placement.segments for segment in own)


def comes_from(plan: Plan) -> Tensor:
    """Whether what survives a segment, in order, reaches an own one: `[own, all, rows]`."""
    placement = plan.placement
    segments = [placement.segments[rank][index] for rank, index in placement.order]
    return torch.tensor(
        [
            [
                [
                    plan.continues(row, own)
                    and other.start < own.start
                    and not any(other.stop <= start <= own.start for start in starts)
                    for row, starts in enumerate(plan.documents)
                ]
                for other in segments
            ]
            for own in plan.segments
        ]
    )


def laid_out(
    plan: Plan, eviction: Eviction, device: torch.device
) -> tuple[Layout, Tensor, Tensor, Tensor]:
    """The layout; items of slots and numbers of own tokens, -1 for none; where tokens went."""
    left, tokens = eviction.left, longest(plan)
    pairs = [(s, row) for s in range(len(plan.segments)) for row in range(plan.rows)]
    segment_L, row_L = torch.tensor(pairs).T
    start_L, stop_L = (torch.tensor([s[i] for s in plan.segments])[segment_L] for i in (0, 1))
    position_LU = start_L[:, None] - left + torch.arange(left + tokens)
    tokens_LT = position_LU[:, left:]
    row_LU = row_L[:, None].expand(position_LU.shape)
    begins, ends = document_bounds(plan, row_LU, position_LU.clamp(0, plan.placement.length - 1))
    inside_LT = tokens_LT < stop_L[:, None]
    first_document = begins[:, left : left + 1]
    is_own_LU = (position_LU >= start_L[:, None]) & (position_LU < stop_L[:, None])
    is_before = (position_LU < start_L[:, None]) & (position_LU >= first_document)
    valid_LU = is_own_LU | (is_before & (begins == first_document))
    groups_LT = (begins[:, left:] - start_L[:, None]).clamp(min=0)
    groups_LT = torch.where(inside_LT, groups_LT, 0).cummax(-1).values
    last_L = stop_L - start_L - 1
    last_document = begins[:, left:].gather(1, last_L[:, None])
    layout = Layout(
        position_LU[:, 0],
        valid_LU,
        torch.where(valid_LU, ends - position_LU[:, :1], 0),
        inside_LT & (tokens_LT - eviction.delay >= begins[:, left:]),
        groups_LT,
        begins[:, left:] == last_document,
    )
    _, row, position = plan.once(Routes, eviction.policy).places
    items_LU = _numbers(row * plan.placement.length + position, plan, row_LU, position_LU)
    own = plan.rows * plan.length
    place = (row * plan.placement.length + position)[:own]
    queries_LT = _numbers(place, plan, row_LU[:, left:], tokens_LT)
    queries_LT = torch.where(inside_LT, queries_LT, -1)
    rows_M = torch.empty(own, dtype=torch.int64)
    rows_M[queries_LT[queries_LT >= 0]] = (queries_LT.flatten() >= 0).nonzero()[:, 0]
    layout = Layout(*(x.to(device) for x in layout))
    return layout, items_LU.to(device), queries_LT.to(device), rows_M.to(device)


def _numbers(place_I: Tensor, plan: Plan, row: Tensor, position: Tensor) -> Tensor:
    """Which of the tokens at `place_I` each is, -1 for those that are not among them."""
    order = place_I.argsort()
    inside = (position >= 0) & (position < plan.placement.length)
    wanted = row * plan.placement.length + position
    at = torch.searchsorted(place_I[order], wanted).clamp(max=len(place_I) - 1)
    found = order[at]
    return torch.where(inside & (place_I[found] == wanted), found, -1)
