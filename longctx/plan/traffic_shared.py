"""What processes that share heads, hidden columns and the vocabulary exchange in a pass."""

from longctx.model.memory import Checkpointing
from longctx.parallel.vocabulary import CHUNK_ELEMENTS, EMBEDDING, HEAD, LOSS
from longctx.plan.traffic_layers import Layer
from longctx.plan.workload import Workload
from longctx.sequence.expected import Share, all_reduce, combined
from longctx.sequence.ledger import Label, Traffic

Sent = dict[Label, Traffic]
HEADS, COLUMNS = "shared heads", "shared columns"


def shared_layer(
    work: Workload, number: int, layer: Layer, policy: Checkpointing, share: Share
) -> Sent:
    """Of one layer: sums of what its parts give, and backward of gradients of what they take.

    A pass that repeats another one sums once more, but behind a feed-forward layer only if there is
    dropout, which keeps something there.
    """
    tp, tokens = work.split.tp, share.rows * share.own_tokens
    activation, state = share.widths
    stream, passes = tokens * work.settings.model.width, 1 + (policy != "none")
    parts: list[Sent] = []
    if layer.mixer is not None:
        label, norms = Label(number, HEADS), layer.shared_norms
        forward = (
            all_reduce(stream, tp, activation, passes),
            all_reduce(tokens, tp, state, passes * norms),
            all_reduce(1, tp, state, passes * len(layer.reported.losses)),
        )
        backward = all_reduce(stream, tp, state), all_reduce(tokens, tp, state, norms)
        parts += [{label: traffic} for traffic in forward]
        parts += [{label.reversed(): traffic} for traffic in backward]
    if layer.has_mlp:
        parts.append(_columns(work, number, policy, share))
    return combined(parts)


def _columns(work: Workload, number: int, policy: Checkpointing, share: Share) -> Sent:
    """Of a feed-forward layer; each tile is computed once more for its gradients."""
    tp, label = work.split.tp, Label(number, COLUMNS)
    model, most = work.settings.model, work.settings.memory.mlp_tokens
    tokens, (activation, state) = share.rows * share.own_tokens, share.widths
    if not most:
        again = policy != "none" and model.dropout > 0
        forward = all_reduce(tokens * model.width, tp, activation, 1 + again)
        return {label: forward, label.reversed(): all_reduce(tokens * model.width, tp, state)}
    count = -(-share.rows * max(share.placement.lengths) // most)
    sizes = [max(1, tokens // count + (i < tokens % count)) * model.width for i in range(count)]
    return combined(
        {label: all_reduce(n, tp, activation, 2), label.reversed(): all_reduce(n, tp, state)}
        for n in sizes
    )


def shared_vocabulary(work: Workload, share: Share) -> Sent:
    """Of embedding, head and loss, which is computed some tokens at a time."""
    tp, tokens = work.split.tp, share.rows * share.own_tokens
    activation, state = share.widths
    stream = tokens * work.settings.model.width
    rows = work.settings.memory.loss_tokens or max(1, CHUNK_ELEMENTS * tp // work.vocab_size)
    return {
        EMBEDDING: all_reduce(stream, tp, state),
        HEAD.reversed(): all_reduce(stream, tp, activation),
        LOSS: Traffic(-(-tokens // rows), (tp - 1) * 2 * tokens * state),
    }
