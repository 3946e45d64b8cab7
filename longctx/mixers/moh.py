"""Mixture-of-Head: each token weighs its heads and leaves out those it does not choose.

arXiv 2410.11842, with the scaling of the released code: gates of the chosen routed heads are
renormalised and multiplied by their number, shared gates by theirs, the two groups by 2, so that
an untrained router keeps the scale of the inner mixer; the balance loss is E times the paper's.

The router `query-norm` is the paper's for pretrained attention and has no parameters: a head's
logit is the length of the token's query, in standard deviations over the routed heads; gates are 0
or 1, and those of chosen heads have the gradient of their probability (straight through).
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from longctx_kernels.lifetime_attention import LARGEST_HEAD
from torch import Tensor, nn

from longctx.errors import InputError
from longctx.mixers.attention import AttentionConfig
from longctx.mixers.base import Backend, Mixer, MixerConfig, Place
from longctx.sequence.expected import (
    Expected,
    Share,
    combined,
    gathered_rows_traffic,
    reduce_traffic,
)
from longctx.sequence.local import LocalView
from longctx.sequence.routed import attend_routed
from longctx.sequence.sharded import Transports
from longctx.sequence.view import SequenceView


@dataclass(frozen=True, kw_only=True)
class MoHConfig(MixerConfig, kind="moh"):
    """Routes tokens to the heads of an inner mixer."""

    inner: MixerConfig
    """The mixer whose heads are routed."""
    shared_heads: int = 1
    """The first heads, which every token uses; the others are routed."""
    active_heads: int = 1
    """Routed heads that a token uses."""
    balance_weight: float = 0.01
    """Weight of the balance loss, averaged over the layers that have one."""
    router_noise: float = 0.0
    """Scale of the Gumbel noise on routed logits in training."""
    router: Literal["learned", "query-norm"] = "learned"
    """What routes: weights of its own, or the lengths of the inner mixer's queries."""
    compute: Literal["dense", "routed"] = "dense"
    """Whether all heads are computed, or only those a token chooses (inner softmax; a split
    sequence then gathers the keys)."""

    def build(self, place: Place) -> "MoH":
        return MoH(self, place)

    def check_length(self, seq_len: int, where: str) -> None:
        self.inner.check_length(seq_len, f"{where}.inner")

    def verbs(self) -> frozenset[str]:
        inner = frozenset({"gather"}) if self.compute == "routed" else self.inner.verbs()
        return inner | {"reduce"}

    def check(self, width: int, where: str) -> None:
        self.inner.check(width, f"{where}.inner")
        for name in ("balance_weight", "router_noise"):
            if getattr(self, name) < 0:
                raise InputError(f"{where}.{name} = {getattr(self, name)}: must not be negative")
        with torch.device("meta"):
            inner = self.inner.build(Place(width, 0, 1))
        num_heads = inner.num_heads
        if not inner.has_heads:
            raise InputError(
                f"{where}.inner.kind = {self.inner.kind!r}: has no output of each head for each "
                "token to route; take another"
            )
        if self.shared_heads < 0 or self.shared_heads >= num_heads:
            raise InputError(
                f"{where}.shared_heads = {self.shared_heads}: must be at least 0 and below the "
                f"{num_heads} heads of {where}.inner"
            )
        routed = num_heads - self.shared_heads
        if not 1 <= self.active_heads <= routed:
            raise InputError(
                f"{where}.active_heads = {self.active_heads}: must be between 1 and the {routed} "
                "routed heads (heads of inner less shared_heads)"
            )
        self._check_inner(width, where)

    def _check_inner(self, width: int, where: str) -> None:
        inner = self.inner
        has_lengths = isinstance(inner, AttentionConfig) and not inner.qk_norm
        if self.router == "query-norm" and not has_lengths:
            raise InputError(
                f"{where}.router = 'query-norm': compares lengths of queries; take an inner "
                f"attention layer and set {where}.inner.qk_norm = false, or router = 'learned'"
            )
        if self.compute == "dense":
            return
        if not isinstance(inner, AttentionConfig) or inner.kind != "softmax":
            raise InputError(
                f"{where}.compute = 'routed': is for an inner softmax, not {inner.kind}; "
                "choose 'dense'"
            )
        if inner.size_of_head(width) > LARGEST_HEAD:
            raise InputError(
                f"{where}.compute = 'routed': is for heads of at most {LARGEST_HEAD}; take more "
                "heads, or choose 'dense'"
            )

    def on(self, backend: Backend) -> "MoHConfig":
        return replace(self, inner=self.inner.on(backend))

    def over_tp(self, width: int, tp: int) -> "MoHConfig":
        return replace(self, inner=self.inner.over_tp(width, tp))

    def tp_refusal(self, tp: int) -> str:
        if self.router == "query-norm" and tp > 1:
            return (
                "router = 'query-norm' compares the queries of all heads: choose 'learned', or set "
                "parallel.tp to 1"
            )
        reason = self.inner.tp_refusal(tp)
        return reason and f"inner.{reason}"

    def check_device(self, device: torch.device) -> None:
        self.inner.check_device(device)

    def refusal(self, transports: Transports) -> str:
        reason = "" if self.compute == "routed" else self.inner.refusal(transports)
        return reason and f"inner.{reason}"


class Routed(NamedTuple):
    """The inner mixer's tensors; of its heads a gate and whether a token uses them; of all routed
    heads, whosever they are, a probability and 1 if a token chooses them."""

    inner: Any
    gate_BTH: Tensor
    chosen_BTH: Tensor
    probability_BTE: Tensor
    chosen_BTE: Tensor


class MoH(Mixer):
    """See the module's docstring."""

    def __init__(self, config: MoHConfig, place: Place):
        super().__init__()
        self.config = config
        self.inner = config.inner.build(place)
        self.num_heads = self.inner.num_heads
        self.routed_heads = self.num_heads * place.parts - config.shared_heads
        self.first_head = self.num_heads * place.part
        self.causal_selection = self.inner.causal_selection
        if config.router == "learned":
            self.route = nn.Linear(place.width, self.routed_heads, bias=False)
            if config.shared_heads > 1:
                self.share = nn.Linear(place.width, config.shared_heads, bias=False)
            if config.shared_heads:
                self.split = nn.Linear(place.width, 2, bias=False)

    def project(self, x_BTD: Tensor, view: SequenceView) -> Routed:
        inner = self.inner.project(x_BTD, view)
        is_learned = self.config.router == "learned"
        logits_BTE = self.route(x_BTD) if is_learned else self._query_norms(inner.q_BTHK)
        probability = self._noisy(logits_BTE, view).softmax(-1)
        order = probability.sort(dim=-1, descending=True, stable=True).indices
        chosen = torch.zeros_like(probability).scatter(
            -1, order[..., : self.config.active_heads], 1
        )
        if is_learned:
            gate = self._learned_gates(x_BTD, probability * chosen)
        else:
            gate = self._with_shared(chosen * (1 + (probability - probability.detach())))
        uses_BTH = self._own(self._with_shared(chosen) > 0)
        return Routed(inner, self._own(gate), uses_BTH, probability, chosen)

    def _learned_gates(self, x_BTD: Tensor, weight_BTE: Tensor) -> Tensor:
        """Gates of all heads, from the weights of the routed ones."""
        gate = self.config.active_heads * weight_BTE / weight_BTE.sum(-1, keepdim=True)
        if not self.config.shared_heads:
            return gate
        split = 2 * self.split(x_BTD).softmax(-1)
        shared = torch.ones_like(split[..., :1])
        if self.config.shared_heads > 1:
            shared = self.config.shared_heads * self.share(x_BTD).softmax(-1)
        return torch.cat((split[..., :1] * shared, split[..., 1:] * gate), -1)

    def _query_norms(self, q_BTHK: Tensor) -> Tensor:
        """Logits; rotation leaves lengths as they are, and softmax what is subtracted from all."""
        q_BTEK = q_BTHK[..., self.config.shared_heads :, :]
        wide = torch.promote_types(q_BTEK.dtype, torch.float32)
        norm_BTE = torch.linalg.vector_norm(q_BTEK.to(wide), dim=-1)
        # Of equal lengths, or a single one, the logits are equal.
        correction = min(1, norm_BTE.shape[-1] - 1)
        variance = norm_BTE.var(-1, correction=correction, keepdim=True).clamp(min=1e-24)
        return (norm_BTE - norm_BTE.mean(-1, keepdim=True)) * variance.rsqrt()

    def _own(self, x_BTH: Tensor) -> Tensor:
        """Of the heads that are computed here."""
        return x_BTH.narrow(-1, self.first_head, self.num_heads)

    def _with_shared(self, x_BTE: Tensor) -> Tensor:
        """Of all heads, with ones for shared ones."""
        shared = x_BTE.new_ones(*x_BTE.shape[:-1], self.config.shared_heads)
        return torch.cat((shared, x_BTE), -1)

    def _noisy(self, logits_BTE: Tensor, view: SequenceView) -> Tensor:
        if self.config.router_noise and self.training:
            chance_BTE = view.uniform("router", logits_BTE.shape[-1]).clamp(min=1e-7)
            logits_BTE = logits_BTE - self.config.router_noise * (-chance_BTE.log()).log()
        return logits_BTE

    def losses(self, projected: Routed, view: SequenceView) -> dict[str, Tensor]:
        both_BTE = torch.cat((projected.probability_BTE, projected.chosen_BTE), -1)
        probability_E, share_E = view.reduce_mean(both_BTE).chunk(2)
        balance = (probability_E * share_E).sum() * share_E.numel()
        inner = self.inner.losses(projected.inner, view)
        return inner | {"balance": self.config.balance_weight * balance}

    def statistics(self, projected: Routed, view: SequenceView) -> dict[str, Tensor]:
        inner = self.inner.statistics(projected.inner, view)
        wide = torch.promote_types(projected.probability_BTE.dtype, torch.float32)
        return {f"inner/{name}": value for name, value in inner.items()} | {
            "load": projected.chosen_BTE.sum((0, 1), dtype=wide),
            "entropy": torch.special.entr(projected.probability_BTE.to(wide)).sum(),
        }

    def adapt(self, sums: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """The share of tokens that choose each routed head, and the router's entropy in nats."""
        own = {name: sums[name] / tokens for name in ("load", "entropy")}
        inner = {name.removeprefix("inner/"): x for name, x in sums.items() if name not in own}
        found = self.inner.adapt(inner, tokens)
        return own | {f"inner/{name}": figure for name, figure in found.items()}

    def core(self, projected: Routed, view: SequenceView) -> Tensor:
        if self.config.compute == "dense":
            return self.inner.core(projected.inner, view)
        inner: Any = self.config.inner
        chosen_BTH, operands = projected.chosen_BTH, projected.inner[:3]
        return attend_routed(view, operands, chosen_BTH, inner.window, inner.computes_with)

    def core_reference(self, projected: Routed, view: LocalView) -> Tensor:
        return self.inner.core_reference(projected.inner, view)

    def advance(self, projected: Routed, memory: Any) -> tuple[Tensor, Any]:
        return self.inner.advance(projected.inner, memory)

    def read(self, y_BTHV: Tensor, projected: Routed) -> Tensor:
        y_BTHV = self.inner.read(y_BTHV, projected.inner)
        return y_BTHV * projected.gate_BTH[..., None].to(y_BTHV.dtype)

    def output(self, y_BTHV: Tensor) -> Tensor:
        return self.inner.output(y_BTHV)

    def core_flops(self, contexts_M: Tensor) -> int:
        return self.inner.core_flops(contexts_M)

    def expected_traffic(self, share: Share) -> Expected:
        """Of `inner`, or of its keys if they are gathered; and of two means of all routed heads."""
        means = reduce_traffic(share, 2 * self.routed_heads, (1, 1))
        if self.config.compute == "dense":
            return combined((self.inner.expected_traffic(share), means))
        inner: Any = self.inner
        _, key_heads, key_dim, value_dim = inner.sizes
        keys = gathered_rows_traffic(share, key_heads * (key_dim + value_dim))
        return combined((keys, means))
