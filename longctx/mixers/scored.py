"""Attention with other scores and normalisers than softmax of scaled products.

With s_ij = q_i.k_j / sqrt(K), n_i the keys that query i sees and p_i its position from 1:

    sigmoid    sum_j sigmoid(s_ij - ln n_i) v_j, arXiv 2409.04431; ln of a fixed length there
    relu       ReLA, sum_j relu(s_ij) v_j =: x, then s x / rms(x) sigmoid(w x) over all heads
    softplus   LSSA, softplus(s_ij) over their sum, s_ij = ln K ln p_i cos(q_i, k_j)
    reweighted LSSAR, with such weights a_ij, relu(n_i a_ij - 1)^15 over their sum, without the 1
               if n_i is at most 3, arXiv 2501.13428
    signed     Cog, sign(s_ij) softmax_j(|s_ij|)

To s_ij can be added -2^(-8h/H) (i - j) (ALiBi), or c_i - c_j, c the sum of log sigmoid(w x + b) so
far (the Forgetting Transformer). SSA multiplies queries by 1 + tanh(f(x)) + exp(-exp(b)) ln p and
values by 1 + tanh(g(x)), f and g two small layers (arXiv 2411.12892). A sink is a key of score b_h
and value 0. Shared heads (MHE) have one projection, and a vector of their own that is added to it.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longctx.errors import InputError
from longctx.mixers.attention import Attention, SparseConfig
from longctx.mixers.base import HeadsConfig, Place
from longctx.mixers.parts import log_sigmoid
from longctx.mixers.score_parts import (
    ReluGate,
    Remembered,
    SharedHeads,
    Temperature,
    alibi_slopes,
    attend_on,
)
from longctx.sequence.expected import Expected, Share, combined, running_sum_traffic
from longctx.sequence.local import LocalView
from longctx.sequence.patterned import Scoring, patterned_attention, patterned_traffic
from longctx.sequence.policy import Full, Lifetime, Window
from longctx.sequence.running import Resumed, Runs, wide
from longctx.sequence.sharded import Transports
from longctx.sequence.view import SequenceView


@dataclass(frozen=True)
class ScoredConfig(SparseConfig, kind="scored"):
    """Attention whose scores and normaliser can be chosen."""

    normaliser: Literal["softmax", "sigmoid", "relu", "softplus", "reweighted", "signed"] = (
        "softmax"
    )
    """What makes weights of scores; reweighted has no kernels and is slow on a GPU."""
    window: int = 0
    """Keys a query sees, its own included; 0 sees the whole document."""
    sinks: int = 0
    """First tokens of a document that stay visible beyond the window."""
    sigmoid_length: int = 0
    """Keys n in the bias -ln n of sigmoid scores; 0 counts those that each query sees."""
    bias: Literal["none", "alibi", "forget"] = "none"
    """What is added to scores: slopes against distance, or the sum of learned log forget gates."""
    temperature: Literal["none", "ssa"] = "none"
    """Factors of queries and values that depend on the token and its position."""
    sink: bool = False
    """A learned logit a head that takes part in softmax and has no value."""
    heads: Literal["own", "shared"] = "own"
    """Projections of each head, or one for all and a vector a head that is added to it."""

    def build(self, place: Place) -> "Scored":
        return Scored(self, place)

    def policy(self) -> Lifetime:
        """Who sees whom."""
        return Window(self.window, self.sinks) if self.window else Full()

    def verbs(self) -> frozenset[str]:
        return frozenset({"fetch", "prefix"} if self.bias == "forget" else {"fetch"})

    def refusal(self, transports: Transports) -> str:
        by_heads = self.bias == "forget" and transports.prefix == "ulysses"
        return HeadsConfig.refusal(self, transports) if by_heads else ""

    def tp_refusal(self, tp: int) -> str:
        if self.temperature == "ssa" and tp > 1:
            return (
                "temperature = 'ssa' mixes all heads in its factors: choose 'none', or set "
                "parallel.tp to 1"
            )
        return super().tp_refusal(tp)

    def check_length(self, seq_len: int, where: str) -> None:
        self.check_window(self.window, seq_len, where)

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        for name in ("window", "sinks", "sigmoid_length"):
            if getattr(self, name) < 0:
                raise InputError(f"{where}.{name} = {getattr(self, name)}: must not be negative")
        for name, reason in self._contradictions(width):
            raise InputError(f"{where}.{name} = {getattr(self, name)!r}: {reason}")

    @property
    def takes_cosines(self) -> bool:
        """Whether scores are scaled cosines of queries and keys."""
        return self.normaliser in ("softplus", "reweighted")

    def _contradictions(self, width: int) -> list[tuple[str, str]]:
        """Fields that make no sense next to others, and how to mend them."""
        normaliser, is_short = self.normaliser, self.size_of_head(width) < 2
        found = {
            "sinks": (self.sinks and not self.window, "nothing is hidden: set window too, or 0"),
            "sigmoid_length": (
                self.sigmoid_length and normaliser != "sigmoid",
                f"is for normaliser sigmoid, not {normaliser}; leave it out",
            ),
            "sink": (
                self.sink and normaliser != "softmax",
                f"is for normaliser softmax, not {normaliser}; leave it out",
            ),
            "bias": (
                self.bias != "none" and normaliser == "signed",
                "would give far keys large negative weights with normaliser signed; choose none",
            ),
            "temperature": (
                self.temperature != "none" and self.takes_cosines,
                f"normaliser {normaliser} takes the length of queries out again; choose none",
            ),
            "reuses": (
                self.reuses != "nothing" and self.heads == "shared",
                "shared heads project their own; choose 'nothing', or heads own",
            ),
            "num_heads": (
                self.takes_cosines and is_short,
                f"normaliser {normaliser} scales by ln head_dim: have heads of at least 2",
            ),
        }
        return [(name, reason) for name, (is_wrong, reason) in found.items() if is_wrong]


class ScoredParts(NamedTuple):
    """Queries, keys, values, raw output gate, positions, and log forget gates."""

    q_BTHK: Tensor
    k_BTJK: Tensor
    v_BTJV: Tensor
    gate_BTHV: Tensor | None
    position_BT: Tensor
    log_keep_BTH: Tensor | None


class Scored(Attention):
    """See the module's docstring."""

    config: ScoredConfig
    slope_H: Tensor | None

    def __init__(self, config: ScoredConfig, place: Place):
        super().__init__(config, place)
        H, J, K, width = self.num_heads, self.num_kv_heads, self.size, place.width
        self.policy = config.policy()
        if config.heads == "shared":
            for name, heads in (("query", H), ("key", J), ("value", J)):
                setattr(self, name, SharedHeads(width, heads, K))
        if config.temperature == "ssa":
            self.query_temperature = Temperature(width, H, by_position=True)
            self.value_temperature = Temperature(width, J, by_position=False)
        if config.bias == "forget":
            self.keep = nn.Linear(width, H, bias=False)
            self.keep_bias = nn.Parameter(torch.zeros(H))
        if config.normaliser == "relu":
            self.relu_gate = ReluGate(H * K)
        if config.sink:
            self.sink = nn.Parameter(torch.zeros(H))
        slope_H = alibi_slopes(H) if config.bias == "alibi" else None
        self.register_buffer("slope_H", slope_H, persistent=False)

    def project(self, x_BTD: Tensor, view: SequenceView) -> ScoredParts:
        q_BTHK, k_BTJK, v_BTJV, gate_BTHV = self.attention_parts(x_BTD, view)
        position_BT, log_keep_BTH = view.positions_BT, None
        if self.config.temperature == "ssa":
            q_BTHK = q_BTHK * self.query_temperature(x_BTD, position_BT)[..., None]
            v_BTJV = v_BTJV * self.value_temperature(x_BTD, position_BT)[..., None]
            q_BTHK, v_BTJV = q_BTHK.type_as(k_BTJK), v_BTJV.type_as(k_BTJK)
        if self.config.bias == "forget":
            log_keep_BTH = log_sigmoid(wide(self.keep(x_BTD)) + self.keep_bias)
        return ScoredParts(q_BTHK, k_BTJK, v_BTJV, gate_BTHV, position_BT, log_keep_BTH)

    def core(self, projected: ScoredParts, view: SequenceView) -> Tensor:
        scoring, operands = self._scoring(projected, view), self._operands(projected)
        backend = self.config.computes_with
        return self._past_sink(*patterned_attention(view, operands, self.policy, scoring, backend))

    def _operands(self, projected: ScoredParts) -> tuple[Tensor, Tensor, Tensor]:
        q_BTHK, k_BTJK, v_BTJV = projected[:3]
        if not self.config.takes_cosines:
            return q_BTHK, k_BTJK, v_BTJV
        q_BTHK, k_BTJK = F.normalize(wide(q_BTHK), dim=-1), F.normalize(wide(k_BTJK), dim=-1)
        ln_BT11 = (projected.position_BT + 1).to(q_BTHK.dtype).log()[..., None, None]
        q_BTHK = q_BTHK * (math.log(self.size) * ln_BT11)
        return q_BTHK.type_as(v_BTJV), k_BTJK.type_as(v_BTJV), v_BTJV

    def _scoring(self, projected: ScoredParts, runs: Runs) -> Scoring:
        """What is added to scores, in at least fp32."""
        config, H = self.config, self.num_heads
        key_bias = query_bias = None
        dtype = torch.promote_types(projected.q_BTHK.dtype, torch.float32)
        if projected.log_keep_BTH is not None:
            log_keep = projected.log_keep_BTH[..., None]
            # Depends on the gates: what is exchanged for it is on the way back too.
            one = 1 + 0 * log_keep
            sums = runs.decay_attention(one, one, log_keep, None, config.computes_with)
            query_bias, key_bias = sums[..., 0], -sums[..., 0]
        slope = None if self.slope_H is None else self.slope_H.to(dtype)
        if config.normaliser == "sigmoid":
            ln_BT1 = self._keys_seen(projected.position_BT).to(dtype).log()[..., None]
            query_bias = -ln_BT1.expand(-1, -1, H) if query_bias is None else query_bias - ln_BT1
        scale = 1.0 if config.takes_cosines else self.size**-0.5
        return Scoring(config.normaliser, key_bias, query_bias, slope, scale)

    def _keys_seen(self, position_BT: Tensor) -> Tensor:
        """How many keys a query at a position sees, or is taken to see."""
        if self.config.sigmoid_length:
            return torch.full_like(position_BT, self.config.sigmoid_length)
        most = self.config.window + self.config.sinks
        return (position_BT + 1).clamp(max=most) if self.config.window else position_BT + 1

    def _past_sink(self, out_BTHV: Tensor, lse_BTH: Tensor) -> Tensor:
        """What the sink leaves of the output."""
        if not self.config.sink:
            return out_BTHV
        return (out_BTHV * (lse_BTH - self.sink).sigmoid()[..., None]).type_as(out_BTHV)

    def core_reference(self, projected: ScoredParts, view: LocalView) -> Tensor:
        tokens = [None if x is None else x.flatten(0, 1) for x in projected]
        rows = [
            self._row([None if x is None else x[start : t + 1] for x in tokens])
            for start, stop in pairwise(view.plan.cuts)
            for t in range(start, stop)
        ]
        return torch.stack(rows).view(projected.q_BTHK.shape)

    def _row(self, tokens: list[Any]) -> Tensor:
        """Output `[H, V]` of the last of these tokens, which are those of its document so far."""
        q_THK, k_TJK, v_TJV, _, _, log_keep_TH = tokens
        config, H, T = self.config, self.num_heads, len(q_THK)
        ages = [T - 1 - t for t in range(T) if self._shows(T - 1, t)]
        shown_U = T - 1 - torch.tensor(ages, device=q_THK.device)
        k_HUK, v_HUV = (
            x[shown_U].repeat_interleave(H // self.num_kv_heads, 1).transpose(0, 1)
            for x in (k_TJK, v_TJV)
        )
        q_H1K, scale = q_THK[-1][:, None], self.size**-0.5
        if config.takes_cosines:
            q_H1K, k_HUK = (x / x.norm(dim=-1, keepdim=True) for x in (q_H1K, k_HUK))
            scale = math.log(self.size) * math.log(T)
        scores_HU = (q_H1K @ k_HUK.mT)[:, 0] * scale
        if config.bias == "alibi":
            loss = [[2 ** (-8 * h / H) * age for age in ages] for h in range(1, H + 1)]
            scores_HU = scores_HU - scores_HU.new_tensor(loss)
        if config.bias == "forget":
            later_TH = log_keep_TH.flip(0).cumsum(0).flip(0) - log_keep_TH
            scores_HU = scores_HU + later_TH[shown_U].T
        return (self._row_weights(scores_HU)[:, None] @ v_HUV)[:, 0]

    def _shows(self, query: int, key: int) -> bool:
        """Whether a query sees a key before it, both by position in their document."""
        window, sinks = self.config.window, self.config.sinks
        return not window or query - key < window or key < sinks

    def _row_weights(self, scores_HU: Tensor) -> Tensor:
        """Weights of the keys that a query sees."""
        if self.config.normaliser == "sigmoid":
            seen = self.config.sigmoid_length or scores_HU.shape[1]
            return (scores_HU - math.log(seen)).sigmoid()
        if self.config.normaliser == "relu":
            return scores_HU.relu()
        if self.config.takes_cosines:
            sizes_HU, count = scores_HU.exp().log1p(), scores_HU.shape[1]
            shares_HU = sizes_HU / sizes_HU.sum(-1, keepdim=True)
            if self.config.normaliser == "softplus":
                return shares_HU
            raised_HU = (count * shares_HU - (1.0 if count > 3 else 0.0)).relu() ** 15
            return raised_HU / raised_HU.sum(-1, keepdim=True)
        if self.config.normaliser == "signed":
            return scores_HU.sign() * scores_HU.abs().softmax(-1)
        if self.config.sink:
            return torch.cat((scores_HU, self.sink[:, None]), 1).softmax(-1)[:, :-1]
        return scores_HU.softmax(-1)

    def read(self, y_BTHV: Tensor, projected: ScoredParts) -> Tensor:
        if self.config.normaliser == "relu":
            y_BTHV = self.relu_gate(y_BTHV.flatten(2)).view_as(y_BTHV)
        return super().read(y_BTHV, projected)

    def advance(
        self, projected: ScoredParts, memory: tuple[Remembered, tuple[Tensor, ...]] | None
    ) -> tuple[Tensor, tuple[Remembered, tuple[Tensor, ...]]]:
        keys, sums = memory or (None, None)
        runs = Resumed(sums)
        scoring, operands = self._scoring(projected, runs), self._operands(projected)
        backend = self.config.computes_with
        found, keys = attend_on(operands, self.policy, scoring, keys, backend)
        return self._past_sink(*found), (keys, runs.kept)

    def core_flops(self, contexts_M: Tensor) -> int:
        most = self.config.window + self.config.sinks
        seen_M = contexts_M.clamp(max=most) if self.config.window else contexts_M
        return 4 * self.num_heads * self.size * int(seen_M.sum())

    def expected_traffic(self, share: Share) -> Expected:
        """Of keys and values, and of key biases and the running sums that they are."""
        forgets = self.config.bias == "forget"
        parts = [patterned_traffic(share, self.sizes, self.policy, biased=forgets)]
        if forgets:
            parts.append(running_sum_traffic(share, self.num_heads, 1))
        return combined(parts)
