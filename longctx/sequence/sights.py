"""Who sees whom among the tokens of a plan, as rising positions and expiries for the kernels.

A row, or a segment with its halo, has a range of positions of its own. Keys expire where their
document ends, or where they leave a window.
"""

from bisect import bisect_right
from collections.abc import Iterable

import torch
from longctx_kernels.lifetime_attention import Sight, flash_lifetime
from torch import Tensor

from longctx.sequence.halo import HaloPlan
from longctx.sequence.plan import Piece, Plan

LARGEST = 2**31 - 2


def block_sight(plan: Plan, source: int, device: torch.device) -> Sight:
    """Own queries and the keys of rank `source`."""
    length = plan.placement.length
    _check_positions(plan.rows * length)
    keys = plan.pieces_of(source)
    queries = _positions((p.row * length + p.position, p) for p in plan.pieces)
    positions = _positions((p.row * length + p.position, p) for p in keys)
    ends = torch.cat(
        [torch.full((p.stop - p.start,), p.row * length + _end(plan, p)) for p in keys]
    )
    return _sight(queries, positions, ends, device)


def halo_sight(plan: Plan, halo: HaloPlan, window: int, device: torch.device) -> Sight:
    """Own queries and the keys that a halo to the left brings together; foreign ones expire."""
    room = plan.placement.length + halo.left
    bases = {
        (row, segment): halo.left + (row * len(plan.segments) + segment) * room
        for row in range(plan.rows)
        for segment in range(len(plan.segments))
    }
    _check_positions(len(bases) * room)
    positions = torch.cat(
        [
            torch.arange(base + plan.segments[s].start - halo.left, base + plan.segments[s].stop)
            for (_, s), base in bases.items()
        ]
    )
    ends = positions.clone()
    for piece in plan.pieces:
        base, start = bases[piece.row, piece.segment], plan.segments[piece.segment].start
        own = halo.offset(piece.row, piece.segment) + piece.position - start
        before = min(piece.position - piece.document, halo.left) if piece.position == start else 0
        stop = own + piece.stop - piece.start
        ends[own - before : stop] = base + _end(plan, piece)
    queries = _positions((bases[p.row, p.segment] + p.position, p) for p in plan.pieces)
    return _sight(queries, positions, torch.minimum(ends, positions + window), device)


def with_persistent_keys(sight: Sight, count: int) -> Sight:
    """The same when `count` keys that every query sees come before the others."""
    if not count:
        return sight
    keys = sight.key_positions
    positions = torch.cat((keys.new_zeros(count), keys))
    assert sight.expiry is not None
    expiry = torch.cat((keys.new_full((count,), LARGEST), sight.expiry))
    return Sight(sight.query_positions, positions, expiry)


def attend_seen(q_MHK: Tensor, k_NJK: Tensor, v_NJV: Tensor, sight: Sight) -> Tensor:
    """Softmax attention by Triton's kernels over the keys in sight."""
    assert sight.expiry is not None
    out_1MHV, _ = flash_lifetime(
        *(q_MHK[None], k_NJK[None], v_NJV[None]),
        expiry=sight.expiry[None],
        query_positions=sight.query_positions[None],
        key_positions=sight.key_positions[None],
        backend="triton",
    )
    return out_1MHV[0]


def _end(plan: Plan, piece: Piece) -> int:
    """Position at which the piece's document ends."""
    starts = plan.documents[piece.row]
    following = bisect_right(starts, piece.document)
    return starts[following] if following < len(starts) else plan.placement.length


def _positions(starts: Iterable[tuple[int, Piece]]) -> Tensor:
    return torch.cat([torch.arange(first, first + p.stop - p.start) for first, p in starts])


def _sight(queries: Tensor, positions: Tensor, ends: Tensor, device: torch.device) -> Sight:
    queries, positions, ends = (x.to(device, torch.int32) for x in (queries, positions, ends))
    return Sight(queries, positions, ends)


def _check_positions(count: int) -> None:
    if count > LARGEST:
        raise ValueError(f"{count} positions in a batch are more than int32 holds: use fewer rows")
