"""Attention by a policy, over a sequence on one rank or many: what is seen elsewhere is fetched.

Keys lie in lanes, one for each row of the batch and, if key heads differ, each key head. A lane has
a range of coordinates of its own, in which a kernel sees lifetimes.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from longctx_kernels.blocklist import flash_blocklist
from longctx_kernels.lifetime_attention import flash_lifetime
from torch import Tensor

from longctx.sequence.expected import Expected, Share, Sizes, combined
from longctx.sequence.fetch import VERB, Routes, fetch, fetch_traffic
from longctx.sequence.plan import Plan
from longctx.sequence.policy import BlockPattern, Lifetime, Policy
from longctx.sequence.view import SequenceView

Operands = tuple[Tensor, Tensor, Tensor]
"""Queries `[B, T, H, K]`, keys `[B, T, J, K]` and values `[B, T, J, V]`."""
LARGEST = 2**31 - 2


class Scoring(NamedTuple):
    """What makes weights of `q . k`: fp32 biases by query head, slopes against distance."""

    normaliser: str = "softmax"
    key_bias_BTH: Tensor | None = None
    query_bias_BTH: Tensor | None = None
    slope_H: Tensor | None = None
    scale: float | None = None


class Lanes(NamedTuple):
    """Which items, in which order, make the keys of all lanes, and who sees them until when."""

    items_U: Tensor
    positions_U: Tensor
    expiry_U: Tensor
    queries_N: Tensor
    """Coordinates of own queries, lane by lane."""


class Tables(NamedTuple):
    """Tokens in blocks of their documents: numbers of own queries and of items, -1 for none."""

    queries_N: Tensor
    query_places_N: Tensor
    items_U: Tensor
    key_places_U: Tensor
    blocks_1ML: Tensor
    rows_M: Tensor
    """Where in `queries_N` each own token is."""


@torch.compiler.disable
def patterned_attention(
    view: SequenceView,
    operands: Operands,
    policy: Policy,
    scoring: Scoring = Scoring(),  # noqa: B008
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(out `[B, T, H, V]`, log-sum-exp `[B, T, H]`) over what the policy shows of each document."""
    routes = view.plan.once(Routes, policy)
    _, k_BTJK, v_BTJV = operands
    pairs_IJD = _fetched(view, torch.cat((k_BTJK, v_BTJV), -1), routes)
    bias = scoring.key_bias_BTH
    bias_IH = None if bias is None else _fetched(view, bias, routes)
    attend = _attend_blocks if isinstance(policy, BlockPattern) else _attend_lanes
    return attend(view.plan, (operands[0], pairs_IJD, bias_IH), policy, scoring, backend)


def patterned_traffic(share: Share, sizes: Sizes, policy: Policy, biased: bool = False) -> Expected:
    """Of keys and values that queries see on other ranks, and of key biases by query head."""
    pair = sizes.key_heads * (sizes.key_dim + sizes.value_dim) // policy.patterns
    parts = [fetch_traffic(share, policy, pair)]
    if biased:
        bias = sizes.heads // policy.patterns
        parts.append(fetch_traffic(share, policy, bias, is_state=True))
    return combined(parts)


def _fetched(view: SequenceView, x_BTHD: Tensor, routes: Routes) -> Tensor:
    """Items of own tokens, and those that arrive, `[I, H / patterns, ...]`."""
    by_pattern = x_BTHD.unflatten(2, (routes.policy.patterns, -1))
    return fetch(by_pattern.flatten(0, 2), routes, view.wire(VERB))


def _attend_lanes(plan: Plan, tensors: Any, policy: Any, scoring: Scoring, backend: str) -> Any:
    q_BTHK, pairs_IJD, bias_IH = tensors
    N = policy.patterns
    lanes = plan.once(_lanes, policy, q_BTHK.device)
    k_UJK, v_UJV = _chosen(pairs_IJD, lanes.items_U).split(
        (q_BTHK.shape[-1], pairs_IJD.shape[-1] - q_BTHK.shape[-1]), -1
    )
    query_bias = scoring.query_bias_BTH
    out, lse = _with_slopes(N, scoring.slope_H)(
        _to_lanes(q_BTHK, N),
        k_UJK[None],
        v_UJV[None],
        expiry=lanes.expiry_U[None],
        query_positions=lanes.queries_N[None],
        key_positions=lanes.positions_U[None],
        key_bias=None if bias_IH is None else _chosen(bias_IH, lanes.items_U)[None],
        query_bias=None if query_bias is None else _to_lanes(query_bias, N),
        normaliser=scoring.normaliser,
        scale=scoring.scale,
        backend=backend,
    )
    shape = q_BTHK.shape[:2]
    return _from_lanes(out[0], N, shape), _from_lanes(lse[0], N, shape)


def _with_slopes(patterns: int, slope_H: Tensor | None) -> Any:
    if slope_H is None:
        return flash_lifetime
    if patterns > 1:
        raise ValueError("slopes need a policy that is the same for all heads")
    return partial(flash_lifetime, slope=slope_H)


def _to_lanes(x_BTHK: Tensor, patterns: int) -> Tensor:
    """`[1, patterns * B * T, H / patterns, ...]`."""
    return x_BTHK.unflatten(2, (patterns, -1)).movedim(2, 0).flatten(0, 2)[None]


def _from_lanes(y_NHV: Tensor, patterns: int, shape: torch.Size) -> Tensor:
    return y_NHV.unflatten(0, (patterns, *shape)).movedim(0, 2).flatten(2, 3)


def _chosen(items: Tensor, number: Tensor) -> Tensor:
    return items.index_select(0, number)


def document_bounds(plan: Plan, row: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Where the documents of tokens at these positions of rows start and end."""
    edges = torch.cat(
        [
            torch.tensor(starts) + index * plan.placement.length
            for index, starts in enumerate(plan.documents)
        ]
    )
    place = row * plan.placement.length + position
    following = torch.searchsorted(edges, place, right=True)
    stops = torch.cat((edges[1:], torch.tensor([plan.rows * plan.placement.length])))
    base = row * plan.placement.length
    return edges[following - 1] - base, stops[following - 1] - base


def _lanes(plan: Plan, policy: Lifetime, device: torch.device) -> Lanes:
    length, patterns = plan.placement.length, policy.patterns
    if patterns * plan.rows * length > LARGEST:
        raise ValueError("more positions in all heads than int32 holds: use fewer rows")
    pattern, row, position = plan.once(Routes, policy).places
    start, stop = document_bounds(plan, row, position)
    expiry = policy.expiry(position - start).gather(0, pattern[None])[0]
    base = (pattern * plan.rows + row) * length
    order = (base + position).argsort()
    ends = base + torch.minimum(stop, start + expiry)
    own = plan.rows * plan.length * patterns
    queries = (base + position)[:own].view(-1, patterns).T.flatten()
    parts = order, (base + position)[order], ends[order], queries
    return Lanes(parts[0].to(device), *(x.to(device, torch.int32) for x in parts[1:]))


def _attend_blocks(plan: Plan, tensors: Any, policy: Any, scoring: Scoring, backend: str) -> Any:
    q_BTHK, pairs_IJD, bias_IH = tensors
    tables = plan.once(_tables, policy, q_BTHK.device)
    k_UJK, v_UJV = _or_zeros(pairs_IJD, tables.items_U).split(
        (q_BTHK.shape[-1], pairs_IJD.shape[-1] - q_BTHK.shape[-1]), -1
    )
    query_bias = scoring.query_bias_BTH
    if scoring.slope_H is not None:
        raise ValueError("slopes need a policy of lifetimes")
    out, lse = flash_blocklist(
        _or_zeros(q_BTHK.flatten(0, 1), tables.queries_N)[None],
        k_UJK[None],
        v_UJV[None],
        tables.blocks_1ML,
        policy.block,
        expiry=torch.where(tables.items_U < 0, 0, LARGEST).int()[None],
        query_positions=tables.query_places_N[None],
        key_positions=tables.key_places_U[None],
        key_bias=None if bias_IH is None else _or_zeros(bias_IH, tables.items_U)[None],
        query_bias=None
        if query_bias is None
        else _or_zeros(query_bias.flatten(0, 1), tables.queries_N)[None],
        normaliser=scoring.normaliser,
        scale=scoring.scale,
        backend=backend,
    )
    shape = q_BTHK.shape[:2]
    return tuple(x[0].index_select(0, tables.rows_M).unflatten(0, shape) for x in (out, lse))


def _or_zeros(x_M: Tensor, number_N: Tensor) -> Tensor:
    """Rows by number, zeros for -1."""
    rows = x_M.index_select(0, number_N.clamp(min=0))
    return rows.masked_fill((number_N < 0).view(-1, *(1,) * (rows.dim() - 1)), 0.0)


def _tables(plan: Plan, policy: BlockPattern, device: torch.device) -> Tables:
    block, own = policy.block, plan.rows * plan.length
    _, row, position = plan.once(Routes, policy).places
    places = block_places(plan, block, row, position)
    query_blocks = (places[:own] // block).unique()
    first = block_places(plan, block, *_first_of_documents(plan)) // block
    document = first[torch.searchsorted(first, query_blocks, right=True) - 1]
    lists = [
        [start + n for n in policy.blocks_of(number - start)]
        for number, start in zip(query_blocks.tolist(), document.tolist())
    ]
    longest = max(map(len, lists))
    listed = torch.tensor([found + [-1] * (longest - len(found)) for found in lists])
    key_blocks = listed.unique()
    key_blocks = key_blocks[key_blocks >= 0]
    blocks = torch.where(listed < 0, -1, torch.searchsorted(key_blocks, listed))
    query_places, queries = _in_blocks(query_blocks, block, places[:own])
    key_places, items = _in_blocks(key_blocks, block, places)
    rows = torch.empty(own, dtype=torch.int64)
    rows[queries[queries >= 0]] = (queries >= 0).nonzero()[:, 0]
    parts = queries, query_places.int(), items, key_places.int(), blocks.int()[None], rows
    return Tables(*(x.to(device) for x in parts))


def block_places(plan: Plan, block: int, row: Tensor, position: Tensor) -> Tensor:
    """Coordinates of tokens such that every document starts with a new block."""
    starts, sizes = [], []
    for index, documents in enumerate(plan.documents):
        stops = (*documents[1:], plan.placement.length)
        starts += [index * plan.placement.length + start for start in documents]
        sizes += [-(-(stop - start) // block) * block for start, stop in zip(documents, stops)]
    bases = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    if int(bases[-1]) + sizes[-1] > LARGEST:
        raise ValueError("more positions in a batch than int32 holds: use fewer rows")
    edges, place = torch.tensor(starts), row * plan.placement.length + position
    document = torch.searchsorted(edges, place, right=True) - 1
    return bases[document] + place - edges[document]


def _first_of_documents(plan: Plan) -> tuple[Tensor, Tensor]:
    pairs = [(row, start) for row, starts in enumerate(plan.documents) for start in starts]
    row, start = torch.tensor(pairs).T
    return row, start


def _in_blocks(blocks: Tensor, block: int, places: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates of the tokens of these blocks, and which of `places` each is, or -1."""
    coordinates = (blocks[:, None] * block + torch.arange(block)).flatten()
    order = places.argsort()
    at = torch.searchsorted(places[order], coordinates).clamp(max=len(places) - 1)
    found = order[at]
    return coordinates, torch.where(places[found] == coordinates, found, -1)
