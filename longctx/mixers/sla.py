"""SLA, sparse-linear attention (arXiv 2509.24006), made causal: `sparse + linear W` in each head.

The sparse part is softmax attention to the query's own block and the best of those before it; the
linear one, with softmax over the channels for a feature map, goes over all tokens so far, and its
matrix W starts as zero. The paper's is about images and videos: it pools queries as well, so that a
block of them selects together, leaves out blocks that matter least, and in one form keeps the
linear part away from selected blocks. Here each query selects, by mean keys, as MoBA's do.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from longctx_kernels.decay_attention import decay_attention
from longctx_kernels.launch import SIZES
from torch import Tensor, nn

from longctx.mixers.attention import AttentionParts
from longctx.mixers.base import Place, StateConfig
from longctx.mixers.selecting import Selectable, Selecting, SelectingConfig
from longctx.sequence.expected import Expected, Share, Sizes, combined, decay_traffic
from longctx.sequence.local import LocalView
from longctx.sequence.running import wide
from longctx.sequence.sharded import Transports
from longctx.sequence.view import SequenceView


@dataclass(frozen=True)
class SLAConfig(SelectingConfig, StateConfig, kind="sla"):
    """Attention to selected blocks, plus linear attention to everything."""

    def build(self, place: Place) -> "SLA":
        return SLA(self, place)

    def verbs(self) -> frozenset[str]:
        return super().verbs() | {"prefix"}

    def refusal(self, transports: Transports) -> str:
        return StateConfig.refusal(self, transports)

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        size = self.size_of_head(width)
        self.check_state(size, size + 1, f"{where}.head_dim")


class SLA(Selecting):
    """See the module's docstring."""

    def __init__(self, config: SLAConfig, place: Place):
        super().__init__(config, place)
        self.linear_out = nn.Parameter(torch.zeros(self.size, self.size))
        self.backend = config.computes_with
        if self.backend == "auto" and self.size + 1 > SIZES[-1]:
            # The Triton kernels end there.
            self.backend = "torch"

    def initial(self, name: str, _generator: torch.Generator) -> Tensor | None:
        """Nothing of the linear part."""
        return torch.zeros_like(self.linear_out) if name == "linear_out" else None

    def core(self, projected: AttentionParts, view: SequenceView) -> Tensor:
        sums_BTHV = view.decay_attention(*self._operands(projected), None, self.backend)
        return self.attend(projected, view) + self._linear(sums_BTHV)

    def _operands(self, projected: AttentionParts) -> tuple[Tensor, Tensor, Tensor]:
        """Features of queries and keys, and values with a one, for every head."""
        q_BTHK, k_BTJK, v_BTJV = projected[:3]
        v_BTJV = F.pad(v_BTJV, (0, 1), value=1.0)
        q_BTHK, k_BTJK = (wide(x).softmax(-1).type_as(v_BTJV) for x in (q_BTHK, k_BTJK))
        group = self.num_heads // self.num_kv_heads
        return q_BTHK, k_BTJK.repeat_interleave(group, 2), v_BTJV.repeat_interleave(group, 2)

    def _linear(self, sums_BTHV: Tensor) -> Tensor:
        return sums_BTHV[..., :-1] / sums_BTHV[..., -1:] @ self.linear_out

    def core_reference(self, projected: AttentionParts, view: LocalView) -> Tensor:
        q_MHK, k_MJK, v_MJV = (x.flatten(0, 1) for x in projected[:3])
        v_MJV = torch.cat((v_MJV, torch.ones_like(v_MJV[..., :1])), -1)
        rows, state_JKV = [], v_MJV.new_zeros(())
        for t, position in enumerate(view.positions_BT.flatten().tolist()):
            added_JKV = k_MJK[t, :, :, None].softmax(1) @ v_MJV[t, :, None]
            state_JKV = added_JKV if position == 0 else state_JKV + added_JKV
            q_JgK = q_MHK[t].softmax(-1).unflatten(0, (self.num_kv_heads, -1))
            sums_JgV = q_JgK @ state_JKV
            rows.append((sums_JgV[..., :-1] / sums_JgV[..., -1:]).flatten(0, 1) @ self.linear_out)
        linear_BTHV = torch.stack(rows).view(projected.q_BTHK.shape)
        return super().core_reference(projected, view) + linear_BTHV

    def advance(
        self, projected: AttentionParts, memory: tuple[Selectable, Tensor | None] | None
    ) -> tuple[Tensor, Any]:
        known, state = memory or (None, None)
        sums_BTHV, state = decay_attention(
            *self._operands(projected),
            scale=1.0,
            initial_state=state,
            output_final_state=True,
            backend=self.backend,
        )
        sparse_BTHV, known = super().advance(projected, known)
        return sparse_BTHV + self._linear(sums_BTHV), (known, state)

    def core_flops(self, contexts_M: Tensor) -> int:
        """And of the state: what is added, read and put out."""
        H, J, K = self.num_heads, self.num_kv_heads, self.size
        linear = 2 * (H + J) * K * (K + 1) + 2 * H * K * K
        return super().core_flops(contexts_M) + linear * contexts_M.numel()

    def expected_traffic(self, share: Share) -> Expected:
        states = Sizes(self.num_heads, self.num_heads, self.size, self.size + 1)
        return combined((super().expected_traffic(share), decay_traffic(share, states)))
