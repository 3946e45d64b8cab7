"""Linear attention with a gate per token: decays from weak to so strong that a state is lost."""

import torch
from longctx_kernels.decay_attention import decay_attention_reference
from torch import Tensor

from longctx.sequence.expected import WIDTHS, Gate, Share, Sizes, decay_traffic
from longctx.sequence.ledger import Label, Traffic
from longctx.sequence.local import LocalView
from tests.sequence.cases import LAYER, Case, Setting, Shard, Values

HEADS, KEY, VALUE = 4, 3, 5
GATE_SIZES = {"g": 1, "gk": KEY}
"""Elements of a gate per head, by the name of its argument."""


def log_decay_of(gate: Tensor) -> Tensor:
    """Mild for most tokens, less than -100 for one in fifteen."""
    return -gate.square() * torch.where(gate > 1.5, 50.0, 0.1)


def gated(kind: str) -> Case:
    """A case with a scalar gate, "g", or a diagonal one, "gk"."""

    def sharded(shard: Shard, inputs: Values) -> Tensor:
        q, k, v, gate = (inputs[name] for name in ("q", "k", "v", "gate"))
        return shard.view.decay_attention(q, k, v, log_decay_of(gate))

    def whole(setting: Setting, inputs: Values) -> Tensor:
        q, k, v, gate = (inputs[name].flatten(0, 1)[None] for name in ("q", "k", "v", "gate"))
        cu_seqlens = LocalView(setting.documents, setting.length).cu_seqlens
        out, _ = decay_attention_reference(
            q, k, v, **{kind: log_decay_of(gate)}, scale=1.0, cu_seqlens=cu_seqlens
        )
        return out.view_as(inputs["v"])

    gate = (HEADS,) if kind == "g" else (HEADS, KEY)
    tokens = {"q": (HEADS, KEY), "k": (HEADS, KEY), "v": (HEADS, VALUE), "gate": gate}
    return Case(f"decay-{kind}", tokens, sharded, whole)


GATE_CASES = {kind: gated(kind) for kind in GATE_SIZES}


def gate_ledger(
    kind: str, setting: Setting, rank: int, precision: str = "fp64", gate_width: int = 8
) -> dict[Label, Traffic]:
    """What a rank exchanges, by formula."""
    placement, rows = setting.plan(rank).placement, len(setting.documents)
    share = Share(rank, placement, rows, setting.transports, WIDTHS[precision])
    sizes, gate = Sizes(HEADS, HEADS, KEY, VALUE), Gate(GATE_SIZES[kind], gate_width)
    traffic = decay_traffic(share, sizes, gate)
    return {Label(LAYER, verb, backward): t for (verb, backward), t in traffic.items()}
