"""Tokens that lanes select, and attention of a lane's tokens among themselves.

A lane is a head, or a cluster of one. What it selects lies in slots, in order of positions; how
many a rank has follows from the plan, so that what travels does too. A slot may stay empty: it
sees nothing and nothing sees it.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from longctx_kernels.keeping import recalled
from longctx_kernels.lifetime_attention import flash_lifetime
from longctx_kernels.lifetime_torch import QUERY_TILE
from torch import Tensor

from longctx.sequence.expected import Expected, Share, combined
from longctx.sequence.ledger import Traffic
from longctx.sequence.patterned import LARGEST
from longctx.sequence.plan import Plan
from longctx.sequence.selection_rules import VERB, Rule, places, slot_counts
from longctx.sequence.verbs import Wire
from longctx.sequence.view import SequenceView

PLACE_BYTES = 4
DISTANCES = 24
"""Classes of distances, by powers of two."""


class Selection(NamedTuple):
    """Slots of lanes. Places count tokens of all rows end to end; those of empty slots lie behind,
    so that they rise all the same."""

    index_LE: Tensor
    """Local token, rows end to end, of each own slot; -1 for none."""
    place_LE: Tensor
    order_LU: Tensor
    """Slots of all ranks in order of their places."""
    key_place_LU: Tensor
    expiry_LU: Tensor
    """Where the document of each ends; 0 for none."""
    counts: tuple[int, ...]


@torch.compiler.disable
def select(view: SequenceView, wish_BTL: Tensor, rule: Rule) -> Selection:
    """What lanes take of what they wish for, on all ranks."""
    return recalled(lambda: _selected(view, wish_BTL, rule))


def _selected(view: SequenceView, wish_BTL: Tensor, rule: Rule) -> Selection:
    plan, wire, counts = view.plan, view.wire(VERB), rule.counts(view)
    own, total = counts[plan.rank], plan.rows * plan.placement.length
    index_LE = _packed(rule.taken(view, wish_BTL).flatten(0, 1).T, own)
    place_M = plan.once(places, wish_BTL.device)
    place_LE = place_M[index_LE.clamp(min=0)].masked_fill(index_LE < 0, total)
    shapes = [(len(place_LE), n) for n in counts]
    parts = wire.communicator.all_gather(place_LE, wire.label, shapes).wait()
    place_LU, order_LU = torch.cat(parts, 1).sort(dim=1, stable=True)
    edges = plan.once(_edges, wish_BTL.device)
    following = torch.searchsorted(edges, place_LU, right=True).clamp(max=len(edges) - 1)
    expiry_LU = edges[following].masked_fill(place_LU >= total, 0)
    place_LE, place_LU = (_behind(x, total) for x in (place_LE, place_LU))
    return Selection(index_LE, place_LE, order_LU, place_LU, expiry_LU, counts)


def _packed(taken_LM: Tensor, slots: int) -> Tensor:
    """Numbers of the tokens taken, rising, then -1."""
    slot_LM = taken_LM.cumsum(1) - 1
    slot_LM = slot_LM.masked_fill(~taken_LM, slots)
    index = torch.full((len(taken_LM), slots + 1), -1, device=taken_LM.device)
    token_LM = torch.arange(taken_LM.shape[1], device=taken_LM.device).expand(taken_LM.shape)
    return index.scatter(1, slot_LM, token_LM)[:, :slots]


def _behind(place_LU: Tensor, total: int) -> Tensor:
    spare_U = total + torch.arange(place_LU.shape[1], dtype=torch.int32, device=place_LU.device)
    return torch.where(place_LU < total, place_LU, spare_U)


def _edges(plan: Plan, device: torch.device) -> Tensor:
    """Places at which documents start, and the end of the last."""
    length = plan.placement.length
    starts = [row * length + s for row, own in enumerate(plan.documents) for s in own]
    return torch.tensor([*starts, plan.rows * length], dtype=torch.int32, device=device)


class _GatherSlots(torch.autograd.Function):
    """`[L, E, D]` to the slots of all ranks `[L, U, D]`; gradients go home and are added."""

    @staticmethod
    def forward(ctx: Any, x_LED: Tensor, counts: tuple[int, ...], wire: Wire) -> Tensor:
        ctx.counts, ctx.wire = counts, wire
        lanes, _, size = x_LED.shape
        shapes = [(lanes, n, size) for n in counts]
        return torch.cat(wire.communicator.all_gather(x_LED, wire.label, shapes).wait(), 1)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        label = ctx.wire.label.reversed()
        parts = dout.to(torch.promote_types(dout.dtype, torch.float32)).split(ctx.counts, 1)
        own = ctx.wire.communicator.reduce_scatter(parts, label).wait()[0]
        return own.to(dout.dtype), None, None


@torch.compiler.disable
def attend_selected(
    view: SequenceView,
    operands: tuple[Tensor, Tensor, Tensor],
    selection: Selection,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Slots `[L, E, V]`: each has seen those of its lane and document up to itself."""
    q_LEK, k_LEK, v_LEV = operands
    pairs = torch.cat((k_LEK, v_LEV), -1)
    pairs_LUD = _GatherSlots.apply(pairs, selection.counts, view.wire(VERB))
    (L, E, K), U = q_LEK.shape, pairs_LUD.shape[1]
    # Tiles of queries do not reach into another lane: those of one would feel the other's.
    spare = -E % QUERY_TILE
    total = view.plan.rows * view.plan.placement.length
    stride = total + max(U, E + spare)
    if L * stride > LARGEST:
        raise ValueError("more tokens in all selecting heads than int32 holds: use fewer rows")
    lane_L1 = torch.arange(L, dtype=torch.int32, device=q_LEK.device)[:, None]
    padding = total + torch.arange(E, E + spare, dtype=torch.int32, device=q_LEK.device)
    queries = torch.cat((selection.place_LE, padding.expand(L, -1)), 1) + lane_L1 * stride
    expiry = (selection.expiry_LU + lane_L1 * stride).masked_fill(selection.expiry_LU == 0, 0)
    chosen = (selection.order_LU + lane_L1 * U).flatten()
    k_UJD = pairs_LUD.flatten(0, 1).index_select(0, chosen)[:, None]
    out, _ = flash_lifetime(
        F.pad(q_LEK, (0, 0, 0, spare)).flatten(0, 1)[None, :, None],
        k_UJD[None, ..., :K],
        k_UJD[None, ..., K:],
        expiry=expiry.view(1, -1),
        query_positions=queries.view(1, -1),
        key_positions=(selection.key_place_LU + lane_L1 * stride).view(1, -1),
        scale=scale,
        backend=backend,
    )
    return out.view(L, E + spare, -1)[:, :E]


def select_traffic(share: Share, rule: Rule, lanes: int, pair: int) -> Expected:
    """Of places, and of keys and values of `pair` elements: (P - 1) L e each, and the gradients of
    these, e the slots of a lane on the rank that has most."""
    activation, state = share.widths
    received = (share.placement.ranks - 1) * max(slot_counts(share.plan, rule)) * lanes
    slots = {
        (VERB, False): Traffic(2, received * (PLACE_BYTES + pair * activation)),
        (VERB, True): Traffic(1, received * pair * state),
    }
    return combined([rule.traffic(share, lanes), slots])


def distances(selection: Selection) -> Tensor:
    """How many selected tokens are 1, 2..3, 4..7, ... tokens after the one before in their lane."""
    place_LE, is_real = selection.place_LE, selection.index_LE >= 0
    before = torch.searchsorted(selection.key_place_LU, place_LE) - 1
    has_one = is_real & (before >= 0)
    before = before.clamp(min=0)
    has_one = has_one & (selection.expiry_LU.gather(1, before) > place_LE)
    distance = place_LE - selection.key_place_LU.gather(1, before)
    powers = 2 ** torch.arange(DISTANCES, device=place_LE.device)
    classes = torch.bucketize(distance, powers, right=True).clamp(max=DISTANCES) - 1
    classes = torch.where(has_one, classes, DISTANCES)
    counts = classes.new_zeros(DISTANCES + 1)
    return counts.scatter_add(0, classes.flatten(), torch.ones_like(classes).flatten())[:-1]
