"""MoSA, mixture of sparse attention (arXiv 2505.00315): each head attends among tokens it selects.

A router gives token t the weight `r = sigmoid(x_t.w_h)` for head h. The tokens that a head selects
have queries, keys and values in it and attend causally among themselves; the head adds r times its
output to them, and nothing to others. Layers need other heads beside these: see the kind `sum`.

The paper selects the best tokens of a whole sequence, so that whether a token is in depends on
tokens after it: in language-model training that leaks the future. Here it is `expert_choice`, and
has to be allowed. The causal forms are ours: `threshold` takes what lies above a running quantile
of each head's logits, `token_choice` gives each token its best heads. Both have a capacity.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from longctx_kernels.selected_rows import gather_rows, scatter_rows
from torch import Tensor, nn

from longctx.errors import InputError
from longctx.mixers.attention import RotaryConfig
from longctx.mixers.base import Mixer, Place
from longctx.mixers.compact_parts import Memory, PerHead, RunningQuantile, selected_reference
from longctx.mixers.parts import rotate
from longctx.sequence.compact import (
    Selection,
    attend_selected,
    distances,
    select,
    select_traffic,
)
from longctx.sequence.expected import Expected, Share, combined, reduce_traffic
from longctx.sequence.local import LocalView
from longctx.sequence.selection_rules import Best, FirstCome, Rule
from longctx.sequence.sharded import Transports
from longctx.sequence.view import SequenceView


@dataclass(frozen=True)
class MosaConfig(RotaryConfig, kind="mosa"):
    """Heads that attend among the few tokens each selects."""

    sparsity: int = 16
    """A head takes about one token in so many."""
    selection: Literal["threshold", "token_choice", "expert_choice"] = "threshold"
    """Logits above a running quantile, the best heads of a token, or the best tokens of a head."""
    capacity: float = 1.5
    """Slots of a head in a group of tokens, over the number it should take; the first come."""
    group: int = 256
    """Tokens of a group, counted from the start of a document."""
    include_first: bool = False
    """Every head takes the first token of a document."""
    momentum: float = 0.99
    """Of the running quantile."""
    balance_weight: float = 0.01
    """Weight of token_choice's balance loss, averaged over the layers that have one."""
    allow_leak: bool = False
    """Lets expert_choice select by tokens to come."""
    rope_fraction: float = 0.5
    """Share of each head that is rotated; 0 uses no positions (NoPE)."""

    def build(self, place: Place) -> "Mosa":
        return Mosa(self, place)

    def refusal(self, transports: Transports) -> str:
        return ""

    def tp_refusal(self, tp: int) -> str:
        if self.selection == "token_choice" and tp > 1:
            return (
                "selection = 'token_choice' compares all heads of a token: choose 'threshold', or "
                "set parallel.tp to 1"
            )
        return super().tp_refusal(tp)

    def verbs(self) -> frozenset[str]:
        more = {"threshold": {"halo"}, "token_choice": {"halo", "reduce"}, "expert_choice": set()}
        return frozenset({"select"} | more[self.selection])

    @property
    def heads_of_token(self) -> int:
        """How many heads a token chooses if it does."""
        return max(1, round(self.num_heads / self.sparsity))

    @property
    def rule(self) -> Rule:
        """Which of the tokens that heads wish for they get."""
        if self.selection == "expert_choice":
            return Best(self.sparsity)
        share = 1 / self.sparsity
        if self.selection == "token_choice":
            share = self.heads_of_token / self.num_heads
        slots = math.ceil(round(self.capacity * self.group * share, 6))
        return FirstCome(self.group, min(self.group, slots))

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        self._check_selection(where)
        if self.balance_weight < 0:
            raise InputError(
                f"{where}.balance_weight = {self.balance_weight}: must not be negative"
            )

    def _check_selection(self, where: str) -> None:
        if self.sparsity < 2:
            raise InputError(f"{where}.sparsity = {self.sparsity}: must be at least 2")
        if self.capacity < 1:
            raise InputError(f"{where}.capacity = {self.capacity}: must be at least 1")
        if self.group < 1:
            raise InputError(f"{where}.group = {self.group}: must be at least 1")
        if not 0 <= self.momentum < 1:
            raise InputError(f"{where}.momentum = {self.momentum}: must be in 0..1 and below 1")
        if self.selection == "expert_choice" and not self.allow_leak:
            raise InputError(
                f"{where}.selection = 'expert_choice': leaks the future in language-model training,"
                f" since it compares a token with later ones; choose 'threshold', or set "
                f"{where}.allow_leak = true"
            )


class MosaParts(NamedTuple):
    """Queries, keys and values of selected tokens, their weights and positions; what tokens wished
    for and the logits of all."""

    q_HEK: Tensor
    k_HEK: Tensor
    v_HEV: Tensor
    weight_HE: Tensor
    position_HE: Tensor
    selection: Selection
    wish_BTH: Tensor
    logit_BTH: Tensor


class Mosa(Mixer):
    """See the module's docstring. Its core gives slots, `[H, E, V]`."""

    has_heads = False

    def __init__(self, config: MosaConfig, place: Place):
        super().__init__()
        self.config, self.num_heads, self.rule = config, config.num_heads, config.rule
        self.causal_selection = config.selection != "expert_choice"
        H, K, D = config.num_heads, config.size_of_head(place.width), place.width
        self.size = K
        self.router = nn.Linear(D, H, bias=False)
        self.query, self.key, self.value = (PerHead(H, D, K) for _ in range(3))
        self.project_out = PerHead(H, K, D)
        if config.selection == "threshold":
            self.threshold = RunningQuantile(H, 1 - 1 / config.sparsity, config.momentum)

    def project(self, x_BTD: Tensor, view: SequenceView) -> MosaParts:
        logit_BTH = self._logits(x_BTD)
        wish_BTH = self._wish(logit_BTH.detach(), view)
        selection = select(view, wish_BTH, self.rule)
        index_HE, config = selection.index_LE, self.config
        real_HE, token_HE = index_HE >= 0, index_HE.clamp(min=0)
        if torch.is_autocast_enabled(x_BTD.device.type):
            x_BTD = x_BTD.to(torch.get_autocast_dtype(x_BTD.device.type))
        x_1MD = x_BTD.flatten(0, 1)[None]
        x_HED = gather_rows(x_1MD, index_HE[None], backend=config.computes_with)[0]
        position_HE = view.positions_BT.flatten()[token_HE]
        q_HEK, k_HEK = (
            rotate(y[:, :, None], position_HE, config.rope_base, config.rope_fraction)[:, :, 0]
            for y in (self.query(x_HED), self.key(x_HED))
        )
        weight_HE = logit_BTH.sigmoid().flatten(0, 1).T.gather(1, token_HE) * real_HE
        operands = q_HEK, k_HEK, self.value(x_HED)
        return MosaParts(*operands, weight_HE, position_HE, selection, wish_BTH, logit_BTH)

    def _logits(self, x_BTD: Tensor) -> Tensor:
        """In at least fp32, so that who is selected does not depend on how numbers round."""
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        with torch.autocast(x_BTD.device.type, enabled=False):
            return nn.functional.linear(x_BTD.to(wide), self.router.weight.to(wide))

    def _wish(self, logit_BTH: Tensor, view: SequenceView) -> Tensor:
        """What heads would take if they could: scores for expert_choice, otherwise yes or no."""
        first_BT1 = (view.positions_BT == 0)[..., None] & self.config.include_first
        if self.config.selection == "expert_choice":
            return logit_BTH.masked_fill(first_BT1, torch.inf)
        if self.config.selection == "threshold":
            return (logit_BTH > self.threshold.value_H) | first_BT1
        order = logit_BTH.sort(dim=-1, descending=True, stable=True).indices
        chosen = order[..., : self.config.heads_of_token]
        return torch.zeros_like(logit_BTH, dtype=torch.bool).scatter(-1, chosen, True) | first_BT1

    def core(self, projected: MosaParts, view: SequenceView) -> Tensor:
        backend = self.config.computes_with
        return attend_selected(view, projected[:3], projected.selection, backend=backend)

    def core_reference(self, projected: MosaParts, view: LocalView) -> Tensor:
        index_HE, scale = projected.selection.index_LE, self.size**-0.5
        return selected_reference(projected[:3], index_HE, view, self.rule, scale)

    def advance(self, projected: MosaParts, memory: Memory | None) -> tuple[Tensor, Memory]:
        if not self.causal_selection:
            raise ValueError(
                "selection = 'expert_choice' cannot go on with a sequence: it selects by tokens to "
                "come; train with 'threshold' or 'token_choice'"
            )
        index_HE, (rows, tokens) = projected.selection.index_LE, projected.wish_BTH.shape[:2]
        row_HE = index_HE.div(tokens, rounding_mode="floor")
        new = Memory(projected.k_HEK, projected.v_HEV, row_HE, projected.position_HE)
        if memory is None:
            y_HEV = self.core(projected, LocalView.whole(rows, tokens, index_HE.device))
            return y_HEV, new.packed()
        both, scale = memory.joined(new), self.size**-0.5
        y_HEV = both.recalled(projected.q_HEK, row_HE, projected.position_HE, scale)
        return y_HEV, both.packed()

    def read(self, y_HEV: Tensor, projected: MosaParts) -> Tensor:
        rows_1HED, index_1HE = self.project_out(y_HEV)[None], projected.selection.index_LE[None]
        shape, backend = projected.wish_BTH.shape[:2], self.config.computes_with
        weight_1HE = projected.weight_HE[None]
        y = scatter_rows(rows_1HED, index_1HE, shape.numel(), weight_1HE, backend=backend)
        return y[0].unflatten(0, shape)

    def output(self, y_BTD: Tensor) -> Tensor:
        return y_BTD

    def losses(self, projected: MosaParts, view: SequenceView) -> dict[str, Tensor]:
        if self.config.selection != "token_choice":
            return {}
        probability_BTH = projected.logit_BTH.softmax(-1)
        chosen_BTH = projected.wish_BTH.to(probability_BTH)
        means = view.reduce_mean(torch.cat((probability_BTH, chosen_BTH), -1))
        probability_H, share_H = means.split(self.num_heads)
        balance = (probability_H * share_H).sum() * self.num_heads
        return {"balance": self.config.balance_weight * balance}

    def statistics(self, projected: MosaParts, view: SequenceView) -> dict[str, Tensor]:
        weight_BTH = projected.logit_BTH.sigmoid()
        entropy = torch.special.entr(weight_BTH) + torch.special.entr(1 - weight_BTH)
        sums = {
            "taken": (projected.selection.index_LE >= 0).sum(1),
            "entropy": entropy.sum(),
            "distance": distances(projected.selection),
        }
        if self.causal_selection:
            sums["wanted"] = projected.wish_BTH.sum((0, 1))
        if self.config.selection == "threshold":
            sums["histogram"] = self.threshold.counts(projected.logit_BTH)
        return sums

    def adapt(self, sums: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """Of each head the share of tokens taken and the threshold; the share of wishes without a
        slot, the router's entropy in nats, shares of distances of 1, 2..3, 4..7, ... tokens."""
        figures = {
            "load": sums["taken"] / tokens,
            "entropy": sums["entropy"] / (tokens * self.num_heads),
            "distance": sums["distance"] / sums["distance"].sum().clamp(min=1),
        }
        if self.causal_selection:
            dropped = (sums["wanted"] - sums["taken"]).sum()
            figures["drop_rate"] = dropped / sums["wanted"].sum().clamp(min=1)
        if self.config.selection == "threshold":
            self.threshold.adapt(sums["histogram"])
            figures["threshold"] = self.threshold.value_H
        return figures

    def core_flops(self, contexts_M: Tensor) -> int:
        """Of slots, whether or not they are taken."""
        return 4 * self.size * self.num_heads * self.rule.pairs(contexts_M)

    def flops(self, contexts_M: Tensor) -> int:
        """Of the router for all tokens, and of projections of slots."""
        slots = int(self.rule.added(contexts_M).sum())
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, PerHead))
        routing = self.router.weight.numel() * contexts_M.numel()
        return 2 * (routing + weights * slots) + self.core_flops(contexts_M)

    def expected_traffic(self, share: Share) -> Expected:
        """Of what is selected, and of the balance loss: the means of each head, both ways."""
        parts = [select_traffic(share, self.rule, self.num_heads, 2 * self.size)]
        if self.config.selection == "token_choice":
            parts.append(reduce_traffic(share, 2 * self.num_heads, (1, 1)))
        return combined(parts)
