"""Tokens of other ranks that a policy wants: each travels once, straight to who sees it."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from longctx.sequence.expected import Expected, Share, both_ways
from longctx.sequence.ledger import Traffic
from longctx.sequence.placement import Segment
from longctx.sequence.plan import Documents, Plan
from longctx.sequence.policy import Lifetime, Policy
from longctx.sequence.verbs import Wire

VERB = "fetch"


@dataclass(frozen=True)
class Routes:
    """What travels between ranks: of N patterns of a policy, item `m * N + n` is token m for the
    heads of pattern n, m counted over the rows of the rank that holds it."""

    plan: Plan
    policy: Policy

    @cached_property
    def arriving(self) -> dict[int, Tensor]:
        """By rank that holds them: its items that this rank's queries see."""
        return self._routes([(rank, self.plan.rank) for rank in range(self.plan.placement.ranks)])

    @cached_property
    def leaving(self) -> dict[int, Tensor]:
        """By rank whose queries see them: items of this rank."""
        ranks = range(self.plan.placement.ranks)
        return self._routes([(self.plan.rank, rank) for rank in ranks])

    def leaving_on(self, device: torch.device) -> dict[int, Tensor]:
        """`leaving` as indices on a device, moved there once for all layers."""
        return self.plan.once(_leaving_on, self.policy, device)

    def _routes(self, pairs: list[tuple[int, int]]) -> dict[int, Tensor]:
        me, found = self.plan.rank, {}
        for owner, asker in pairs:
            items = _items(self.plan, self.policy, owner, asker)
            if owner != asker and len(items):
                found[asker if owner == me else owner] = items
        return found

    @cached_property
    def places(self) -> Tensor:
        """Pattern, row and position of own items, then of all that arrive, `[3, I]`."""
        parts = [self._places_of(self.plan.rank, None)]
        parts += [self._places_of(rank, items) for rank, items in self.arriving.items()]
        return torch.cat(parts, 1)

    def _places_of(self, rank: int, items: Tensor | None) -> Tensor:
        placement, patterns = self.plan.placement, self.policy.patterns
        positions = torch.cat([torch.arange(s.start, s.stop) for s in placement.segments[rank]])
        if items is None:
            items = torch.arange(self.plan.rows * len(positions) * patterns)
        token = items // patterns
        row, local = token // len(positions), token % len(positions)
        return torch.stack((items % patterns, row, positions[local]))


def _leaving_on(plan: Plan, policy: Policy, device: torch.device) -> dict[int, Tensor]:
    leaving = plan.once(Routes, policy).leaving
    return {rank: items.to(device) for rank, items in leaving.items()}


def _items(plan: Plan, policy: Policy, owner: int, asker: int) -> Tensor:
    """Items of `owner` that queries of `asker` see."""
    held = plan.placement.segments[owner]
    wanted = _wanted(plan.placement.segments[asker], plan.placement.length, plan.documents, policy)
    parts = torch.cat([wanted[:, s.start : s.stop] for s in held], 1)
    return parts.flatten().nonzero()[:, 0]


@lru_cache(maxsize=512)
def _wanted(
    segments: tuple[Segment, ...], length: int, documents: Documents, policy: Policy
) -> Tensor:
    """`[rows, length, patterns]`: what queries in these segments see outside of them."""
    wanted = torch.zeros(len(documents), length, policy.patterns, dtype=torch.bool)
    for row, starts in enumerate(documents):
        for segment in segments:
            # Only the document that goes on from before a segment sees anything outside of it.
            document = max(s for s in starts if s <= segment.start)
            inner = [s for s in starts if segment.start < s < segment.stop]
            stop = min(inner, default=segment.stop)
            seen = policy.wanted(segment.start - document, stop - document)
            wanted[row, document : segment.start] |= seen.T
        for segment in segments:
            wanted[row, segment.start : segment.stop] = False
    return wanted


class Fetch(torch.autograd.Function):
    """Items `[I, ...]` and, after them, those that arrive; gradients go home and are added."""

    @staticmethod
    def forward(ctx: Any, items: Tensor, routes: Routes, wire: Wire) -> Tensor:
        ctx.routes, ctx.wire, ctx.count = routes, wire, len(items)
        sends = [(r, items[i]) for r, i in routes.leaving_on(items.device).items()]
        wires = [(r, (len(i), *items.shape[1:])) for r, i in routes.arriving.items()]
        pending = wire.communicator.exchange(sends, wires, items, wire.label)
        return torch.cat([items, *pending.wait()])

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        routes, wire = ctx.routes, ctx.wire
        wide = dout.to(torch.promote_types(dout.dtype, torch.float32))
        ditems = wide[: ctx.count].clone()
        counts = [len(i) for i in routes.arriving.values()]
        parts = wide[ctx.count :].split(counts)
        sends = list(zip(routes.arriving, parts))
        wires = [(r, (len(i), *dout.shape[1:])) for r, i in routes.leaving.items()]
        pending = wire.communicator.exchange(sends, wires, wide, wire.label.reversed())
        for items, part in zip(routes.leaving_on(ditems.device).values(), pending.wait()):
            ditems.index_add_(0, items, part)
        return ditems.to(dout.dtype), None, None


def fetch(items: Tensor, routes: Routes, wire: Wire) -> Tensor:
    """Items and what arrives; `routes.places` says where they belong."""
    return Fetch.apply(items, routes, wire)


def fetch_traffic(share: Share, policy: Policy, item: int, is_state: bool = False) -> Expected:
    """Of items of so many elements, in the precision of activations or of states.

    Forward what a rank's queries see elsewhere arrives, backward the gradients of what others saw.
    """
    activation, state = share.widths
    arriving, leaving = (count * item for count in counted(share.plan, policy))
    calls = int(arriving + leaving > 0)
    width = state if is_state else activation
    return both_ways(VERB, Traffic(calls, arriving * width), Traffic(calls, leaving * state))


def counted(plan: Plan, policy: Policy) -> tuple[int, int]:
    """Items that arrive and that leave, for lifetimes without looking at every pair of ranks."""
    if not isinstance(policy, Lifetime):
        routes = plan.once(Routes, policy)
        ways = routes.arriving.values(), routes.leaving.values()
        arriving, leaving = (sum(map(len, way)) for way in ways)
        return arriving, leaving
    documents = Counter(plan.documents).items()
    leaving = sum(rows * _leaving(plan, policy, starts) for starts, rows in documents)
    return arriving_items(plan, policy), leaving


def arriving_items(plan: Plan, policy: Lifetime) -> int:
    """Items of other ranks that this rank's queries see."""
    documents = Counter(plan.documents).items()
    return sum(rows * _arriving(plan, policy, starts) for starts, rows in documents)


def _arriving(plan: Plan, policy: Lifetime, starts: tuple[int, ...]) -> int:
    """What a later segment sees from before an earlier own one, that one sees too."""
    found = before = 0
    for segment in plan.segments:
        document = max(s for s in starts if s <= segment.start)
        low = max(before, document)
        if low < segment.start:
            found += policy.lasting(low - document, segment.start - document)
        before = segment.stop
    return found


def _leaving(plan: Plan, policy: Lifetime, starts: tuple[int, ...]) -> int:
    """To every rank whose first segment after an own one still sees a token, or its document."""
    found, length = 0, plan.placement.length
    for segment in plan.segments:
        askers = plan.once(_first_after, segment.stop)
        inner = [s for s in starts if segment.start < s < segment.stop]
        edges = [segment.start, *inner, segment.stop]
        for low, high in zip(edges, edges[1:]):
            document = max(s for s in starts if s <= low)
            stop = min((s for s in starts if s > document), default=length)
            later = askers[askers < stop] - document
            found += policy.outliving(low - document, high - document, later)
    return found


def _first_after(plan: Plan, stop: int) -> Tensor:
    """Where the first segment from `stop` on of each other rank that has one starts, rising."""
    firsts: dict[int, int] = {}
    for rank, index in plan.placement.order:
        start = plan.placement.segments[rank][index].start
        if start >= stop and rank != plan.rank:
            firsts.setdefault(rank, start)
    return torch.tensor(sorted(firsts.values()), dtype=torch.int64)
