"""Mixture-of-Head: each token weighs its heads and leaves out those it does not choose.

arXiv 2410.11842, with the scaling of the released code: gates of the chosen routed heads are
renormalised and multiplied by their number, shared gates by theirs, the two groups by 2, so that
an untrained router keeps the scale of the inner mixer; the balance loss is E times the paper's.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longctx.errors import InputError
from longctx.mixers.base import Backend, Mixer, MixerConfig, Place
from longctx.sequence.expected import Expected, Share, combined, reduce_traffic
from longctx.sequence.local import LocalView
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

    def build(self, place: Place) -> "MoH":
        return MoH(self, place)

    def check_length(self, seq_len: int, where: str) -> None:
        self.inner.check_length(seq_len, f"{where}.inner")

    def verbs(self) -> frozenset[str]:
        return self.inner.verbs() | {"reduce"}

    def check(self, width: int, where: str) -> None:
        self.inner.check(width, f"{where}.inner")
        for name in ("balance_weight", "router_noise"):
            if getattr(self, name) < 0:
                raise InputError(f"{where}.{name} = {getattr(self, name)}: must not be negative")
        with torch.device("meta"):
            num_heads = self.inner.build(Place(width, 0, 1)).num_heads
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

    def on(self, backend: Backend) -> "MoHConfig":
        return replace(self, inner=self.inner.on(backend))

    def check_device(self, device: torch.device) -> None:
        self.inner.check_device(device)

    def refusal(self, transports: Transports) -> str:
        reason = self.inner.refusal(transports)
        return reason and f"inner.{reason}"


class Routed(NamedTuple):
    """The inner mixer's tensors, a gate per head, and what the balance loss needs."""

    inner: Any
    gate_BTH: Tensor
    probability_BTE: Tensor
    chosen_BTE: Tensor


class MoH(Mixer):
    """See the module's docstring."""

    def __init__(self, config: MoHConfig, place: Place):
        super().__init__()
        self.config = config
        self.inner = config.inner.build(place)
        self.num_heads = self.inner.num_heads
        self.causal_selection = self.inner.causal_selection
        routed = self.num_heads - config.shared_heads
        self.route = nn.Linear(place.width, routed, bias=False)
        if config.shared_heads > 1:
            self.share = nn.Linear(place.width, config.shared_heads, bias=False)
        if config.shared_heads:
            self.split = nn.Linear(place.width, 2, bias=False)

    def project(self, x_BTD: Tensor, view: SequenceView) -> Routed:
        probability = self._logits(x_BTD, view).softmax(-1)
        order = probability.sort(dim=-1, descending=True, stable=True).indices
        chosen = torch.zeros_like(probability).scatter(
            -1, order[..., : self.config.active_heads], 1
        )
        weight = probability * chosen
        gate = self.config.active_heads * weight / weight.sum(-1, keepdim=True)
        if self.config.shared_heads:
            split = 2 * self.split(x_BTD).softmax(-1)
            shared = torch.ones_like(split[..., :1])
            if self.config.shared_heads > 1:
                shared = self.config.shared_heads * self.share(x_BTD).softmax(-1)
            gate = torch.cat((split[..., :1] * shared, split[..., 1:] * gate), -1)
        return Routed(self.inner.project(x_BTD, view), gate, probability, chosen)

    def _logits(self, x_BTD: Tensor, view: SequenceView) -> Tensor:
        logits_BTE = self.route(x_BTD)
        if self.config.router_noise and self.training:
            chance_BTE = view.uniform("router", logits_BTE.shape[-1]).clamp(min=1e-7)
            logits_BTE = logits_BTE - self.config.router_noise * (-chance_BTE.log()).log()
        return logits_BTE

    def losses(self, projected: Routed, view: SequenceView) -> dict[str, Tensor]:
        probability_E = view.reduce_mean(projected.probability_BTE)
        share_E = view.reduce_mean(projected.chosen_BTE)
        balance = (probability_E * share_E).sum() * share_E.numel()
        inner = self.inner.losses(projected.inner, view)
        return inner | {"balance": self.config.balance_weight * balance}

    def core(self, projected: Routed, view: SequenceView) -> Tensor:
        return self.inner.core(projected.inner, view)

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
        """Of `inner`; of both means forward, and backward of the only one that has a gradient."""
        means = reduce_traffic(share, self.num_heads - self.config.shared_heads, (2, 1))
        return combined((self.inner.expected_traffic(share), means))
