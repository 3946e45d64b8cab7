"""Learnable token eviction (arXiv 2510.20787): a convolution says which keys outlive a window.

Each key head looks at its key (before positions) and value and at `LOOK_AHEAD` tokens to either
side, and keeps a token if its score is above 0. The decision takes effect when the window has gone
on, so that looking ahead leaks nothing. Of the kept ones the `capacity` best survive, in training
too, where the paper caps only evaluation: what ranks exchange is bounded that way. The score learns
by the gradient that its value gets from all queries that see it.

A penalty on scores holds the number of kept tokens of a document below the capacity: its factor
grows by half whenever their running mean is above it, and is halved where it is well below.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longctx.errors import InputError
from longctx.mixers.attention import AttentionParts
from longctx.mixers.base import Place, split_heads
from longctx.mixers.evicting import Evicting, EvictingConfig, Memory
from longctx.sequence.eviction import Eviction
from longctx.sequence.expected import Expected, Share, combined, halo_traffic, reduce_traffic
from longctx.sequence.local import ContinuedView, LocalView
from longctx.sequence.patterned import document_bounds
from longctx.sequence.plan import Plan
from longctx.sequence.view import SequenceView

LAYERS, DILATION, TAPS = 3, 2, 3
LOOK_AHEAD = LAYERS * DILATION
KEEPING = 0.5
"""First value of a head's bias towards keeping."""
SMALLEST, LARGEST = 1e-9, 1.0
SLACK = 0.95
"""Share of the capacity below which the penalty is eased."""


@dataclass(frozen=True)
class LTEConfig(EvictingConfig, kind="lte"):
    """Attention to a window and to tokens that learn to stay."""

    window: int = 768
    """Keys that a query sees for sure, its own included."""
    sinks: int = 4
    """First tokens of a document, which always stay."""
    adapt_every: int = 32
    """Steps between changes of the penalty's factor."""

    def eviction(self) -> Eviction:
        return Eviction(self.capacity, self.window, LOOK_AHEAD)

    def build(self, place: Place) -> "LTE":
        return LTE(self, place)

    one_key_head_is_shared = False

    def verbs(self) -> frozenset[str]:
        return super().verbs() | {"halo", "reduce"}

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        self.check_positive(where, "adapt_every")
        if self.reuses == "keys and values":
            raise InputError(
                f"{where}.reuses = {self.reuses!r}: its scores look at keys of its own; choose "
                "'values' or 'nothing'"
            )
        if not 0 <= self.sinks <= self.capacity:
            raise InputError(
                f"{where}.sinks = {self.sinks}: must be at least 0 and at most capacity = "
                f"{self.capacity}"
            )
        if self.window <= LOOK_AHEAD:
            raise InputError(
                f"{where}.window = {self.window}: must be longer than the {LOOK_AHEAD} tokens that "
                "the score looks ahead"
            )


class LTEParts(NamedTuple):
    """What attention sees, and each key's logit and score: it is kept if they are above 0."""

    q_BTHK: Tensor
    k_BTJK: Tensor
    v_BTJV: Tensor
    gate_BTHV: Tensor | None
    logit_BTJ: Tensor
    score_BTJ: Tensor
    position_BT: Tensor


class Dilated(nn.Module):
    """One convolution, of what its taps see."""

    def __init__(self, heads: int, inner: int, outer: int):
        super().__init__()
        self.taps = nn.Parameter(torch.empty(heads, TAPS * inner, outer))

    def initial(self, _name: str, generator: torch.Generator) -> Tensor:
        """Taps that keep the size of what they see (Kaiming's)."""
        std = (2 / self.taps.shape[1]) ** 0.5
        return std * torch.randn(self.taps.shape, generator=generator)

    def forward(self, near_BTJC: Tensor) -> Tensor:
        """Activations `[B, T, J, outer]`."""
        mixed = (near_BTJC.transpose(1, 2) @ self.taps.to(near_BTJC.dtype)).transpose(1, 2)
        return (mixed * mixed.sigmoid()).to(near_BTJC.dtype)


class Scorer(nn.Module):
    """Three dilated convolutions for each key head, and a logit."""

    def __init__(self, heads: int, channels: int):
        super().__init__()
        sizes = [max(1, channels >> layer) for layer in range(LAYERS + 1)]
        self.layers = nn.ModuleList(
            Dilated(heads, inner, outer) for inner, outer in zip(sizes, sizes[1:])
        )
        self.logit = nn.Parameter(torch.empty(heads, sizes[-1], 1))
        self.leaning = nn.Parameter(torch.empty(heads, 1))

    def initial(self, name: str, generator: torch.Generator) -> Tensor | None:
        """A head leans to keeping what it sees at first."""
        return torch.full_like(self.leaning, KEEPING) if name == "leaning" else None

    def forward(self, seen_BTJC: Tensor, view: SequenceView, is_late: bool) -> Tensor:
        """Logits `[B, T, J]`; late ones are of the token LOOK_AHEAD before."""
        hidden = seen_BTJC
        for number, layer in enumerate(self.layers):
            hidden = layer(_near(hidden, view, number + 1 if is_late else 0))
        logit = (hidden.transpose(1, 2) @ self.logit.to(hidden.dtype))[..., 0].transpose(1, 2)
        wide_dtype = torch.promote_types(logit.dtype, torch.float32)
        return logit.to(wide_dtype) + self.leaning[:, 0]


@torch.compiler.disable
def _near(hidden: Tensor, view: SequenceView, delay: int) -> Tensor:
    """What the taps of each token see `[B, T, J, TAPS * C]`, zeros outside of its document."""
    halo = (2 * DILATION, 0) if delay else (DILATION, DILATION)
    wide, ends = view.halo(hidden, *halo), 2 * DILATION
    shown = _shown(view, delay).to(hidden.device)[..., None, None]
    near = []
    for tap in range(TAPS):
        start = tap * DILATION
        parts = [part[:, start : part.shape[1] - ends + start] for part in wide]
        near.append(torch.cat(parts, 1) * shown[:, :, tap])
    return torch.cat(near, -1)


def _shown(view: SequenceView, delay: int) -> Tensor:
    """Which taps of a token are in its document, `[B, T, TAPS]`; of one `delay` layers before."""
    offsets = torch.arange(-1, TAPS - 1) * DILATION
    if not delay:
        return view.plan.once(_inside, offsets[0].item())
    at = view.positions_BT[..., None].cpu() - delay * DILATION + offsets
    return at >= 0


def _inside(plan: Plan, first: int) -> Tensor:
    offsets = torch.arange(first, first + TAPS * DILATION, DILATION)
    row = torch.arange(plan.rows)[:, None].expand(plan.token_ids_BT.shape)
    starts, stops = document_bounds(plan, row, plan.token_ids_BT)
    at = plan.token_ids_BT[..., None] + offsets
    return (at >= starts[..., None]) & (at < stops[..., None])


class LTE(Evicting):
    """See the module's docstring."""

    config: LTEConfig
    penalty_J: Tensor
    kept_J: Tensor
    steps: Tensor

    def __init__(self, config: LTEConfig, place: Place):
        super().__init__(config, place)
        J, self.parts = self.num_kv_heads, place.parts
        self.scorer = Scorer(J, 2 * self.size)
        self.register_buffer("penalty_J", torch.zeros(J))
        self.register_buffer("kept_J", torch.zeros(J))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def project(self, x_BTD: Tensor, view: SequenceView) -> LTEParts:
        parts = self.attention_parts(x_BTD, view)
        logit_BTJ = self.scorer(self._looked_at(x_BTD, parts), view, is_late=False)
        score_BTJ = logit_BTJ.sigmoid() - 0.5
        # The value is the same to the bit; its gradient reaches the score.
        taught = (score_BTJ - score_BTJ.detach())[..., None].to(parts.v_BTJV.dtype)
        parts = parts._replace(v_BTJV=parts.v_BTJV * (1 + taught))
        return LTEParts(*parts, logit_BTJ, score_BTJ, view.positions_BT)

    def _looked_at(self, x_BTD: Tensor, parts: AttentionParts) -> Tensor:
        k_BTJK = self.key_norm(split_heads(self.key(x_BTD), self.num_kv_heads))
        return torch.cat((k_BTJK.type_as(parts.v_BTJV), parts.v_BTJV), -1)

    def scored(self, projected: LTEParts) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logit_BTJ = projected.logit_BTJ.detach()
        return (*projected[:3], self._competing(logit_BTJ, projected.position_BT))

    def _competing(self, logit_BTJ: Tensor, position_BT: Tensor) -> Tensor:
        is_sink = (position_BT < self.config.sinks)[..., None]
        return logit_BTJ.masked_fill(logit_BTJ <= 0, -torch.inf).masked_fill(is_sink, torch.inf)

    def losses(self, projected: LTEParts, view: SequenceView) -> dict[str, Tensor]:
        excess_J = view.reduce_mean(projected.score_BTJ.relu())
        return {"eviction": self.parts * (self.penalty_J * excess_J).sum()}

    def statistics(self, projected: LTEParts, view: SequenceView) -> dict[str, Tensor]:
        kept_J = (projected.logit_BTJ > 0).sum((0, 1))
        return {"kept": kept_J, "documents": (projected.position_BT == 0).sum()}

    def adapt(self, sums: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
        kept_J = (sums["kept"] / sums["documents"].clamp(min=1)).to(self.kept_J)
        self.steps += 1
        share = torch.where(self.steps == 1, 1.0, 1 / self.config.adapt_every)
        self.kept_J.lerp_(kept_J, share)
        if self.steps % self.config.adapt_every == 0:
            above = self.kept_J >= self.config.capacity
            below = self.kept_J <= SLACK * self.config.capacity
            grown = (self.penalty_J * 1.5).clamp(SMALLEST, LARGEST)
            eased = self.penalty_J / 2
            eased = eased.masked_fill(eased < SMALLEST, 0.0)
            self.penalty_J.copy_(
                torch.where(above, grown, torch.where(below, eased, self.penalty_J))
            )
        return {"kept": kept_J, "share_kept": sums["kept"] / tokens, "penalty": self.penalty_J}

    def step(self, x_BTD: Tensor, view: LocalView, memory: Any) -> tuple[Tensor, Any]:
        neighbours, before = memory or ((), None)
        view = ContinuedView(view, neighbours)
        parts = self.attention_parts(x_BTD, view)
        late_BTJ = self.scorer(self._looked_at(x_BTD, parts), view, is_late=True)
        score_BTJ = self._competing(late_BTJ, view.positions_BT - LOOK_AHEAD)
        pairs = torch.cat((parts.k_BTJK, parts.v_BTJV), -1).transpose(1, 2)
        y_BTHV, after = self.continued(parts.q_BTHK, pairs, score_BTJ.transpose(1, 2), before)
        return self.output(self.read(y_BTHV, parts)), (view.kept, after)

    def advance(self, projected: Any, memory: Memory | None) -> tuple[Tensor, Memory]:
        raise TypeError("scores of new tokens look ahead: a step makes late ones")

    def flops(self, contexts_M: Tensor) -> int:
        taps = sum(x.numel() for x in self.scorer.layers.parameters())
        weights = taps + self.scorer.logit.numel()
        again = self.key.weight.numel()
        return super().flops(contexts_M) + 2 * (weights + again) * contexts_M.numel()

    def expected_traffic(self, share: Share) -> Expected:
        J, channels = self.num_kv_heads, 2 * self.size
        halos = [
            halo_traffic(share, DILATION, J * max(1, channels >> layer), DILATION)
            for layer in range(LAYERS)
        ]
        penalty = reduce_traffic(share, J, (1, 1))
        return combined([super().expected_traffic(share), *halos, penalty])
