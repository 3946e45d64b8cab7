"""Which tokens lanes take: the first that come in each group of tokens, or the best of documents.

How many a rank takes at most follows from the plan.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from longctx.sequence.expected import Expected, Share, Widths, halo_traffic
from longctx.sequence.ledger import Traffic
from longctx.sequence.local import ContinuedView
from longctx.sequence.plan import Plan
from longctx.sequence.view import SequenceView

VERB = "select"
CANDIDATE_BYTES = 16


class Rule(ABC):
    """Which tokens lanes take, and how many slots that needs at most."""

    @abstractmethod
    def taken(self, view: SequenceView, wish_BTL: Tensor) -> Tensor:
        """Which tokens each lane takes, given what it wishes for."""

    @abstractmethod
    def up_to(self, count: Tensor) -> Tensor:
        """Slots of a lane for documents of so many tokens."""

    @abstractmethod
    def slots(self, plan: Plan, rank: int) -> int:
        """Slots of a lane on a rank."""

    @abstractmethod
    def traffic(self, share: Share, lanes: int) -> Expected:
        """Of `taken`."""

    def added(self, contexts_M: Tensor) -> Tensor:
        """Slots that each token adds to its document's, which has so many tokens up to it."""
        return self.up_to(contexts_M) - self.up_to(contexts_M - 1)

    def pairs(self, contexts_M: Tensor) -> int:
        """Of a slot that these tokens add and one of its document up to it, itself included."""
        return int((self.up_to(contexts_M) * self.added(contexts_M)).sum())

    def counts(self, view: SequenceView) -> tuple[int, ...]:
        """Slots of a lane on each rank."""
        return view.plan.once(slot_counts, self)


def slot_counts(plan: Plan, rule: Rule) -> tuple[int, ...]:
    """Slots of a lane on each rank."""
    return tuple(rule.slots(plan, rank) for rank in range(plan.placement.ranks))


@dataclass(frozen=True)
class FirstCome(Rule):
    """Of `group` tokens, counted from the start of a document, a lane takes the first `most` that
    it wishes for."""

    group: int
    most: int

    def taken(self, view: SequenceView, wish_BTL: Tensor) -> Tensor:
        left, parts, start = self.group - 1, [], 0
        for wide in view.halo(wish_BTL.to(torch.uint8), left):
            length = wide.shape[1] - left
            before = wide.cumsum(1, dtype=torch.int32) - wide
            age_BT = view.positions_BT[:, start : start + length] % self.group
            first = torch.arange(left, left + length, device=wide.device) - age_BT
            first = first[..., None].expand(-1, -1, wide.shape[2])
            parts.append(before[:, left:] - before.gather(1, first))
            start += length
        return wish_BTL & (torch.cat(parts, 1) < self.most)

    def up_to(self, count: Tensor) -> Tensor:
        return count // self.group * self.most + (count % self.group).clamp(max=self.most)

    def slots(self, plan: Plan, rank: int) -> int:
        return sum(
            self._between(p.position - p.document, p.position - p.document + p.stop - p.start)
            for p in plan.pieces_of(rank)
        )

    def _between(self, start: int, stop: int) -> int:
        first, last = start // self.group, (stop - 1) // self.group
        if first == last:
            return min(self.most, stop - start)
        ends = (first + 1) * self.group - start, stop - last * self.group
        return (last - first - 1) * self.most + sum(min(self.most, n) for n in ends)

    def counts(self, view: SequenceView) -> tuple[int, ...]:
        if not isinstance(view, ContinuedView):
            return super().counts(view)
        # Wherever in a group the first of the tokens is.
        tokens = view.plan.length
        return (view.plan.rows * min(tokens, (tokens // self.group + 2) * self.most),)

    def traffic(self, share: Share, lanes: int) -> Expected:
        """A byte for each wish in the halo, which has no gradient."""
        halo = halo_traffic(replace(share, widths=Widths(1, 1)), self.group - 1, lanes)
        return {key: traffic for key, traffic in halo.items() if key == ("halo", False)}


@dataclass(frozen=True)
class Best(Rule):
    """Of every document a lane takes the best 1 in `sparsity`, and two at least; earlier tokens win
    ties. Wishes are scores, and what is taken depends on tokens to come."""

    sparsity: int

    def taken(self, view: SequenceView, wish_BTL: Tensor) -> Tensor:
        plan, wire = view.plan, view.wire(VERB)
        contest = plan.once(_contest, self, wish_BTL.device)
        score_LM = wish_BTL.detach().flatten(0, 1).T
        order_LM = _by_document(score_LM, contest.document_M.expand(score_LM.shape))
        token_LN = order_LM[:, contest.candidates_N]
        place_LM = plan.once(places, wish_BTL.device).expand(score_LM.shape)
        message = torch.stack((score_LM.double(), place_LM.double()), -1)
        message = message.gather(1, token_LN[..., None].expand(-1, -1, 2))
        counts = self.counts(view)
        shapes = [(len(message), n, 2) for n in counts]
        parts = wire.communicator.all_gather(message, wire.label, shapes).wait()
        score_LA, place_LA = torch.cat(parts, 1).unbind(-1)
        by_place = place_LA.argsort(1)
        document_LA = contest.document_A.expand(score_LA.shape)
        best = _by_document(score_LA.gather(1, by_place), document_LA.gather(1, by_place))
        best = by_place.gather(1, best)[:, contest.winners]
        won_LA = torch.zeros_like(score_LA, dtype=torch.bool).scatter(1, best, True)
        won_LN = won_LA.split(counts, 1)[plan.rank]
        taken_LM = torch.zeros_like(score_LM, dtype=torch.bool).scatter(1, token_LN, won_LN)
        return taken_LM.T.unflatten(0, wish_BTL.shape[:2])

    def up_to(self, count: Tensor) -> Tensor:
        return torch.minimum(count, (count // self.sparsity).clamp(min=2))

    def slots(self, plan: Plan, rank: int) -> int:
        return sum(n for _, _, n in _entries(plan, rank, self))

    def of_document(self, length: int) -> int:
        """Tokens that a lane takes of a document."""
        return min(length, max(2, length // self.sparsity))

    def traffic(self, share: Share, lanes: int) -> Expected:
        """Candidates of every rank: its own best of each document, no more than are taken."""
        received = (share.placement.ranks - 1) * max(slot_counts(share.plan, self)) * lanes
        return {(VERB, False): Traffic(1, received * CANDIDATE_BYTES)}


class Contest(NamedTuple):
    """Documents of own tokens and of all candidates, places in order of own candidates and of
    those that are taken."""

    document_M: Tensor
    candidates_N: Tensor
    document_A: Tensor
    winners: Tensor


def _entries(plan: Plan, rank: int, rule: Best) -> list[tuple[int, int, int]]:
    """(document, own tokens, candidates) of each document of a rank, in order."""
    tokens: dict[tuple[int, int], int] = {}
    for p in plan.pieces_of(rank):
        key = p.row, p.document
        tokens[key] = tokens.get(key, 0) + p.stop - p.start
    found = []
    for number, (key, length) in enumerate(_documents(plan)):
        if key in tokens:
            found.append((number, tokens[key], min(tokens[key], rule.of_document(length))))
    return found


def _documents(plan: Plan) -> list[tuple[tuple[int, int], int]]:
    """((row, start), length) of all documents."""
    return [
        ((row, start), stop - start)
        for row, starts in enumerate(plan.documents)
        for start, stop in zip(starts, (*starts[1:], plan.placement.length))
    ]


def _contest(plan: Plan, rule: Best, device: torch.device) -> Contest:
    numbers = {key: number for number, (key, _) in enumerate(_documents(plan))}
    pieces = [(numbers[p.row, p.document], p.stop - p.start) for p in plan.pieces]
    document_M = torch.cat([torch.full((n,), number) for number, n in pieces])
    own = [(n, chosen) for _, n, chosen in _entries(plan, plan.rank, rule)]
    entries = [e for rank in range(plan.placement.ranks) for e in _entries(plan, rank, rule)]
    document_A = torch.cat([torch.full((chosen,), number) for number, _, chosen in entries])
    sizes = torch.bincount(document_A).tolist()
    taken = [rule.of_document(length) for _, length in _documents(plan)]
    tables = document_M, _firsts(own), document_A, _firsts(list(zip(sizes, taken)))
    return Contest(*(x.to(device) for x in tables))


def _firsts(runs: list[tuple[int, int]]) -> Tensor:
    """Of runs of such lengths, laid end to end, so many of each from its start."""
    parts, start = [], 0
    for length, count in runs:
        parts.append(torch.arange(start, start + count))
        start += length
    return torch.cat(parts)


def _by_document(score_LM: Tensor, document_LM: Tensor) -> Tensor:
    """Order by documents, and in each from the best to the worst, earlier ones first at a tie."""
    by_score = score_LM.sort(dim=1, descending=True, stable=True).indices
    by_document = document_LM.gather(1, by_score).sort(dim=1, stable=True).indices
    return by_score.gather(1, by_document)


def places(plan: Plan, device: torch.device) -> Tensor:
    """Of own tokens among the tokens of all rows end to end, int32."""
    rows = torch.arange(plan.rows)[:, None] * plan.placement.length
    return (rows + plan.token_ids_BT).flatten().to(device, torch.int32)
