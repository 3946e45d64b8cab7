"""What ranks exchange, predicted from sizes alone: calls, and bytes received.

Every formula gives one rank's traffic in one forward and one backward pass, exactly as the ledger
counts it. Exchanges within a group of one rank count as calls without bytes.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, Protocol, TypeVar

from longctx.sequence.ledger import Label, Traffic
from longctx.sequence.placement import Placement
from longctx.sequence.plan import Documents, Plan
from longctx.sequence.sharded import SCAN_BLOCKS, Transports

Expected = dict[tuple[str, bool], Traffic]
"""Traffic by (verb, whether in the backward pass)."""
Name = TypeVar("Name", bound=Hashable)


class Widths(NamedTuple):
    """Bytes of an element: of activations, and of states, sums and their gradients."""

    activation: int
    state: int


WIDTHS = {"fp64": Widths(8, 8), "fp32": Widths(4, 4), "bf16": Widths(2, 4)}
"""Widths by `train.precision`."""


class Sizes(NamedTuple):
    """Heads, heads of keys and values, and the sizes of a key and of a value."""

    heads: int
    key_heads: int
    key_dim: int
    value_dim: int


class Gate(NamedTuple):
    """A log decay per token: elements a head, 1 or the size of a key, and bytes of each.

    Ulysses trades its gradient too, if it has one.
    """

    size: int
    width: int
    has_gradient: bool = True


@dataclass(frozen=True)
class Share:
    """What one rank has of a batch of `rows` sequences, and how it reaches the rest."""

    rank: int
    placement: Placement
    rows: int
    transports: Transports
    widths: Widths
    documents: Documents = ()
    """Where documents start in each row; () if each row is one."""

    @property
    def plan(self) -> Plan:
        """The batch on this rank."""
        return Plan(self.placement, self.rank, self.documents or ((0,),) * self.rows)

    @property
    def _group(self) -> range:
        size = self.transports.heads
        first = self.rank // size * size
        return range(first, first + size)

    @property
    def own_tokens(self) -> int:
        """Tokens of a row on this rank."""
        return self.placement.lengths[self.rank]

    @property
    def group_tokens(self) -> int:
        """Tokens of a row in this rank's Ulysses group."""
        return sum(self.placement.lengths[rank] for rank in self._group)

    @property
    def traded_tokens(self) -> tuple[int, int]:
        """Tokens of a row that arrive with all heads, once from each other member, or some."""
        own = self.own_tokens
        return own * (self.transports.heads - 1), self.group_tokens - own

    def of_group(self) -> "Share | None":
        """The share of the whole Ulysses group; None if that is everything."""
        size = self.transports.heads
        if size == self.placement.ranks:
            return None
        transports = replace(self.transports, prefix="allgather", heads=1)
        return replace(
            self,
            placement=_in_groups(self.placement, size),
            rank=self.rank // size,
            transports=transports,
        )


@lru_cache(maxsize=32)
def _in_groups(placement: Placement, size: int) -> Placement:
    """The placement in which neighbouring ranks act as one."""
    starts = range(0, placement.ranks, size)
    return placement.merged(tuple(tuple(range(start, start + size)) for start in starts))


def combined(parts: Iterable[dict[Name, Traffic]]) -> dict[Name, Traffic]:
    """Everything together, name by name."""
    total: dict[Name, Traffic] = {}
    for part in parts:
        for key, traffic in part.items():
            if before := total.get(key):
                calls, received = traffic
                traffic = Traffic(before.calls + calls, before.received + received)
            total[key] = traffic
    return total


def all_reduce(elements: int, ranks: int, width: int, calls: int = 1) -> Traffic:
    """Sums of so many elements over ranks: all parts of the own share, then all shares."""
    return Traffic(calls, calls * 2 * (ranks - 1) * -(-elements // ranks) * width)


def both_ways(verb: str, forward: Traffic, backward: Traffic) -> Expected:
    both = {(verb, False): forward, (verb, True): backward}
    return {key: traffic for key, traffic in both.items() if traffic.calls}


def decay_traffic(share: Share, sizes: Sizes, gate: Gate | None = None) -> Expected:
    """Of `SequenceView.decay_attention`; factors travel only if there is a gate per token.

    They go along with the first all-gather, one for each element of the gate. Ulysses trades the
    gate itself, as it is.
    """
    size = gate.size if gate else 0
    if share.transports.prefix != "ulysses":
        return prefix_traffic(share, sizes, sizes.heads * size)
    inner = sizes._replace(heads=sizes.heads // share.transports.heads)
    parts, group = [_traded(share, inner, gate)], share.of_group()
    return combined([*parts, prefix_traffic(group, inner, inner.heads * size)] if group else parts)


def running_traffic(share: Share, elements: int) -> Expected:
    """Of `SequenceView.running_log_sum_exp` over `elements` a token: one of each a segment and row.

    They are gathered, whatever the transport: each way (P - 1) s B elements of a state's width, s
    the largest number of segments of a rank.
    """
    gathered = replace(share, transports=replace(share.transports, prefix="allgather"))
    return prefix_traffic(gathered, Sizes(elements, elements, 1, 1))


def means_traffic(share: Share, sizes: Sizes) -> Expected:
    """Of means of values with `key_dim` rows of log weights a head: log-sum-exps, then states."""
    gate = Gate(sizes.key_dim, share.widths.state, has_gradient=False)
    sums = running_traffic(share, sizes.heads * sizes.key_dim)
    return combined([sums, decay_traffic(share, sizes, gate)])


def running_sum_traffic(share: Share, heads: int, size: int) -> Expected:
    """Of running sums of values `[heads, size]` in the precision of states.

    They are decay attention with ones for queries and keys, without decay.
    """
    wide = replace(share, widths=Widths(share.widths.state, share.widths.state))
    return decay_traffic(wide, Sizes(heads, heads, 1, size))


def delta_traffic(share: Share, sizes: Sizes, gates: Gate, state_dim: int) -> Expected:
    """Of `SequenceView.delta_attention`; `gates` are beta and its other gates together.

    States have `state_dim` rows Z, twice the key size with momentum. A matrix `[Z, Z]` a head
    travels with the first all-gather, and never along a chain. Ulysses trades the gates as they
    are.
    """

    def exchanged(share: Share, heads: int) -> Expected:
        states = sizes._replace(heads=heads, key_dim=state_dim)
        return prefix_traffic(share, states, heads * state_dim**2)

    if share.transports.prefix != "ulysses":
        return exchanged(share, sizes.heads)
    inner = sizes._replace(heads=sizes.heads // share.transports.heads)
    parts, group = [_traded(share, inner, gates)], share.of_group()
    return combined([*parts, exchanged(group, inner.heads)] if group else parts)


def _traded(share: Share, inner: Sizes, gates: Gate | None) -> Expected:
    """Queries, keys and values to some heads of all tokens, the output back, and gates."""
    inward = inner.heads * (2 * inner.key_dim + inner.value_dim)
    trade = trade_traffic(share, inward, inner.heads * inner.value_dim)
    if not gates:
        return trade
    own, others = share.traded_tokens
    token = share.rows * inner.heads * gates.size * gates.width
    back = Traffic(1, own * token) if gates.has_gradient else Traffic(0, 0)
    return combined([trade, both_ways("heads", Traffic(1, others * token), back)])


def prefix_traffic(share: Share, sizes: Sizes, factor: int = 0) -> Expected:
    """Of states `[H, K, V]`, and of `factor` elements a segment and row that travel once with them.

    All-gather receives (P - 1) s B (H K V + factor) elements forward and (P - 1) s B H K V
    backward, s the largest number of segments of a rank. A chain receives B H K V for each segment
    whose neighbour is on another rank.
    """
    placement, width = share.placement, share.rows * share.widths.state
    state = width * sizes.heads * sizes.key_dim * sizes.value_dim
    if share.transports.prefix == "allgather":
        segments = (placement.ranks - 1) * max(len(own) for own in placement.segments)
        forward = segments * (state + width * factor)
        return both_ways("prefix", Traffic(1, forward), Traffic(1, segments * state))
    owners = [rank for rank, _ in placement.order]
    borders = [(left, right) for left, right in zip(owners, owners[1:]) if left != right]
    arriving = sum(right == share.rank for _, right in borders)
    leaving = sum(left == share.rank for left, _ in borders)
    blocks = min(SCAN_BLOCKS, sizes.value_dim) if share.transports.prefix == "scan" else 1
    calls = blocks * (arriving + leaving)
    return both_ways("prefix", Traffic(calls, arriving * state), Traffic(calls, leaving * state))


def softmax_traffic(share: Share, sizes: Sizes, window: int) -> Expected:
    """Of `SequenceView.softmax_attention`."""
    group_size = share.transports.heads
    if group_size == 1:
        return _keys_traffic(share, sizes, window)
    key_heads = sizes.key_heads if sizes.key_heads % group_size == 0 else group_size
    inner = sizes._replace(heads=sizes.heads // group_size, key_heads=key_heads // group_size)
    pair = sizes.key_dim + sizes.value_dim
    inward = inner.heads * sizes.key_dim + inner.key_heads * pair
    trade, group = trade_traffic(share, inward, inner.heads * sizes.value_dim), share.of_group()
    return combined([trade, _keys_traffic(group, inner, window)] if group else [trade])


def _keys_traffic(share: Share, sizes: Sizes, window: int) -> Expected:
    pair = sizes.key_dim + sizes.value_dim
    if window:
        left = min(window, share.placement.length) - 1
        return halo_traffic(share, left, sizes.key_heads * pair)
    if share.transports.stream == "ring":
        return ring_traffic(share, sizes.key_heads * pair)
    return gather_traffic(share, sizes.key_heads, pair)


def ring_traffic(share: Share, token: int) -> Expected:
    """Keys and values of this many elements a token go round, backward with their gradients.

    A rank receives the tokens of every other rank each way. Gradients stop at home: those of the
    rank before never pass, its own arrive.
    """
    lengths, total = share.placement.lengths, share.placement.length
    blocks = (total - share.own_tokens) * share.rows * token * share.widths.activation
    gradients = (total - lengths[share.rank - 1]) * share.rows * token * share.widths.state
    hops = share.placement.ranks - 1
    return both_ways("stream", Traffic(hops, blocks), Traffic(2 * hops, blocks + gradients))


def gather_traffic(share: Share, key_heads: int, pair: int) -> Expected:
    """Keys and values of all ranks, padded to the longest; backward again, and their gradients.

    With c tokens on the longest rank (P - 1) B c J (K + V) elements arrive each time.
    """
    chunks = -(-key_heads // (share.transports.gather_heads or key_heads))
    longest = max(share.placement.lengths)
    elements = (share.placement.ranks - 1) * share.rows * longest * key_heads * pair
    keys, gradients = elements * share.widths.activation, elements * share.widths.state
    return both_ways("stream", Traffic(chunks, keys), Traffic(2 * chunks, keys + gradients))


def halo_traffic(share: Share, left: int, token: int, right: int = 0) -> Expected:
    """The tokens beside each segment, of this many elements; their gradients go home."""
    arriving, leaving = share.placement.beside(share.rank, left, right)
    size, calls = share.rows * token, int(arriving + leaving > 0)
    return both_ways(
        "halo",
        Traffic(calls, arriving * size * share.widths.activation),
        Traffic(calls, leaving * size * share.widths.state),
    )


def trade_traffic(share: Share, inward: int, outward: int) -> Expected:
    """Ulysses: q, k, v to some heads of all tokens, the output back to all heads of own tokens.

    `inward` and `outward` are elements a token of one rank's heads.
    """
    own, others = share.traded_tokens
    width = share.rows * share.widths.activation
    return both_ways(
        "heads",
        Traffic(4, width * (others * inward + own * outward)),
        Traffic(4, width * (own * inward + others * outward)),
    )


def reduce_traffic(share: Share, elements: int, calls: tuple[int, int]) -> Expected:
    """All-reduces of `elements` each, so many forward and so many backward."""
    ranks, width = share.placement.ranks, share.widths.state
    forward, backward = (all_reduce(elements, ranks, width, n) for n in calls)
    return both_ways("reduce", forward, backward)


def gathered_rows_traffic(share: Share, token: int) -> Expected:
    """Of `SequenceView.gather` of this many elements a token, padded to the longest rank."""
    longest = max(share.placement.lengths)
    elements = (share.placement.ranks - 1) * share.rows * longest * token
    forward = Traffic(1, elements * share.widths.activation)
    return both_ways("gather", forward, Traffic(1, elements * share.widths.state))


def handoff_traffic(share: Share, elements: int) -> Expected:
    """Of `SequenceView.handoff` of this many elements a row, which go as a serial chain does."""
    chain = replace(share, transports=replace(share.transports, prefix="serial"))
    moved = prefix_traffic(chain, Sizes(1, 1, 1, elements))
    return {("handoff", backward): traffic for (_, backward), traffic in moved.items()}


class Exchanging(Protocol):
    """A layer that knows its traffic."""

    def expected_traffic(self, share: Share) -> Expected:
        """Its traffic in one forward and one backward pass."""
        ...


def expected_exchange(layers: Sequence[Exchanging], share: Share) -> dict[Label, Traffic]:
    """The ledger of one rank after one forward and one backward pass of these layers."""
    return {
        Label(number, verb, backward): traffic
        for number, layer in enumerate(layers)
        for (verb, backward), traffic in layer.expected_traffic(share).items()
    }
