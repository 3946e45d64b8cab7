"""Bytes that cores keep until their backward pass: of one process, and of several.

Of what travels only results stay: incoming states, neighbours left of segments, sums. Keys and
values of other ranks are gone when the forward pass of a layer ends.
"""

from typing import Literal, NamedTuple

from longctx.model.in_flight import Batch


class Saved(NamedTuple):
    """Bytes under each way of checkpointing."""

    full: int = 0
    """What a graph holds that computes nothing again: factors of segments."""
    keep: int = 0
    none: int = 0

    def plus(self, other: "Saved") -> "Saved":
        """Both together."""
        return Saved(self.full + other.full, self.keep + other.keep, self.none + other.none)


class Heads(NamedTuple):
    """Heads of a core, those of its keys, and the sizes of a key (or state row) and a value."""

    heads: int
    key_heads: int
    key_dim: int
    value_dim: int


def decaying(batch: Batch, size: Heads, gate: int) -> Saved:
    """Of decay attention, without its operands; `gate` elements a head and token, 0 is constant.

    Constant factors are known to all; the gradient of gates needs the states that leave segments.
    """
    order, (batch, H) = _order(batch, is_traded(batch)), _recurrent(batch, size.heads)
    slabs = batch.states(H, size.key_dim, size.value_dim)
    always = order + _factors(batch, H * max(gate, 1), gate == 0)
    states = _states(batch, H * size.key_dim * size.value_dim)
    return Saved(always, always + states, always + 2 * states + slabs)


def correcting(batch: Batch, size: Heads, rows: int) -> Saved:
    """Of a delta rule, without its operands; its states have so many rows, its factors are
    matrices of these."""
    order, values = _order(batch, is_traded(batch)), 0
    if is_traded(batch):
        # No longer a view of what a convolution gives; queries and keys hold that if not rounded.
        values = batch.total * size.heads * size.value_dim * batch.narrow
    batch, H = _recurrent(batch, size.heads)
    slabs = batch.states(H, size.key_dim, size.value_dim, rows)
    always = order + _factors(batch, H * rows**2, False)
    states = _states(batch, H * rows * size.value_dim)
    return Saved(always, always + states, always + states + slabs + values)


def attending(
    batch: Batch,
    size: Heads,
    window: int,
    reader: Literal["map", "gate", "copy"],
    persistent: int = 0,
) -> Saved:
    """Of softmax attention: queries, keys and values as it takes them, output and log-sum-exp.

    `reader` takes the output: the last map, a gate, or something that makes it part of another
    tensor.
    """
    a, w, whole = batch.narrow, batch.wide, batch
    H, J = size.heads, size.key_heads
    group = batch.split.transports.heads if batch.split else 1
    if group > 1:
        batch, H, J = batch.of_group(), H // group, max(J, group) // group
    M, pair = batch.total, J * (size.key_dim + size.value_dim) * a
    results = M * H * (size.value_dim * a + w)
    none = M * H * size.key_dim * a + (M + persistent) * pair + results
    halo, order = 0, _order(whole, group > 1)
    if window and batch.split:
        left = min(window, batch.split.placement.length) - 1
        none += batch.rows * batch.segments * left * pair
        halo = batch.arriving(left) * pair
    # Cores of several ranks lay heads out first: a map that follows has its own copy, and of what
    # comes back from a trade a gate too; one head alone lies so already.
    is_copied = reader == "map" and batch.split and not (window and batch.on_gpu)
    if (is_copied and size.heads > 1) or (group > 1 and reader != "copy"):
        none += whole.total * size.heads * size.value_dim * a
    return Saved(order, order + results + halo, order + none)


def convolved(batch: Batch, channels: int, taps: int, is_held: bool) -> Saved:
    """Of a short convolution: what it takes, with neighbours, and gives, if somebody reads that
    who keeps it; ages of tokens."""
    a, left = batch.narrow, taps - 1
    wide = batch.total + batch.rows * batch.segments * left
    kept = batch.arriving(left) * channels * a
    return Saved(0, kept, (wide + batch.total * is_held) * channels * a + 4 * batch.total)


def is_traded(batch: Batch) -> bool:
    """Whether recurrent cores trade sequence for heads."""
    return batch.split is not None and batch.split.transports.prefix == "ulysses"


def recurrent_heads(batch: Batch, heads: int) -> int:
    """Those of a recurrent core on one process."""
    return _recurrent(batch, heads)[1]


def _recurrent(batch: Batch, heads: int) -> tuple[Batch, int]:
    """The tokens and heads of a recurrent core."""
    if batch.split is None or not is_traded(batch):
        return batch, heads
    return batch.of_group(), heads // batch.split.transports.heads


def _order(batch: Batch, trades: bool) -> int:
    """Of the order of a group's tokens, which trades hold on the host."""
    if batch.split is None or batch.on_gpu or not trades:
        return 0
    return 8 * batch.split.group_tokens


def _states(batch: Batch, elements: int) -> int:
    """Of states that enter, or leave, the segments."""
    return batch.segments * batch.rows * elements * batch.wide if batch.split else 0


def _factors(batch: Batch, elements: int, is_known: bool) -> int:
    """Of factors of the own segments and links of all; and of all factors where these are known or
    gathered."""
    if batch.split is None:
        return 0
    segments = sum(len(own) for own in batch.split.placement.segments)
    everyone = segments if is_known or batch.split.transports.prefix == "allgather" else 0
    each = batch.rows * batch.wide
    return each * (elements * (batch.segments + everyone) + segments)
