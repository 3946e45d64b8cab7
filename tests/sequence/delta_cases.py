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
GATE_SIZES = {"none": 0, "g": 1, "gk": KEY, "momentum": 2}
"""Elements of a log decay per head, and of a log momentum, by kind."""


def operands(inputs: Values) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor | None]:
    """q, k, v, beta; the log decay; the log momentum."""
    gate, momentum = inputs.get("gate"), inputs.get("momentum")
    q, v, beta = inputs["q"], inputs["v"], 2 * inputs["beta"].sigmoid()
    if momentum is not None:
        beta, momentum = beta / 4, F.logsigmoid(momentum)
    log_decay = None if gate is None else log_decay_of(gate)
    return (q, F.normalize(inputs["k"], dim=-1), v, beta), log_decay, momentum


def delta(kind: str) -> Case:
    """A case with no gate, a scalar one, "g", a diagonal one, "gk", or a scalar and "momentum"."""

    def sharded(shard: Shard, inputs: Values) -> Tensor:
        return shard.view.delta_attention(*operands(inputs))

    def whole(setting: Setting, inputs: Values) -> Tensor:
        flat = {name: x.flatten(0, 1)[None] for name, x in inputs.items()}
        qkvb, gate, momentum = operands(flat)
        cu_seqlens = LocalView(setting.documents, setting.length).cu_seqlens
        g, gk = (None, gate) if kind == "gk" else (gate, None)
        out, _ = delta_attention_reference(*qkvb, g, gk, momentum, scale=1.0, cu_seqlens=cu_seqlens)
        return out.view_as(inputs["v"])

    scalar = {"gate": (HEADS,)}
    gates = {"none": {}, "g": scalar, "gk": {"gate": (HEADS, KEY)}}
    gates["momentum"] = scalar | {"momentum": (HEADS,)}
    tokens = {"q": (HEADS, KEY), "k": (HEADS, KEY), "v": (HEADS, VALUE), "beta": (HEADS,)}
    return Case(f"delta-{kind}", tokens | gates[kind], sharded, whole)


DELTA_CASES = {kind: delta(kind) for kind in GATE_SIZES}


def delta_ledger(kind: str, setting: Setting, rank: int) -> dict[Label, Traffic]:
    """What a rank exchanges, by formula."""
    placement, rows = setting.plan(rank).placement, len(setting.documents)
    share = Share(rank, placement, rows, setting.transports, WIDTHS["fp64"])
    sizes, gates = Sizes(HEADS, HEADS, KEY, VALUE), Gate(1 + GATE_SIZES[kind], 8)
    state_dim = KEY * (1 + (kind == "momentum"))
    traffic = delta_traffic(share, sizes, gates, state_dim)
    return {Label(LAYER, verb, backward): t for (verb, backward), t in traffic.items()}
