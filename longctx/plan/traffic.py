"""What one process of a run exchanges in a step of training, as its ledger counts it.

Exact for all engines but `deepspeed`, whose own exchanges no ledger sees and whose labels end in
`(estimate)`. An ordinary step has no evaluation, no checkpoint and no check of replicas, and does
not follow an evaluation, which leaves FSDP2's embedding and head gathered for the next step.
"""

from collections import Counter

from longctx.model.memory import Checkpointing
from longctx.plan.traffic_engine import Sent, engine_traffic
from longctx.plan.traffic_layers import Layer, Seat, layers_of
from longctx.plan.traffic_shared import shared_layer, shared_vocabulary
from longctx.plan.workload import Workload
from longctx.sequence.expected import WIDTHS, Expected, Share, all_reduce, combined
from longctx.sequence.ledger import OUTSIDE_LAYERS, Label, Traffic

REPEATED = frozenset({"gather", "fetch", "heads"})
"""Verbs that a repeated pass repeats although checkpointing is `keep`."""
SELECT = "select"
METRIC_BYTES = 8
METRICS = 3
"""Beside losses of mixers and statistics: the loss, FLOPs, and whether to stop."""


def traffic_of(work: Workload, rank: int) -> dict[Label, Traffic]:
    """Of one step of one of the processes of the whole run, label by label."""
    seat = Seat(rank % work.split.tp, work.split.tp)
    layers = layers_of(work.settings.model, seat)
    sp_rank = rank // work.split.tp % work.split.sp
    sent = [engine_traffic(work, rank), _totals(work, layers)]
    for rows, passes in Counter(work.micro_rows).items():
        of_pass = _of_pass(work, layers, work.share(sp_rank, rows))
        sent.append({label: _times(passes, traffic) for label, traffic in of_pass.items()})
    return {label: traffic for label, traffic in combined(sent).items() if traffic.calls}


def by_verb(traffic: dict[Label, Traffic]) -> dict[str, Traffic]:
    """The same added up over layers and both directions."""
    return combined({label.verb: sent} for label, sent in traffic.items())


def _times(count: int, traffic: Traffic) -> Traffic:
    return Traffic(count * traffic.calls, count * traffic.received)


def _of_pass(work: Workload, layers: dict[str, Layer], share: Share) -> Sent:
    """A forward and a backward pass, engines' part left out."""
    model, memory, tp = work.settings.model, work.settings.memory, work.split.tp
    exchanged: dict[str, Expected] = {}
    for letter, layer in layers.items():
        expected = layer.expected(share)
        again = _repeated(expected, memory.of_layer(letter), share)
        exchanged[letter] = combined([expected, again])
    sent: list[Sent] = [
        {
            Label(number, *key): traffic
            for number, letter in enumerate(model.letters)
            for key, traffic in exchanged[letter].items()
        }
    ]
    if tp > 1:
        sent.append(shared_vocabulary(work, share))
        for number, letter in enumerate(model.letters):
            policy = memory.of_layer(letter)
            sent.append(shared_layer(work, number, layers[letter], policy, share))
    return combined(sent)


def _repeated(expected: Expected, policy: Checkpointing, share: Share) -> Expected:
    """What is exchanged once more when a layer is computed again before its backward pass.

    Of what lanes select, `keep` repeats keys and values: as many elements as their gradients.
    """
    if policy == "none":
        return {}
    forward = {key: traffic for key, traffic in expected.items() if not key[1]}
    if policy == "full":
        return forward
    again = {key: traffic for key, traffic in forward.items() if key[0] in REPEATED}
    if (SELECT, True) in expected:
        calls, received = expected[SELECT, True]
        activation, state = share.widths
        again[SELECT, False] = Traffic(calls, received // state * activation)
    return again


def _totals(work: Workload, layers: dict[str, Layer]) -> Sent:
    """Metrics in one message, and norms of the gradient and of the update."""
    split, state = work.split, WIDTHS[work.precision].state
    holders, letters = split.dp * split.sp, work.settings.model.letters
    reports = [layers[letter].reported for letter in letters]
    names = frozenset[str]().union(*(report.losses for report in reports))
    numbers = METRICS + len(names) + sum(report.statistics for report in reports)
    sent: Sent = {}
    if holders > 1:
        sent[_outside("metrics")] = all_reduce(numbers, holders, METRIC_BYTES)
    if split.tp > 1:
        for name in ("flag", "loss"):
            sent[_outside(name)] = all_reduce(1, work.processes, METRIC_BYTES)
    if split.engine == "deepspeed" and holders > 1 and "nvme" not in _places(work):
        sent[_outside("update norm")] = all_reduce(1, holders, state)
    if work.processes > 1 and (split.engine == "fsdp2" or split.tp > 1):
        for name in ("gradient norm", "update norm"):
            sent[_outside(name)] = all_reduce(1, work.processes, state)
    return sent


def _outside(name: str) -> Label:
    return Label(OUTSIDE_LAYERS, name)


def _places(work: Workload) -> tuple[str, str]:
    """Where optimizer state and weights lie."""
    return work.settings.memory.optimizer, work.settings.memory.weights
