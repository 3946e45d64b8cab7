"""Delta rules: a state that corrects what it would have answered for a key.

`S_t = (I - beta_t k_t k_t^T) Diag(a_t) S_{t-1} + beta_t k_t v_t^T`, `o_t = S_t^T q_t`, with unit
keys, in the causal form of the papers: `deltanet` has no decay (arXiv 2406.06484, equation 1),
`gdn` a number per head and token (Gated DeltaNet, 2412.06464, equation 10), `kda` one per key
channel and low-rank gates (Kimi Linear, 2510.26692, equation 1).
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from longctx_kernels.decay_attention import by_kind
from longctx_kernels.delta_attention import delta_attention, delta_attention_reference
from torch import Tensor, nn

from longctx.errors import InputError
from longctx.mixers.base import Backend, Mixer, Place, ValueConfig, indivisible, split_heads
from longctx.mixers.parts import GatedNorm, LowRank, SelectiveDecay, ShortConvolution, unit
from longctx.sequence.expected import Expected, Gate, Share, Sizes, combined, delta_traffic
from longctx.sequence.local import LocalView
from longctx.sequence.view import SequenceView, one_row


@dataclass(frozen=True)
class DeltaConfig(ValueConfig):
    """What all delta rules have."""

    num_key_heads: int = 0
    """Heads of queries and keys, shared by groups of value heads; 0 means num_heads."""
    convolution: int = 4
    """Taps of the short convolution of queries, keys and values; 0 has none."""
    negative_eigenvalues: bool = False
    """Let beta reach 2, so that a state can turn around along a key."""
    gate: Literal["none", "swish", "sigmoid"] = "swish"
    """Activation of the output gate."""
    norm_eps: float = 1e-6
    """Added to the mean square in the output norm."""

    def build(self, place: Place) -> "Delta":
        return Delta(self, place)

    def over_tp(self, width: int, tp: int) -> Self:
        key_heads = self.num_key_heads or self.num_heads
        return replace(super().over_tp(width, tp), num_key_heads=key_heads // tp)

    def tp_refusal(self, tp: int) -> str:
        key_heads = self.num_key_heads or self.num_heads
        return super().tp_refusal(tp) or indivisible("num_key_heads", key_heads, "tp", tp)

    def decay(self, width: int, key_dim: int) -> "Decay | None":
        """Makes the log decay, if there is one."""
        return None

    def output_gate(self, width: int, values: int) -> nn.Module:
        """Makes the gate of all values, if there is one."""
        return nn.Linear(width, values, bias=False)

    def on(self, backend: Backend) -> "DeltaConfig":
        # There are no Triton kernels of ours for delta rules; a model may want them elsewhere.
        return super().on("auto" if backend == "triton" else backend)

    def verbs(self) -> frozenset[str]:
        return frozenset({"prefix", "halo"} if self.convolution else {"prefix"})

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        if self.backend == "triton":
            raise InputError(
                f"{where}.backend = 'triton': delta rules have no such kernels; "
                "choose auto, torch or fla"
            )
        if self.num_key_heads < 0 or self.num_heads % (self.num_key_heads or 1):
            raise InputError(
                f"{where}.num_key_heads = {self.num_key_heads} does not divide "
                f"num_heads = {self.num_heads}"
            )
        if self.convolution not in (0, *range(2, 9)):
            raise InputError(f"{where}.convolution = {self.convolution}: must be 0 or 2..8 taps")
        if self.norm_eps <= 0:
            raise InputError(f"{where}.norm_eps = {self.norm_eps}: must be positive")


@dataclass(frozen=True)
class DeltaNetConfig(DeltaConfig, kind="deltanet"):
    """DeltaNet: the delta rule without decay."""

    gate: Literal["none", "swish", "sigmoid"] = "none"
    """Activation of the output gate."""


@dataclass(frozen=True)
class GDNConfig(DeltaConfig, kind="gdn"):
    """Gated DeltaNet: a decay per head and token."""

    def decay(self, width: int, key_dim: int) -> "Decay":
        return Decay(nn.Linear(width, self.num_heads, bias=False), SelectiveDecay(self.num_heads))


@dataclass(frozen=True)
class KDAConfig(DeltaConfig, kind="kda"):
    """Kimi Delta Attention: a decay per key channel and token."""

    gate: Literal["none", "swish", "sigmoid"] = "sigmoid"
    """Activation of the output gate."""
    gate_rank: int = 0
    """Rank of the maps to decays and output gates; 0 means the size of a head's values."""
    lowest_log_decay: float = 0.0
    """Most negative log decay of a token, as the safe gate has it (-5); 0 has no bound."""

    def decay(self, width: int, key_dim: int) -> "Decay":
        rank = self.gate_rank or self.value_dim or key_dim
        low_rank = LowRank(width, rank, self.num_heads * key_dim)
        return Decay(low_rank, SelectiveDecay(self.num_heads, key_dim, rates=(1, 16)), self)

    def output_gate(self, width: int, values: int) -> nn.Module:
        return LowRank(width, self.gate_rank or values // self.num_heads, values)

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        if self.gate_rank < 0:
            raise InputError(f"{where}.gate_rank = {self.gate_rank}: must be 0 or positive")
        if self.lowest_log_decay > 0:
            raise InputError(
                f"{where}.lowest_log_decay = {self.lowest_log_decay}: must be negative, "
                "or 0 for no bound"
            )


class Decay(nn.Module):
    """The log decay of each token."""

    def __init__(self, project: nn.Module, rate: SelectiveDecay, safe: KDAConfig | None = None):
        super().__init__()
        self.project, self.rate = project, rate
        self.lowest = safe.lowest_log_decay if safe else 0.0

    def forward(self, x_BTD: Tensor) -> Tensor:
        """`[B, T, H]` or `[B, T, H, K]`."""
        if not self.lowest:
            return self.rate(self.project(x_BTD))
        return self.rate.bounded(self.project(x_BTD), self.lowest)


class DeltaParts(NamedTuple):
    """Scaled unit queries, unit keys, values, beta, the log decay and the raw output gate."""

    q_BTHK: Tensor
    k_BTHK: Tensor
    v_BTHV: Tensor
    beta_BTH: Tensor
    log_decay: Tensor | None
    gate_BTHV: Tensor | None


class Delta(Mixer):
    """See the module's docstring."""

    def __init__(self, config: DeltaConfig, place: Place):
        super().__init__()
        self.config, self.num_heads = config, config.num_heads
        width, H, K = place.width, config.num_heads, config.size_of_head(place.width)
        J, V = config.num_key_heads or H, config.value_dim or K
        self.num_key_heads, self.key_dim, self.value_dim = J, K, V
        self.query = nn.Linear(width, J * K, bias=False)
        self.key = nn.Linear(width, J * K, bias=False)
        self.value = nn.Linear(width, H * V, bias=False)
        self.beta = nn.Linear(width, H, bias=False)
        channels = 2 * J * K + H * V
        self.convolve = (
            ShortConvolution(channels, config.convolution) if config.convolution else None
        )
        self.decay = config.decay(width, K)
        self.gate = config.output_gate(width, H * V) if config.gate != "none" else None
        self.norm = GatedNorm(V, "sigmoid" if config.gate == "sigmoid" else "silu", config.norm_eps)
        self.project_out = nn.Linear(H * V, width, bias=False)

    def stretches(self) -> dict[str, tuple[int, ...]]:
        keys = self.num_key_heads * self.key_dim
        return {"convolve.weight": (keys, keys, self.num_heads * self.value_dim)}

    def project(self, x_BTD: Tensor, view: SequenceView) -> DeltaParts:
        config, J, K = self.config, self.num_key_heads, self.key_dim
        mixed = torch.cat((self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)), -1)
        if self.convolve is None:
            mixed = F.silu(mixed)
        else:
            mixed = self.convolve(mixed, view, config.computes_with)
        q, k, v = mixed.split((J * K, J * K, self.num_heads * self.value_dim), -1)
        group = self.num_heads // J
        q_BTHK = (unit(split_heads(q, J)) * K**-0.5).repeat_interleave(group, 2)
        k_BTHK = unit(split_heads(k, J)).repeat_interleave(group, 2)
        logits_BTH = self.beta(x_BTD)
        wide = torch.promote_types(logits_BTH.dtype, torch.float32)
        beta_BTH = (1 + config.negative_eigenvalues) * logits_BTH.to(wide).sigmoid()
        return DeltaParts(
            q_BTHK,
            k_BTHK,
            split_heads(v, self.num_heads),
            beta_BTH,
            None if self.decay is None else self.decay(x_BTD),
            None if self.gate is None else split_heads(self.gate(x_BTD), self.num_heads),
        )

    def core(self, projected: DeltaParts, view: SequenceView) -> Tensor:
        return view.delta_attention(
            projected[:4], projected.log_decay, backend=self.config.computes_with
        )

    def core_reference(self, projected: DeltaParts, view: LocalView) -> Tensor:
        q, k, v, beta = (one_row(x) for x in projected[:4])
        g, _, gk = (None if x is None else one_row(x) for x in by_kind(projected.log_decay))
        y, _ = delta_attention_reference(
            q, k, v, beta, g, gk, scale=1.0, cu_seqlens=view.cu_seqlens
        )
        return y.view_as(projected.v_BTHV)

    def advance(self, projected: DeltaParts, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        g, _, gk = by_kind(projected.log_decay)
        return delta_attention(
            *projected[:4],
            g=g,
            gk=gk,
            scale=1.0,
            initial_state=memory,
            output_final_state=True,
        )

    def read(self, y_BTHV: Tensor, projected: DeltaParts) -> Tensor:
        return self.norm(y_BTHV, projected.gate_BTHV, self.config.computes_with)

    def output(self, y_BTHV: Tensor) -> Tensor:
        return self.project_out(y_BTHV.flatten(2))

    def core_flops(self, contexts_M: Tensor) -> int:
        return 6 * self.num_heads * self.key_dim * self.value_dim * contexts_M.numel()

    def expected_traffic(self, share: Share) -> Expected:
        sizes = Sizes(self.num_heads, self.num_heads, self.key_dim, self.value_dim)
        decays = 0 if self.decay is None else self.decay.rate.bias.numel() // self.num_heads
        parts = [delta_traffic(share, sizes, Gate(1 + decays, share.widths.state), self.key_dim)]
        if self.convolve is not None:
            parts.append(self.convolve.expected_traffic(share))
        return combined(parts)
