"""Local linear attention (LLA, arXiv 2510.01450): softmax attention that also fits a slope.

Softmax attention is the constant that fits the values best around a query, weighted by
`w_j = exp(q.k_j s)`; LLA fits a linear function of the key instead and reads it at the query. The
weights of values are `w_j (1 - rho.(k_j - q)) / (omega - mu.rho)` with `rho = Sigma^-1 mu`, sums
over the document so far, see `longctx_kernels.lla`; they sum to 1 and may be negative. `ridge`
pulls slopes to zero, where softmax attention is. As in the released code it is added to Sigma times
omega, and is a constant. Ours: rotary positions and QK-norm as in `softmax`, a direct solution in
place of conjugate gradients.

No summary of fixed size stands for the past, and partial results of other ranks cannot be merged
(the slope needs all keys first), so keys and values are gathered whole: that bounds the length.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from longctx_kernels.lla import local_linear_attention, local_linear_attention_reference
from torch import Tensor, nn

from longctx.errors import InputError
from longctx.mixers.base import Backend, HeadsConfig, Mixer, Place, RMSNorm, split_heads
from longctx.mixers.parts import rotate
from longctx.sequence.expected import Expected, Share, gathered_rows_traffic
from longctx.sequence.local import LocalView
from longctx.sequence.sharded import Transports
from longctx.sequence.view import SequenceView


@dataclass(frozen=True)
class LLAConfig(HeadsConfig, kind="lla"):
    """Causal local linear attention."""

    ridge: float = 10.0
    """Added to the mean square of key differences in every direction; the larger, the closer to
    softmax attention."""
    longest: int = 32768
    """Longest sequence it is built for: every rank holds the keys and values of all tokens."""
    rope_base: float = 10000.0
    """Base of the rotary frequencies."""
    rope_fraction: float = 1.0
    """Share of each head that is rotated; 0 uses no positions (NoPE)."""
    qk_norm: bool = True
    """RMSNorm of queries and keys per head."""

    def build(self, place: Place) -> "LLA":
        return LLA(self, place)

    def on(self, backend: Backend) -> "LLAConfig":
        # It is in PyTorch alone; a model may want other kernels elsewhere.
        return super().on("auto" if backend in ("triton", "fla") else backend)

    def verbs(self) -> frozenset[str]:
        return frozenset({"gather"})

    def check_length(self, seq_len: int, where: str) -> None:
        if seq_len > self.longest:
            raise InputError(
                f"{where}.longest = {self.longest} is shorter than train.seq_len = {seq_len}: "
                "every rank would hold all keys; shorten sequences, or raise it if that fits"
            )

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        if self.backend in ("triton", "fla"):
            raise InputError(
                f"{where}.backend = {self.backend!r}: local linear attention has no such kernels; "
                "choose auto or torch"
            )
        if self.ridge <= 0:
            raise InputError(f"{where}.ridge = {self.ridge}: must be positive")
        if self.longest < 1:
            raise InputError(f"{where}.longest = {self.longest}: must be at least 1")
        if not 0 <= self.rope_fraction <= 1:
            raise InputError(f"{where}.rope_fraction = {self.rope_fraction}: must be in 0..1")
        if self.rope_base <= 0:
            raise InputError(f"{where}.rope_base = {self.rope_base}: must be positive")

    def refusal(self, transports: Transports) -> str:
        """Nothing: it gathers, whatever the transport."""
        return ""


class LLAParts(NamedTuple):
    """Rotated queries and keys, and values."""

    q_BTHK: Tensor
    k_BTHK: Tensor
    v_BTHK: Tensor


class LLA(Mixer):
    """See the module's docstring."""

    def __init__(self, config: LLAConfig, place: Place):
        super().__init__()
        self.config, self.num_heads = config, config.num_heads
        H, K = config.num_heads, config.size_of_head(place.width)
        self.size = K
        self.query = nn.Linear(place.width, H * K, bias=False)
        self.key = nn.Linear(place.width, H * K, bias=False)
        self.value = nn.Linear(place.width, H * K, bias=False)
        self.query_norm = RMSNorm(K) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(K) if config.qk_norm else nn.Identity()
        self.project_out = nn.Linear(H * K, place.width, bias=False)

    def project(self, x_BTD: Tensor, view: SequenceView) -> LLAParts:
        H, base, fraction = self.num_heads, self.config.rope_base, self.config.rope_fraction
        q_BTHK = self.query_norm(split_heads(self.query(x_BTD), H))
        k_BTHK = self.key_norm(split_heads(self.key(x_BTD), H))
        v_BTHK = split_heads(self.value(x_BTD), H)
        q, k = (rotate(x, view.positions_BT, base, fraction) for x in (q_BTHK, k_BTHK))
        return LLAParts(q.type_as(v_BTHK), k.type_as(v_BTHK), v_BTHK)

    @property
    def _options(self) -> tuple[float, float]:
        return self.config.ridge, self.size**-0.5

    def core(self, projected: LLAParts, view: SequenceView) -> Tensor:
        q_BTHK, k_BTHK, v_BTHK = projected
        last_BT = view.token_ids_BT
        first_BT = last_BT - view.positions_BT
        k_BGHK, v_BGHK = view.gather(torch.cat((k_BTHK, v_BTHK), -1)).chunk(2, -1)
        return local_linear_attention(q_BTHK, k_BGHK, v_BGHK, first_BT, last_BT, *self._options)

    def core_reference(self, projected: LLAParts, view: LocalView) -> Tensor:
        last_BT = view.token_ids_BT
        first_BT = last_BT - view.positions_BT
        return local_linear_attention_reference(*projected, first_BT, last_BT, *self._options)

    def advance(
        self, projected: LLAParts, memory: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q_BTHK, k_BGHK, v_BGHK = projected
        if memory is not None:
            k_BGHK, v_BGHK = (torch.cat(pair, 1) for pair in zip(memory, (k_BGHK, v_BGHK)))
        B, T = q_BTHK.shape[:2]
        last_BT = torch.arange(k_BGHK.shape[1], device=q_BTHK.device)[-T:].expand(B, T)
        first_BT = torch.zeros_like(last_BT)
        y = local_linear_attention(q_BTHK, k_BGHK, v_BGHK, first_BT, last_BT, *self._options)
        return y, (k_BGHK, v_BGHK)

    def output(self, y_BTHV: Tensor) -> Tensor:
        return self.project_out(y_BTHV.flatten(2))

    def core_flops(self, contexts_M: Tensor) -> int:
        """Of scores, mu, Sigma, slopes and values; solutions are not products of matrices."""
        return 2 * self.num_heads * self.size * (self.size + 4) * int(contexts_M.sum())

    def expected_traffic(self, share: Share) -> Expected:
        return gathered_rows_traffic(share, 2 * self.num_heads * self.size)
