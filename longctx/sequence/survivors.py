"""Attention to a window, and to the best keys of all before: each key has a score, and a bounded
set of survivors of the past is kept by it.

A key starts to compete `delay` tokens after its own, when its score is known. At every token the
survivors are the `capacity` best that compete, so a key that leaves them never comes back: each has
a lifetime. Only the best of a segment can be survivors after it: those of all segments are
gathered, and the best of them enter.
"""

import torch
from longctx_kernels.lifetime_attention import flash_lifetime
from longctx_kernels.top_lifetime import top_deaths
from torch import Tensor

from longctx.sequence.eviction import (
    Eviction,
    Keys,
    Layout,
    best_of,
    comes_from,
    laid_out,
    longest,
)
from longctx.sequence.expected import Expected, Share, Sizes, both_ways, combined
from longctx.sequence.fetch import VERB, Routes, fetch, fetch_traffic
from longctx.sequence.ledger import Traffic
from longctx.sequence.patterned import LARGEST, Operands
from longctx.sequence.plan import Plan
from longctx.sequence.verbs import Wire, gather_segments
from longctx.sequence.view import SequenceView

SURVIVORS = "survivors"
POSITION_BYTES = 8


@torch.compiler.disable
def survivors_attention(
    view: SequenceView, operands: Operands, score_BTJ: Tensor, eviction: Eviction, backend: str
) -> tuple[Tensor, Tensor]:
    """(out `[B, T, H, V]`, log-sum-exp `[B, T, H]`); keys whose score is -inf do not survive."""
    q_BTHK, k_BTJK, v_BTJV = operands
    plan, device = view.plan, q_BTHK.device
    layout, items_LU, queries_LT, rows_M = plan.once(laid_out, eviction, device)
    routes, wire = plan.once(Routes, eviction.policy), view.wire(VERB)
    pairs_IJD = fetch(torch.cat((k_BTJK, v_BTJV), -1).flatten(0, 1), routes, wire)
    score_BTJ = score_BTJ if eviction.biased else score_BTJ.detach()
    score_IJ = fetch(score_BTJ.flatten(0, 1), routes, wire)
    pairs, score = (x[items_LU.clamp(min=0)].transpose(1, 2) for x in (pairs_IJD, score_IJ))
    position = layout.first_L[:, None] + torch.arange(items_LU.shape[1], device=device)
    wide = Keys(pairs, score, position[:, None].expand(score.shape))
    entering = None
    if len(plan.placement.order) > 1:
        entering = _entering(wide, layout, plan, view.wire(SURVIVORS), eviction)
    q_LTHK = q_BTHK.flatten(0, 1)[queries_LT.clamp(min=0)]
    out, lse = attend_survivors(q_LTHK, wide, entering, layout, eviction, backend)[:2]
    return tuple(x.flatten(0, 1)[rows_M].unflatten(0, q_BTHK.shape[:2]) for x in (out, lse))


def attend_survivors(
    q_LTHK: Tensor,
    wide: Keys,
    entering: Keys | None,
    layout: Layout,
    eviction: Eviction,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out `[L, T, H, V]`, lse, survivors' marks among entering and then arriving keys).

    `wide` has `eviction.left` keys before the queries' own, `entering` are the survivors of before.
    """
    (L, T), J, left = q_LTHK.shape[:2], wide.score_LJU.shape[1], eviction.left
    arrived = wide.score_LJU[..., left - eviction.delay :][..., :T]
    arrived = arrived.masked_fill(~layout.arrives_LT[:, None], -torch.inf)
    old = 0 if entering is None else entering.score_LJU.shape[2]
    scores = arrived if entering is None else torch.cat((entering.score_LJU, arrived), -1)
    groups = torch.where(layout.groups_LT > 0, layout.groups_LT + old, 0)
    groups = torch.cat((groups.new_zeros(L, old), groups), -1)
    deaths = top_deaths(
        scores.detach().flatten(0, 1),
        groups.repeat_interleave(J, 0),
        eviction.capacity,
        eviction.later_wins,
    ).view(L, J, old + T)
    own = torch.arange(old + T, device=deaths.device)
    is_kept = deaths > own
    # Own token t has slot left + t.
    ends = torch.where(is_kept, (deaths - old + left).masked_fill(deaths == old + T, LARGEST), 0)
    births, expiry = _lifetimes(wide, ends[..., old:], layout, eviction, T)
    keys = wide
    if entering is not None:
        keys, births, expiry = _with_entering(
            (wide, births, expiry), entering, ends[..., :old], layout, eviction
        )
    out, lse = _attend(q_LTHK, keys, births, expiry, eviction, backend)
    survives = (deaths == old + T) & (scores > -torch.inf)
    return out, lse, survives


def _lifetimes(
    wide: Keys, ends_LJT: Tensor, layout: Layout, eviction: Eviction, tokens: int
) -> tuple[Tensor, Tensor]:
    """Slots from which and until which keys are seen, `[L, J, U]`."""
    slots = torch.arange(wide.score_LJU.shape[2], device=ends_LJT.device)
    expiry = (slots + eviction.window).expand(wide.score_LJU.shape).clone()
    arriving = slice(eviction.left - eviction.delay, eviction.left - eviction.delay + tokens)
    expiry[..., arriving] = torch.maximum(expiry[..., arriving], ends_LJT)
    expiry = torch.minimum(expiry, layout.stop_LU[:, None])
    return slots.expand(expiry.shape), expiry * layout.valid_LU[:, None]


def _with_entering(
    seen: tuple[Keys, Tensor, Tensor],
    entering: Keys,
    ends_LJE: Tensor,
    layout: Layout,
    eviction: Eviction,
) -> tuple[Keys, Tensor, Tensor]:
    """With the survivors of before, which are seen from the end of their window on; by birth."""
    keys, births, expiry = seen
    born = entering.position_LJU + eviction.window - layout.first_L[:, None, None]
    born = born.clamp(min=eviction.left, max=births.shape[2])
    births = torch.cat((births, born), -1)
    stop = layout.stop_LU[:, None, eviction.left : eviction.left + 1]
    expiry = torch.cat((expiry, torch.minimum(ends_LJE, stop)), -1)
    order = births.argsort(dim=-1, stable=True)
    both = Keys(*(torch.cat(pair, 2) for pair in zip(keys, entering)))
    return both.chosen(order), births.gather(-1, order), expiry.gather(-1, order)


def _attend(
    q_LTHK: Tensor,
    keys: Keys,
    births_LJU: Tensor,
    expiry_LJU: Tensor,
    eviction: Eviction,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """All lanes and key heads end to end, as one key head of one row."""
    (L, T, H, K), J = q_LTHK.shape, births_LJU.shape[1]
    span, device = eviction.left + T + 1, q_LTHK.device
    if L * J * span > LARGEST:
        raise ValueError("more positions in all heads than int32 holds: use fewer rows")
    base_LJ1 = torch.arange(L * J, device=device).view(L, J, 1) * span
    positions = base_LJ1 + births_LJU.clamp(max=span - 1)
    expiry = base_LJ1 + expiry_LJU.clamp(max=span)
    queries = base_LJ1 + torch.arange(eviction.left, eviction.left + T, device=device)
    bias = None
    if eviction.biased:
        bias = keys.score_LJU.masked_fill(keys.score_LJU == -torch.inf, 0.0)
        bias = bias.flatten()[:, None].expand(-1, H // J)[None]
    k_UK, v_UV = keys.pairs_LJUD.flatten(0, 2).split((K, keys.pairs_LJUD.shape[-1] - K), -1)
    out, lse = flash_lifetime(
        q_LTHK.unflatten(2, (J, -1)).transpose(1, 2).flatten(0, 2)[None],
        k_UK[None, :, None],
        v_UV[None, :, None],
        expiry=expiry.flatten()[None].int(),
        query_positions=queries.flatten()[None].int(),
        key_positions=positions.flatten()[None].int(),
        key_bias=bias,
        backend=backend,
    )
    return tuple(x[0].unflatten(0, (L, J, T)).transpose(1, 2).flatten(2, 3) for x in (out, lse))


def _entering(wide: Keys, layout: Layout, plan: Plan, wire: Wire, eviction: Eviction) -> Keys:
    """The survivors of what lies before each own segment in its document."""
    tokens = layout.arrives_LT.shape[1]
    arriving = slice(eviction.left - eviction.delay, eviction.left - eviction.delay + tokens)
    keys = Keys(wide.pairs_LJUD[:, :, arriving], *(x[..., arriving] for x in wide[1:]))
    takes_part = (layout.arrives_LT & layout.is_last_LT)[:, None]
    score = keys.score_LJU.masked_fill(~takes_part, -torch.inf)
    best = keys._replace(score_LJU=score).chosen(
        best_of(score, _sent(plan, eviction), eviction.later_wins)
    )
    parts = (x.unflatten(0, (len(plan.segments), plan.rows)) for x in best)
    pairs, score, position = (gather_segments(x, wire) for x in parts)
    comes_SAB = plan.once(comes_from).to(score.device)[..., None, None]
    entering = []
    for comes_AB in comes_SAB:
        masked = score.masked_fill(~comes_AB, -torch.inf)
        # In order of positions, whichever segment they come from.
        flat = Keys(*(x.movedim(0, 2).flatten(2, 3) for x in (pairs, masked, position)))
        entering.append(
            flat.chosen(best_of(flat.score_LJU, eviction.capacity, eviction.later_wins))
        )
    return Keys(*(torch.cat(x) for x in zip(*entering)))


def _sent(plan: Plan, eviction: Eviction) -> int:
    """Keys that travel from each segment."""
    return min(eviction.capacity, longest(plan))


def survivors_traffic(share: Share, sizes: Sizes, eviction: Eviction) -> Expected:
    """Of `survivors_attention`: the keys before each segment with their scores, and from every
    other segment `min(capacity, longest segment)` keys a head with score and position.

    Backward come gradients of the keys, and of the scores if they are biases.
    """
    pair, J = sizes.key_dim + sizes.value_dim, sizes.key_heads
    halo = [fetch_traffic(share, eviction.policy, J * pair)]
    scores = fetch_traffic(share, eviction.policy, J, is_state=True)
    halo.append({key: t for key, t in scores.items() if eviction.biased or not key[1]})
    if len(share.placement.order) == 1:
        return combined(halo)
    segments = (share.placement.ranks - 1) * max(map(len, share.placement.segments))
    keys = segments * share.rows * J * _sent(share.plan, eviction)
    activation, state = share.widths
    forward = Traffic(3, keys * (pair * activation + state + POSITION_BYTES))
    backward = Traffic(1 + eviction.biased, keys * (pair + eviction.biased) * state)
    return combined([*halo, both_ways(SURVIVORS, forward, backward)])
