"""Dynamic mask attention (arXiv 2508.02124), made causal: values decide how long keys are seen.

A head's bias of a key is `A * softplus(v . Delta)`, over the values of all key heads. Seen are the
last keys, and the best by bias of all before the query and with it; the published code takes the
best of the whole sequence, later ones too. At A = 0, where training starts, the latest of all are
the best. The paper's exp around the bias is left out, as its kernels do.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx.mixers.attention import AttentionParts
from longctx.mixers.base import Place
from longctx.mixers.evicting import Evicting, EvictingConfig
from longctx.sequence.survivors import Eviction


@dataclass(frozen=True)
class DMAConfig(EvictingConfig, kind="dma"):
    """Attention whose values say which keys stay."""

    window: int = 16
    """Keys that a query sees for sure, its own included."""

    def eviction(self) -> Eviction:
        return Eviction(self.capacity, self.window, later_wins=True, biased=True)

    def tp_refusal(self, tp: int) -> str:
        if self.key_heads > 1 and tp > 1:
            return (
                f"num_kv_heads = {self.key_heads}: a key is biased by the values of all key heads; "
                "set num_kv_heads to 1, or parallel.tp to 1"
            )
        return super().tp_refusal(tp)

    def build(self, place: Place) -> "DMA":
        return DMA(self, place)


class DMA(Evicting):
    """See the module's docstring."""

    def __init__(self, config: DMAConfig, place: Place):
        super().__init__(config, place)
        J = self.num_kv_heads
        self.relevance = nn.Linear(J * self.size, J, bias=False)
        self.amplitude = nn.Parameter(torch.zeros(J))

    def scored(self, projected: AttentionParts) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        v_BTJV = projected.v_BTJV
        wide = torch.promote_types(v_BTJV.dtype, torch.float32)
        bias_BTJ = F.softplus(self.relevance(v_BTJV.flatten(2)).to(wide)) * self.amplitude
        return (*projected[:3], bias_BTJ)
