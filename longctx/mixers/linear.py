"""Linear attention: a feature map, a constant decay or none, a state of fixed size.

`basic` is elu1 with a denominator. Lightning Attention is silu with the `alibi` decay (the
schedule of the TransNormerLLM code; `minimax` differs in the last layer) or `paper` (equation 10
of arXiv 2405.17381); RetNet's constants are `retention`. TransNormerLLM (arXiv 2307.14995) is
Lightning with `lrpe = "first"` and `norm = "simple"`; MiniMax-01 (2501.08313) is Lightning with
silu of values too, `norm = "all"` and a sigmoid gate.

The `inline` read-out (arXiv 2412.06590) gives token j the weight `a_ij - mean_j a_ij + 1 / n` with
`a_ij = q_i.k_j / (n sqrt(K))`: weights sum to 1 and may be negative. The paper is about images and
sums over all n tokens; here, which is ours, over the n tokens of the document up to the query, so
that sums of k v^T, k and v are its state. The paper's local residual is left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from longctx_kernels.decay_attention import decay_attention, decay_attention_reference
from longctx_kernels.launch import SIZES
from torch import Tensor, nn

from longctx.errors import InputError
from longctx.mixers.base import Mixer, Place, RMSNorm, ValueConfig, split_heads
from longctx.mixers.feature_maps import MAPS, Heads, Lrpe, wide
from longctx.mixers.parts import GatedNorm
from longctx.sequence.expected import Expected, Share, Sizes, combined, decay_traffic
from longctx.sequence.local import LocalView
from longctx.sequence.view import SequenceView, one_row

GATES: dict[str, Callable[[Tensor], Tensor]] = {"swish": F.silu, "sigmoid": torch.sigmoid}

LARGEST_STATE = 32 * 2**20
"""Bytes of a layer's state for one sequence, in fp32."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Linear attention of q, k, v."""


def log_decay(schedule: str, num_heads: int, place: Place) -> Tensor | None:
    """Log decay per head of a named schedule, at most 0."""
    h = torch.arange(1, num_heads + 1, dtype=torch.float64)
    if schedule in ("alibi", "minimax"):
        last = max(1, place.depth - 1) if schedule == "alibi" else place.depth - 1 + 1e-5
        return -torch.exp2(-8 * h / num_heads) * (1 - place.layer / last + 1e-5)
    if schedule == "paper":
        return -8 * h / num_heads * (1 - place.layer / place.depth)
    if schedule == "retention":
        return torch.log1p(-torch.exp2(-4 - h))
    return None


@dataclass(frozen=True)
class LinearConfig(ValueConfig, kind="linear"):
    """Linear attention with constant decay (lightning, retention) or none."""

    feature_map: str = "silu"
    """Map of queries and keys: identity, silu, unit, relu, elu1, sigmoid, softmax, hedgehog, t2r,
    based, rebased, dpfp, cosformer, fast."""
    feature_dim: int = 16
    """Key and query size of a head for based, rebased and fast, whose features are its pairs."""
    nu: int = 3
    """Rolled copies that dpfp multiplies features with."""
    longest: int = 0
    """The longest document that cosformer can tell positions of, at least train.seq_len."""
    lrpe: Literal["none", "first", "all"] = "none"
    """Layers that turn queries and keys by position: TransNormerLLM's paper does in the first."""
    decay: Literal["none", "alibi", "minimax", "paper", "retention"] = "alibi"
    """Schedule of the constant decay per head and layer."""
    denominator: bool = False
    """Divide by the sum of the weights; needs a positive feature map."""
    inline: bool = False
    """Centre the weights and add 1 / tokens to each instead; needs decay = "none"."""
    gate: Literal["none", "swish", "sigmoid"] = "swish"
    """Activation of the output gate."""
    output_norm: bool = True
    """Normalise each head's output."""
    norm: Literal["rms", "all", "simple"] = "rms"
    """How: RMSNorm, one over the channels of all heads, or x sqrt(V) / |x| without weights."""
    value_map: Literal["identity", "silu"] = "identity"
    """Map of values."""

    def build(self, place: Place) -> "Linear":
        return Linear(self, place)

    def heads(self, width: int) -> Heads:
        """What the feature map is made for."""
        is_small = MAPS[self.feature_map].sized_by == "feature_dim"
        size = self.feature_dim if is_small else self.size_of_head(width)
        return Heads(self.num_heads, size, self.nu, self.longest)

    def size_of_value(self, width: int) -> int:
        """Value size of a head."""
        return self.value_dim or self.size_of_head(width)

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        if self.feature_map not in MAPS:
            known = ", ".join(MAPS)
            raise InputError(f"{where}.feature_map = {self.feature_map!r}: expected one of {known}")
        for name, least in {"feature_dim": 2, "nu": 1, "longest": 0}.items():
            if (value := getattr(self, name)) < least:
                raise InputError(f"{where}.{name} = {value}: must be at least {least}")
        features = 2 * self.size_of_head(width)
        if self.feature_map == "dpfp" and self.nu >= features:
            raise InputError(
                f"{where}.nu = {self.nu}: must be below {features}, twice the size of a head, "
                "from where copies repeat"
            )
        if MAPS[self.feature_map].needs_longest and self.longest == 0:
            raise InputError(
                f"{where}.longest = 0: feature_map = {self.feature_map!r} needs the length of the "
                "longest document; set it to train.seq_len"
            )
        self._check_read(where)
        self._check_state(width, where)

    def _check_read(self, where: str) -> None:
        positive = ", ".join(name for name, entry in MAPS.items() if entry.is_positive)
        if self.denominator and not MAPS[self.feature_map].is_positive:
            raise InputError(
                f"{where}.denominator needs a positive feature map; {self.feature_map!r} is not: "
                f"choose one of {positive}, or leave the denominator out"
            )
        if self.denominator and (self.inline or self.lrpe != "none"):
            raise InputError(
                f"{where}.denominator needs weights that are not negative, which "
                f"{where}.{'inline' if self.inline else 'lrpe'} lacks: leave one of them out"
            )
        if self.inline and self.decay != "none":
            raise InputError(
                f"{where}.inline counts every token alike; decay = {self.decay!r} does not: "
                'set decay = "none"'
            )

    def _check_state(self, width: int, where: str) -> None:
        entry = MAPS[self.feature_map]
        with torch.device("meta"):
            features = entry.make(self.heads(width)).size * (1 if self.lrpe == "none" else 2)
        if self.backend == "triton" and features > SIZES[-1]:
            raise InputError(
                f"{where}.backend = 'triton': {self.feature_map!r} has {features} features and the "
                f"kernels go up to {SIZES[-1]}; choose auto or torch"
            )
        size = 4 * self.num_heads * features * (self.size_of_value(width) + 1)
        if size > LARGEST_STATE:
            raise InputError(
                f"{where}.{entry.sized_by} = {getattr(self, entry.sized_by)}: the {features} "
                f"features of {self.feature_map!r} make a state of {size / 2**20:.1f} MiB a layer "
                f"and sequence, above the limit of {LARGEST_STATE >> 20} MiB; set a smaller "
                f"{entry.sized_by} or value_dim"
            )

    def check_length(self, seq_len: int, where: str) -> None:
        if MAPS[self.feature_map].needs_longest and self.longest < seq_len:
            raise InputError(
                f"{where}.longest = {self.longest} is shorter than train.seq_len = {seq_len}; "
                f"set it to {seq_len} or more"
            )


class SimpleRMSNorm(nn.Module):
    """`x sqrt(V) / |x|` over the last dimension, in at least fp32: SRMSNorm, arXiv 2307.14995."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalised `x` in the dtype of `x`; lengths below 1e-6 count as that."""
        return (F.normalize(wide(x), dim=-1, eps=1e-6) * x.shape[-1] ** 0.5).to(x.dtype)


class LinearParts(NamedTuple):
    """Mapped queries and keys, values, the raw output gate, and for inline the tokens seen."""

    q_BTHK: Tensor
    k_BTHK: Tensor
    v_BTHV: Tensor
    gate_BTHV: Tensor | None
    seen_BT: Tensor | None


class Linear(Mixer):
    """See the module's docstring."""

    log_decay_H: Tensor | None

    def __init__(self, config: LinearConfig, place: Place):
        super().__init__()
        self.config, self.num_heads = config, config.num_heads
        heads, entry = config.heads(place.width), MAPS[config.feature_map]
        H, K, V = config.num_heads, heads.size, config.size_of_value(place.width)
        self.query = nn.Linear(place.width, H * K, bias=False)
        self.key = nn.Linear(place.width, H * K, bias=False)
        self.value = nn.Linear(place.width, H * V, bias=False)
        self.gate = nn.Linear(place.width, H * V, bias=False) if config.gate != "none" else None
        self.map_query, self.map_key = entry.make(heads), entry.make(heads)
        self.features = self.map_query.size
        is_turned = config.lrpe == "all" or (config.lrpe == "first" and place.layer == 0)
        self.lrpe = Lrpe(H, self.features) if is_turned else None
        self.features *= 2 if is_turned else 1
        self.norm: nn.Module | None = None
        if config.output_norm:
            self.norm = self._norm(config, V)
        self.project_out = nn.Linear(H * V, place.width, bias=False)
        self.register_buffer("log_decay_H", log_decay(config.decay, H, place), persistent=False)
        self.score_scale, self.value_size = K**-0.5, V
        self.has_sum = config.denominator or config.inline
        self.state_size = self.features * (V + self.has_sum) + V * config.inline
        self.backend = config.computes_with
        if self.backend == "auto" and max(self.features, V + self.has_sum) > SIZES[-1]:
            # The Triton kernels end there.
            self.backend = "torch"

    @staticmethod
    def _norm(config: LinearConfig, value_dim: int) -> nn.Module:
        if config.norm == "rms":
            return GatedNorm(value_dim, "sigmoid" if config.gate == "sigmoid" else "silu")
        return RMSNorm(config.num_heads * value_dim) if config.norm == "all" else SimpleRMSNorm()

    def project(self, x_BTD: Tensor, view: SequenceView) -> LinearParts:
        positions_BT = view.positions_BT
        v_BTHV = split_heads(self.value(x_BTD), self.num_heads)
        v_BTHV = F.silu(v_BTHV) if self.config.value_map == "silu" else v_BTHV
        q_BTHK = self.map_query(split_heads(self.query(x_BTD), self.num_heads), positions_BT)
        k_BTHK = self.map_key(split_heads(self.key(x_BTD), self.num_heads), positions_BT)
        if self.lrpe is not None:
            q_BTHK, k_BTHK = self.lrpe(q_BTHK, k_BTHK, positions_BT)
        if self.has_sum:
            v_BTHV = F.pad(v_BTHV, (0, 1), value=1.0)
        gate = None if self.gate is None else split_heads(self.gate(x_BTD), self.num_heads)
        seen_BT = positions_BT + 1 if self.config.inline else None
        return LinearParts(q_BTHK.type_as(v_BTHV), k_BTHK.type_as(v_BTHV), v_BTHV, gate, seen_BT)

    def core(self, projected: LinearParts, view: SequenceView) -> Tensor:
        def attend(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor) -> Tensor:
            return view.decay_attention(q_BTHK, k_BTHK, v_BTHV, self.log_decay_H, self.backend)

        return self._weighted(projected, attend)

    def core_reference(self, projected: LinearParts, view: LocalView) -> Tensor:
        def attend(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor) -> Tensor:
            q, k, v = one_row(q_BTHK), one_row(k_BTHK), one_row(v_BTHV)
            y, _ = decay_attention_reference(
                q, k, v, g_gamma=self.log_decay_H, scale=1.0, cu_seqlens=view.cu_seqlens
            )
            return y.view_as(v_BTHV)

        return self._weighted(projected, attend)

    def advance(
        self, projected: LinearParts, memory: tuple[Tensor | None, ...] | None
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        before, after = iter(memory or (None, None)), list[Tensor | None]()

        def attend(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor) -> Tensor:
            y_BTHV, state = decay_attention(
                q_BTHK,
                k_BTHK,
                v_BTHV,
                g_gamma=self.log_decay_H,
                scale=1.0,
                initial_state=next(before),
                output_final_state=True,
            )
            after.append(state)
            return y_BTHV

        return self._weighted(projected, attend), tuple(after)

    def _weighted(self, projected: LinearParts, attend: Attend) -> Tensor:
        """What tokens read, with whichever attention computes the sums."""
        q_BTHK, k_BTHK, v_BTHV, _, seen_BT = projected
        y_BTHV = attend(q_BTHK, k_BTHK, v_BTHV)
        if self.config.denominator:
            return y_BTHV[..., :-1] / y_BTHV[..., -1:].clamp(min=1e-6)
        if seen_BT is None:
            return y_BTHV
        v_BTHV = v_BTHV[..., :-1]
        # They depend on the values, so that what is exchanged for them also is on the way back.
        one_BTH1 = 1 + 0 * v_BTHV[..., :1]
        total_BTHV = wide(attend(one_BTH1, one_BTH1, v_BTHV))
        seen_BT11 = seen_BT[..., None, None].to(total_BTHV.dtype)
        mean_BTHV = wide(y_BTHV) * self.score_scale / seen_BT11
        own_BTH1 = (1 - mean_BTHV[..., -1:]) / seen_BT11
        return (mean_BTHV[..., :-1] + own_BTH1 * total_BTHV).type_as(v_BTHV)

    def read(self, y_BTHV: Tensor, projected: LinearParts) -> Tensor:
        if isinstance(self.norm, GatedNorm):
            return self.norm(y_BTHV, projected.gate_BTHV, self.backend)
        if self.norm is not None and self.config.norm == "all":
            y_BTHV = self.norm(y_BTHV.flatten(2)).view_as(y_BTHV)
        elif self.norm is not None:
            y_BTHV = self.norm(y_BTHV)
        if projected.gate_BTHV is not None:
            y_BTHV = y_BTHV * GATES[self.config.gate](projected.gate_BTHV)
        return y_BTHV

    def output(self, y_BTHV: Tensor) -> Tensor:
        return self.project_out(y_BTHV.flatten(2))

    def core_flops(self, contexts_M: Tensor) -> int:
        return 4 * self.num_heads * self.state_size * contexts_M.numel()

    def expected_traffic(self, share: Share) -> Expected:
        H, V = self.num_heads, self.value_size
        parts = [decay_traffic(share, Sizes(H, H, self.features, V + self.has_sum))]
        if self.config.inline:
            parts.append(decay_traffic(share, Sizes(H, H, 1, V)))
        return combined(parts)
