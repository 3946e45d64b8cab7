"""Every blocking verb and transport, as computations with a plain definition on one process."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longctx.sequence.affine import (
    AffinePrefix,
    ChainedPrefix,
    GatheredPrefix,
    Transitions,
    affine_prefix,
    constant_transitions,
)
from longctx.sequence.halo import Halo, HaloPlan
from longctx.sequence.heads import HeadTrade
from longctx.sequence.plan import Plan
from longctx.sequence.verbs import Gather, Reduce, handoff, stream, top_k
from tests.sequence.cases import Case, Setting, Shard, Values
from tests.sequence.monoid_cases import MONOID_CASES

BLOCKS = 3
"""Of a chain, which does not divide the value size."""


@functools.cache
def mixing(length: int) -> Tensor:
    """A fixed weight of every token for every token."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(length, length, generator=generator, dtype=torch.float64)


def mask_starts(setting: Setting) -> Tensor:
    """`[B, G]`: where documents start."""
    is_start_BG = torch.zeros(len(setting.documents), setting.length, dtype=torch.bool)
    for row, starts in zip(is_start_BG, setting.documents):
        row[list(starts)] = True
    return is_start_BG


def mask_visible(setting: Setting) -> Tensor:
    """`[B, G, G]`: tokens of the same document that are not later."""
    document_BG = mask_starts(setting).cumsum(1)
    return (document_BG[:, :, None] == document_BG[:, None]).tril()


def gather(shard: Shard, inputs: Values) -> Tensor:
    whole = Gather.apply(inputs["x"], shard.wire("gather"))
    return mixing(shard.setting.length)[shard.plan.token_ids_BT[0]] @ whole


def gather_whole(setting: Setting, inputs: Values) -> Tensor:
    return mixing(setting.length) @ inputs["x"]


def reduce(shard: Shard, inputs: Values) -> Tensor:
    x = inputs["x"]
    square = x.square().sum((0, 1))
    return x * Reduce.apply(square, shard.links.sequence, shard.label("reduce"))


def reduce_whole(_: Setting, inputs: Values) -> Tensor:
    return inputs["x"] * inputs["x"].square().sum((0, 1))


def streamed(transport: str) -> Callable[[Shard, Values], Tensor]:
    """Blocks of which no token is visible are left out, as a causal mixer would."""

    def run(shard: Shard, inputs: Values) -> Tensor:
        plan, visible = shard.plan, mask_visible(shard.setting)
        ids, out = plan.token_ids_BT[0], torch.zeros_like(inputs["x"])
        for rank, block in stream(inputs["x"], shard.wire("stream"), transport):
            other = Plan(plan.placement, rank, plan.documents).token_ids_BT[0]
            weight = (visible * mixing(shard.setting.length))[:, ids][:, :, other]
            if weight.any():
                out = out + weight @ block.square()
        return out

    return run


def stream_whole(setting: Setting, inputs: Values) -> Tensor:
    return (mask_visible(setting) * mixing(setting.length)) @ inputs["x"].square()


def halo(left: int, right: int) -> Case:
    """Each token sees `left` and `right` neighbours, whatever their documents."""

    def run(shard: Shard, inputs: Values) -> Tensor:
        routes = HaloPlan(shard.plan, left, right)
        x = inputs["x"].flatten(0, 1)
        wide = Halo.apply(x, routes, shard.links.sequence, shard.label("halo"))
        shifts = enumerate(range(-left, right + 1))
        parts = [torch.cos(wide[routes.own + shift]) * (i + 1) for i, shift in shifts]
        return sum(parts).view_as(inputs["x"])

    def whole(_: Setting, inputs: Values) -> Tensor:
        x = inputs["x"]
        padded = torch.nn.functional.pad(x, (0, 0, left, right))
        return sum(
            torch.cos(padded[:, i : i + x.shape[1]]) * (i + 1) for i in range(left + right + 1)
        )

    return Case(f"halo-{left}-{right}", {"x": (2,)}, run, whole)


def recurrence(kept: Tensor, added: Tensor, state: Tensor) -> Tensor:
    """States `[B, T, H, K, V]` after each token."""
    states = []
    for t in range(added.shape[1]):
        state = kept[:, t] * state + added[:, t]
        states.append(state)
    return torch.stack(states, 1)


def constant_log_decay() -> Tensor:
    return torch.tensor([-0.1, -0.5], dtype=torch.float64)


def kept_by_tokens(kind: str, inputs: Values, setting: Setting, rightwards: bool) -> Tensor:
    """How much of the state each token keeps, none at the border of a document."""
    is_start = mask_starts(setting)
    ends = torch.cat((is_start[:, 1:], torch.ones_like(is_start[:, :1])), 1)
    border = (is_start if rightwards else ends)[:, :, None, None, None]
    if kind == "constant":
        factor = constant_log_decay().exp()[:, None, None]
    else:
        factor = torch.sigmoid(inputs["gate"])
    return factor * ~border


def local_factors(kind: str, shard: Shard, inputs: Values, rightwards: bool) -> Tensor:
    """The same for this rank's tokens."""
    ids, setting = shard.plan.token_ids_BT[0], shard.setting
    if kind == "constant":
        return kept_by_tokens(kind, inputs, setting, rightwards)[:, ids]
    shape = (len(setting.documents), setting.length, *inputs["gate"].shape[2:])
    gate = inputs["gate"].new_zeros(shape).index_copy(1, ids, inputs["gate"])
    return kept_by_tokens(kind, {"gate": gate}, setting, rightwards)[:, ids]


def affine(kind: str, transport: str, rightwards: bool) -> Case:
    """A state with decay, read after each token."""

    def run(shard: Shard, inputs: Values) -> Tensor:
        plan = shard.plan
        lengths = [s.length for s in plan.segments]
        time = (lambda x: x) if rightwards else (lambda x: x.flip(1))
        kept = local_factors(kind, shard, inputs, rightwards)
        parts = [
            (time(k), time(x))
            for k, x in zip(kept.split(lengths, 1), inputs["x"].split(lengths, 1))
        ]
        zero = torch.zeros_like(inputs["x"][:, 0])
        added = torch.stack([recurrence(k, x, zero)[:, -1] for k, x in parts])
        own = torch.stack([k.prod(1) for k, _ in parts])
        transitions = constant_transitions(plan, constant_log_decay())
        if kind != "constant":
            transitions = Transitions(own.detach(), transitions.linked)
        prefix = make_prefix(transport, shard, transitions)
        arguments = (own, prefix, shard.label("prefix"), rightwards)
        entering = AffinePrefix.apply(added, *arguments)
        out = [time(recurrence(k, x, state)) for (k, x), state in zip(parts, entering)]
        return torch.cat(out, 1)

    def whole(setting: Setting, inputs: Values) -> Tensor:
        kept = kept_by_tokens(kind, inputs, setting, rightwards)
        zero = torch.zeros_like(inputs["x"][:, 0])
        if rightwards:
            return recurrence(kept, inputs["x"], zero)
        return recurrence(kept.flip(1), inputs["x"].flip(1), zero).flip(1)

    tokens = {"x": (2, 3, 4)}
    if kind != "constant":
        tokens["gate"] = (2, 3 if kind == "diagonal" else 1, 1)
    direction = "rightwards" if rightwards else "leftwards"
    return Case(f"affine-{kind}-{transport}-{direction}", tokens, run, whole)


def matrix_recurrence(moves: Tensor, added: Tensor, state: Tensor) -> Tensor:
    """States `[B, T, H, K, V]` after each token, which multiplies them by a matrix."""
    states = []
    for t in range(added.shape[1]):
        state = moves[:, t] @ state + added[:, t]
        states.append(state)
    return torch.stack(states, 1)


def dense(transport: str, rightwards: bool) -> Case:
    """A state that every token multiplies by a matrix, none at the border of a document."""

    def moves_of(inputs: Values, border: Tensor) -> Tensor:
        return 0.5 * inputs["move"] * ~border[:, :, None, None, None]

    def borders(setting: Setting) -> Tensor:
        is_start = mask_starts(setting)
        ends = torch.cat((is_start[:, 1:], torch.ones_like(is_start[:, :1])), 1)
        return is_start if rightwards else ends

    def time(x: Tensor) -> Tensor:
        return x if rightwards else x.flip(1)

    def run(shard: Shard, inputs: Values) -> Tensor:
        plan = shard.plan
        lengths = [s.length for s in plan.segments]
        moves = moves_of(inputs, borders(shard.setting)[:, plan.token_ids_BT[0]])
        parts = [
            (time(m), time(x))
            for m, x in zip(moves.split(lengths, 1), inputs["x"].split(lengths, 1))
        ]
        zero = torch.zeros_like(inputs["x"][:, 0])
        added = torch.stack([matrix_recurrence(m, x, zero)[:, -1] for m, x in parts])
        eye = torch.eye(moves.shape[-1], dtype=moves.dtype).expand_as(moves[:, 0])
        own = torch.stack([matrix_recurrence(m, torch.zeros_like(m), eye)[:, -1] for m, _ in parts])
        make = functools.partial(make_prefix, transport, shard)
        label = shard.label("prefix")
        entering = affine_prefix(added, own, plan, make, label, rightwards)
        out = [time(matrix_recurrence(m, x, state)) for (m, x), state in zip(parts, entering)]
        return torch.cat(out, 1)

    def whole(setting: Setting, inputs: Values) -> Tensor:
        moves = moves_of(inputs, borders(setting))
        zero = torch.zeros_like(inputs["x"][:, 0])
        return time(matrix_recurrence(time(moves), time(inputs["x"]), zero))

    tokens = {"x": (2, 3, 4), "move": (2, 3, 3)}
    direction = "rightwards" if rightwards else "leftwards"
    return Case(f"affine-dense-{transport}-{direction}", tokens, run, whole)


def make_prefix(transport: str, shard: Shard, transitions: Transitions) -> Any:
    if transport == "allgather":
        return GatheredPrefix(shard.plan, transitions, shard.links.sequence)
    blocks, beside = (BLOCKS, True) if transport == "scan" else (1, False)
    return ChainedPrefix(shard.plan, transitions, shard.links.chain, blocks, beside)


def choose(shard: Shard, inputs: Values) -> Tensor:
    """1 for the best tokens of a row; scores are rounded, so that there are ties."""
    positions = top_k(inputs["x"].round(), 9, shard.wire("top_k"))
    is_chosen = torch.zeros(len(positions), shard.setting.length, dtype=torch.float64)
    return is_chosen.scatter(1, positions, 1.0)[:, shard.plan.token_ids_BT[0]]


def choose_whole(setting: Setting, inputs: Values) -> Tensor:
    """Sorted by score, then by position."""
    is_chosen = torch.zeros(len(setting.documents), setting.length, dtype=torch.float64)
    for row, scores in zip(is_chosen, inputs["x"].round().tolist()):
        best = sorted(range(setting.length), key=lambda t: (-scores[t], t))[:9]
        row[best] = 1.0
    return is_chosen


def nonlinear(x: Tensor, is_start: Tensor, initial: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """States after each token, and the last one."""
    states = []
    for t in range(x.shape[1]):
        state = torch.where(is_start[:, t, None], initial, state)
        state = torch.tanh(0.7 * state.roll(1, -1) + x[:, t])
        states.append(state)
    return torch.stack(states, 1), state


def handed_over(learned: bool) -> Case:
    """A recurrence that no summary describes, from zero or from a learned state."""

    def initial_of(inputs: Values) -> Tensor:
        rows, width = inputs["x"].shape[0], inputs["x"].shape[2]
        return (
            inputs["first"].expand(rows, width) if learned else inputs["x"].new_zeros(rows, width)
        )

    def run(shard: Shard, inputs: Values) -> Tensor:
        lengths = [s.length for s in shard.plan.segments]
        is_start = mask_starts(shard.setting)[:, shard.plan.token_ids_BT[0]]
        parts = list(zip(inputs["x"].split(lengths, 1), is_start.split(lengths, 1)))
        initial = initial_of(inputs)

        def work(state: Tensor, index: int) -> tuple[Tensor, Tensor]:
            return nonlinear(*parts[index], initial, state)

        return torch.cat(handoff(initial, work, shard.wire("handoff")), 1)

    def whole(setting: Setting, inputs: Values) -> Tensor:
        initial = initial_of(inputs)
        return nonlinear(inputs["x"], mask_starts(setting), initial, initial)[0]

    shared = {"first": (2,)} if learned else {}
    name = "handoff-learned-start" if learned else "handoff"
    return Case(name, {"x": (2,)}, run, whole, shared)


def trade_heads(shard: Shard, inputs: Values) -> Tensor:
    """Mixes all tokens of a Ulysses group, with weights that depend on the head."""
    setting, size = shard.setting, shard.setting.transports.heads
    first = shard.plan.rank // size * size
    members = tuple(range(first, first + size))
    trade = HeadTrade(shard.plan, members, shard.links.heads, shard.label("heads"))
    ids = members_positions(setting, first)
    weights = trade.share(head_weights(), 0)
    mixed = torch.einsum(
        "ts,bshd,h->bthd",
        mixing(setting.length)[ids][:, ids],
        trade.gather_tokens(inputs["x"]),
        weights,
    )
    return trade.gather_heads(mixed)


def trade_heads_whole(setting: Setting, inputs: Values) -> Tensor:
    size, out = setting.transports.heads, torch.zeros_like(inputs["x"])
    for first in range(0, setting.ranks, size):
        ids = members_positions(setting, first)
        weight = mixing(setting.length)[ids][:, ids]
        mixed = torch.einsum("ts,bshd,h->bthd", weight, inputs["x"][:, ids], head_weights())
        out = out.index_copy(1, ids, mixed)
    return out


def head_weights() -> Tensor:
    return torch.arange(1.0, 5.0, dtype=torch.float64)


def members_positions(setting: Setting, first: int) -> Tensor:
    ranks = range(first, first + setting.transports.heads)
    return torch.cat([setting.plan(rank).token_ids_BT[0] for rank in ranks]).sort().values


HEAD_TRADE = Case("heads", {"x": (4, 2)}, trade_heads, trade_heads_whole)
CASES = [
    Case("gather", {"x": (2,)}, gather, gather_whole),
    Case("reduce", {"x": (2,)}, reduce, reduce_whole),
    Case("stream-allgather", {"x": (2,)}, streamed("allgather"), stream_whole),
    Case("stream-ring", {"x": (2,)}, streamed("ring"), stream_whole),
    *(halo(*sizes) for sizes in ((1, 0), (0, 2), (3, 2), (11, 0), (20, 13))),
    *(
        affine(kind, transport, rightwards)
        for kind in ("constant", "scalar", "diagonal")
        for transport in ("allgather", "scan", "serial")
        for rightwards in (True, False)
    ),
    *(
        dense(transport, rightwards)
        for transport in ("allgather", "scan", "serial")
        for rightwards in (True, False)
    ),
    *MONOID_CASES,
    Case("top_k", {"x": ()}, choose, choose_whole),
    handed_over(learned=False),
    handed_over(learned=True),
]
