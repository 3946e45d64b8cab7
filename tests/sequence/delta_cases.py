"""The delta rule with unit keys, beta up to 2, and gates from weak to strong."""

import torch.nn.functional as F
from longctx_kernels.delta_attention import delta_attention_reference
from torch import Tensor

from longctx.sequence.expected import WIDTHS, Gate, Share, Sizes, delta_traffic
from longctx.sequence.ledger import Label, Traffic
from longctx.sequence.local import LocalView
from tests.sequence.cases import LAYER, Case, Setting, Shard, Values
from tests.sequence.gate_cases import log_decay_of

HEADS, KEY, VALUE = 4, 3, 5
GATE_SIZES = {"none": 0, "g": 1, "gk": KEY}
"""Elements of a log decay per head, by kind."""


def operands(inputs: Values) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """q, k, v, beta, and the log decay."""
    gate = inputs.get("gate")
    q, v, beta = inputs["q"], inputs["v"], 2 * inputs["beta"].sigmoid()
    return (q, F.normalize(inputs["k"], dim=-1), v, beta), None if gate is None else log_decay_of(
        gate
    )


def delta(kind: str) -> Case:
    """A case with no gate, a scalar one, "g", or a diagonal one, "gk"."""

    def sharded(shard: Shard, inputs: Values) -> Tensor:
        return shard.view.delta_attention(*operands(inputs))

    def whole(setting: Setting, inputs: Values) -> Tensor:
        qkvb, gate = operands({name: x.flatten(0, 1)[None] for name, x in inputs.items()})
        cu_seqlens = LocalView(setting.documents, setting.length).cu_seqlens
        gates = {} if gate is None else {kind: gate}
        out, _ = delta_attention_reference(*qkvb, **gates, scale=1.0, cu_seqlens=cu_seqlens)
        return out.view_as(inputs["v"])

    gate = {"none": {}, "g": {"gate": (HEADS,)}, "gk": {"gate": (HEADS, KEY)}}[kind]
    tokens = {"q": (HEADS, KEY), "k": (HEADS, KEY), "v": (HEADS, VALUE), "beta": (HEADS,)}
    return Case(f"delta-{kind}", tokens | gate, sharded, whole)


DELTA_CASES = {kind: delta(kind) for kind in GATE_SIZES}


def delta_ledger(kind: str, setting: Setting, rank: int) -> dict[Label, Traffic]:
    """What a rank exchanges, by formula."""
    placement, rows = setting.plan(rank).placement, len(setting.documents)
    share = Share(rank, placement, rows, setting.transports, WIDTHS["fp64"])
    sizes, gates = Sizes(HEADS, HEADS, KEY, VALUE), Gate(1 + GATE_SIZES[kind], 8)
    traffic = delta_traffic(share, sizes, gates)
    return {Label(LAYER, verb, backward): t for (verb, backward), t in traffic.items()}
