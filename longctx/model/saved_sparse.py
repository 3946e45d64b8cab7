"""What sparse attention keeps for its backward pass: of survivors of a window, or of blocks.

However much data choose, what is chosen has a fixed size.
"""

from torch import Tensor

from longctx.mixers.attention import Attention
from longctx.mixers.compression import Pooling
from longctx.mixers.lte import DILATION, LTE, TAPS
from longctx.mixers.nsa import NSA
from longctx.model.in_flight import Batch
from longctx.model.saved_cores import Saved
from longctx.sequence.block_sums import Blocks, piece_counts
from longctx.sequence.eviction import longest
from longctx.sequence.fetch import arriving_items
from longctx.sequence.placement import place
from longctx.sequence.plan import Plan
from longctx.sequence.policy import Window

TABLE, INDEX = 4, 8
"""Bytes of a position or a block in a list that kernels take, and of an index in PyTorch."""


def surviving(mixer: LTE, width: int, batch: Batch) -> Saved:
    """Of attention to a window and to tokens that learn to stay."""
    M, a, w = batch.total, batch.narrow, batch.wide
    J, K, plan = mixer.num_kv_heads, mixer.size, _plan(batch)
    none = _projected(mixer, width, batch, 1)
    # Keys before their norm once more; values and their factor; a score and its positive part.
    none += M * J * a * (K * mixer.config.qk_norm + K + 1) + 2 * M * J * w
    keep = J * w if batch.split else 0
    near = batch.rows * plan.placement.beside(plan.rank, DILATION, DILATION)[0]
    for taps in mixer.scorer.layers.parameters():
        # What taps see, what they give and its sigmoid; taps, repeated for each row.
        seen, made = taps.shape[1:]
        none += M * J * (seen + 2 * made) * a + _repeated(taps, batch)
        keep += near * J * seen // TAPS * a
    none += M * J * mixer.scorer.logit.shape[1] * a + _repeated(mixer.scorer.logit, batch)
    core = _survivors(mixer, batch, plan)
    # The output in the order of tokens; maybe the gate, and both together.
    none += M * mixer.num_heads * K * a * (1 if mixer.gate is None else 3)
    return core.plus(Saved(0, keep, none))


def _survivors(mixer: LTE, batch: Batch, plan: Plan) -> Saved:
    """Of the core. Segments of rows are lanes, as long as the longest segment of all ranks."""
    a, w, rule = batch.narrow, batch.wide, mixer.eviction
    H, J, K = mixer.num_heads, mixer.num_kv_heads, mixer.size
    lanes, T = len(plan.segments) * plan.rows, longest(plan)
    slots, pair = rule.left + T, 2 * K
    results = lanes * T * H * (K * a + w)
    # Where slots and queries are found, and operands.
    none = lanes * (slots + T) * INDEX + lanes * T * (H * K * a + J * TABLE) + results
    keep = results
    everyone = len(plan.placement.order)
    if everyone > 1:
        sent = min(rule.capacity, T)
        entering = min(rule.capacity, everyone * sent)
        # Keys by slot; which of them are sent, and enter; what all segments send, for each own one,
        # but one copy of a single row and key head; which place each key gets, and keys before and
        # after that.
        none += lanes * J * pair * (slots * a + (sent + entering) * INDEX)
        shown = lanes if plan.rows * J > 1 else 1
        none += shown * J * everyone * sent * pair * a
        slots += entering
        none += lanes * J * slots * pair * (a + INDEX)
        keep += everyone * plan.rows * J * sent * (pair * a + w + INDEX)
    none += lanes * J * slots * (pair * a + 2 * TABLE)
    return Saved(0, keep, none)


def selecting(mixer: NSA, width: int, batch: Batch) -> Saved:
    """Of attention to compressed blocks, to selected ones and to a window."""
    M, a, w, config = batch.total, batch.narrow, batch.wide, mixer.config
    H, J, K, plan = mixer.num_heads, mixer.num_kv_heads, mixer.size, _plan(batch)
    own = config.branch_keys == "own"
    none = _projected(mixer, width, batch, 1 + 2 * own)
    if own:
        turned = 2 * (int(config.rope_fraction * K) // 2)
        none += M * (2 * J * K * a * config.qk_norm + turned * w)
    pair, results = 2 * J * K, 3 * M * H * (K * a + w)
    none += M * H * K * a + results
    near = arriving_items(plan, Window(config.window))
    # Selected blocks; their keys and values, and those near.
    none += M * J * config.num_blocks * TABLE
    none += (_tokens_in_blocks(plan, config.block) + M + near) * pair * a
    # Shares of branches, all their outputs, and the sum; maybe the gate, and both together.
    none += M * H * a * (3 + 3 * K + K * (1 if mixer.gate is None else 3))
    size = mixer.compress.block, mixer.compress.stride
    counts = piece_counts(plan.placement, plan.documents, *size)
    blocks = Blocks(plan, *size).total
    for pooling in (mixer.compress.key, mixer.compress.value):
        none += _pooled(pooling, batch, J, blocks, counts[plan.rank])
    none += 0 if blocks else TABLE
    keep = results + M * J * config.num_blocks * INDEX + sum(counts) * pair * w
    return Saved(0, keep, none)


def _pooled(pooling: Pooling, batch: Batch, heads: int, blocks: int, pieces: int) -> int:
    """Of blocks, of which this process has pieces; at least one key is read."""
    a, w, K = batch.narrow, batch.wide, pooling.size
    total = max(1, blocks) * heads * K * a
    if pooling.has_layers:
        # Pieces; sums, and what comes of their silu.
        total += pieces * heads * pooling.block * K * a + blocks * heads * K * (w + a)
        weights = pooling.first.numel() + pooling.second.numel()
        total += weights * a if a < w and batch.rounds_weights else 0
    return total


def _projected(mixer: Attention, width: int, batch: Batch, more: int) -> int:
    """Of queries and keys before norms and rotation, and of what so many more maps read than those
    to queries, keys, values and a gate."""
    M, K, J = batch.total, mixer.size, mixer.num_kv_heads
    total = batch.normed(width, 3 + more + (mixer.gate is not None))
    total += M * (mixer.num_heads + J) * K * batch.narrow * mixer.config.qk_norm
    turned = int(mixer.config.rope_fraction * K) // 2
    return total + M * 2 * 2 * turned * batch.wide


def _repeated(weights: Tensor, batch: Batch) -> int:
    """Weights of a product by row and key head: those of a single one are not copied."""
    rounds = batch.narrow < batch.wide and batch.rounds_weights
    copies = batch.rows if batch.rows > 1 and len(weights) > 1 else int(rounds)
    return copies * weights.numel() * batch.narrow


def _plan(batch: Batch) -> Plan:
    if batch.share is not None:
        return batch.share.plan
    return Plan(place("contiguous", 1, batch.tokens), 0, ((0,),) * batch.rows)


def _tokens_in_blocks(plan: Plan, block: int) -> int:
    """Of own tokens and all before them in their documents, which fill whole blocks."""
    ends: dict[tuple[int, int], int] = {}
    for piece in plan.pieces:
        end = piece.position - piece.document + piece.stop - piece.start
        key = piece.row, piece.document
        ends[key] = max(end, ends.get(key, 0))
    return sum(-(-end // block) * block for end in ends.values())
