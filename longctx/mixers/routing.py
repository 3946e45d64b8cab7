"""Routing Transformer (arXiv 2003.05997): each head attends within clusters of tokens.

Queries and keys are one unit vector, which belongs to the nearest of its head's centroids; a token
attends to itself and to those before it in its cluster. Centroids are running means of what belongs
to them, and a commitment loss pulls tokens to theirs.

The paper gives each centroid the tokens that are nearest to it in a whole sequence, by which later
tokens displace earlier ones. Here a token chooses its cluster, as is causal; a cluster takes the
first that come in each group of tokens, and what finds no slot gets zeros. Wishes of all clusters
are laid out for each token, so there should not be too many.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from longctx_kernels.selected_rows import gather_rows, scatter_rows
from torch import Tensor, nn

from longctx.errors import InputError
from longctx.mixers.attention import RotaryConfig
from longctx.mixers.base import Mixer, Place, split_heads
from longctx.mixers.compact_parts import Memory, selected_reference
from longctx.mixers.parts import rotate, unit
from longctx.sequence.compact import Selection, attend_selected, select, select_traffic
from longctx.sequence.expected import Expected, Share, combined, reduce_traffic
from longctx.sequence.local import LocalView
from longctx.sequence.selection_rules import FirstCome
from longctx.sequence.sharded import Transports
from longctx.sequence.view import SequenceView


@dataclass(frozen=True)
class RoutingConfig(RotaryConfig, kind="routing"):
    """Attention within clusters that each head sorts tokens into."""

    clusters: int = 16
    """Clusters of a head."""
    capacity: float = 1.5
    """Slots of a cluster in a group of tokens, over its equal share; the first come."""
    group: int = 256
    """Tokens of a group, counted from the start of a document."""
    momentum: float = 0.999
    """Of centroids."""
    commitment: float = 1e-4
    """Weight of the squared distance of tokens from their centroids."""
    centroid_seed: int = 0
    """Decides the first centroids."""
    rope_fraction: float = 0.5
    """Share of each head that is rotated; 0 uses no positions (NoPE)."""

    def build(self, place: Place) -> "Routing":
        return Routing(self, place)

    def refusal(self, transports: Transports) -> str:
        return ""

    def verbs(self) -> frozenset[str]:
        return frozenset({"halo", "select", "reduce"})

    @property
    def rule(self) -> FirstCome:
        """Which tokens a cluster takes."""
        slots = math.ceil(round(self.capacity * self.group / self.clusters, 6))
        return FirstCome(self.group, min(self.group, slots))

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        for name in ("clusters", "capacity", "group"):
            if getattr(self, name) < 1:
                raise InputError(f"{where}.{name} = {getattr(self, name)}: must be at least 1")
        if not 0 <= self.momentum < 1:
            raise InputError(f"{where}.momentum = {self.momentum}: must be at least 0 and below 1")
        if self.commitment < 0:
            raise InputError(f"{where}.commitment = {self.commitment}: must not be negative")


def first_centroids(config: RoutingConfig, layer: int, size: int) -> Tensor:
    """Random directions `[H, C, K]`."""
    key = hashlib.sha256(f"routing/{config.centroid_seed}/{layer}".encode()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(key, "big") >> 1)
    shape = (config.num_heads, config.clusters, size)
    return unit(torch.randn(shape, generator=generator, device="cpu"))


class RoutingParts(NamedTuple):
    """Queries, which are the keys too, and values in slots of lanes, a lane for each head and
    cluster; directions of all tokens, their centroids, and which lanes they wish for."""

    q_LEK: Tensor
    v_LEV: Tensor
    position_LE: Tensor
    selection: Selection
    unit_BTHK: Tensor
    centroid_BTHK: Tensor
    wish_BTL: Tensor


class Routing(Mixer):
    """See the module's docstring."""

    has_heads = False
    centroid_HCK: Tensor

    def __init__(self, config: RoutingConfig, place: Place):
        super().__init__()
        self.config, self.num_heads, self.rule = config, config.num_heads, config.rule
        H, K = config.num_heads, config.size_of_head(place.width)
        # Unit vectors times sqrt(K) are what the paper's queries and keys are.
        self.size, self.scale = K, K**0.5
        self.query = nn.Linear(place.width, H * K, bias=False)
        self.value = nn.Linear(place.width, H * K, bias=False)
        self.project_out = nn.Linear(H * K, place.width, bias=False)
        self.register_buffer("centroid_HCK", first_centroids(config, place.layer, K))

    def project(self, x_BTD: Tensor, view: SequenceView) -> RoutingParts:
        config = self.config
        unit_BTHK, score_BTHC = self._scored(x_BTD)
        cluster_BTH = score_BTHC.argmax(-1)
        clusters_C = torch.arange(config.clusters, device=cluster_BTH.device)
        wish_BTL = (cluster_BTH[..., None] == clusters_C).flatten(2)
        selection = select(view, wish_BTL, self.rule)
        centroid_HCK = self.centroid_HCK.to(unit_BTHK.dtype)
        head_H = torch.arange(self.num_heads, device=cluster_BTH.device)
        v_BTHV = split_heads(self.value(x_BTD), self.num_heads)
        q_BTHK = rotate(unit_BTHK, view.positions_BT, config.rope_base, config.rope_fraction)
        return RoutingParts(
            self._slots(q_BTHK.type_as(v_BTHV), selection),
            self._slots(v_BTHV, selection),
            view.positions_BT.flatten()[selection.index_LE.clamp(min=0)],
            selection,
            unit_BTHK,
            centroid_HCK[head_H, cluster_BTH],
            wish_BTL,
        )

    def _scored(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Directions and their products with centroids, in at least fp32: a token's cluster should
        not depend on how numbers round."""
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        with torch.autocast(x_BTD.device.type, enabled=False):
            q_BTM = F.linear(x_BTD.to(wide), self.query.weight.to(wide))
            unit_BTHK = unit(split_heads(q_BTM, self.num_heads))
            by_head = unit_BTHK.detach().permute(2, 0, 1, 3).flatten(1, 2)
            score_HMC = by_head @ self.centroid_HCK.to(wide).mT
        return unit_BTHK, score_HMC.transpose(0, 1).unflatten(0, x_BTD.shape[:2])

    def _slots(self, x_BTHK: Tensor, selection: Selection) -> Tensor:
        """Rows of lanes `[L, E, K]`."""
        x_HMK = x_BTHK.flatten(0, 1).transpose(0, 1)
        index_HCE = selection.index_LE.unflatten(0, (self.num_heads, -1))
        return gather_rows(x_HMK, index_HCE, backend=self.config.computes_with).flatten(0, 1)

    def _tokens(self, y_LEV: Tensor, projected: RoutingParts) -> Tensor:
        """Slots of lanes back to `[B, T, H, V]`."""
        y_HCEV, index_HCE = (
            x.unflatten(0, (self.num_heads, -1)) for x in (y_LEV, projected.selection.index_LE)
        )
        shape, backend = projected.wish_BTL.shape[:2], self.config.computes_with
        y_HMV = scatter_rows(y_HCEV, index_HCE, shape.numel(), backend=backend)
        return y_HMV.transpose(0, 1).unflatten(0, shape)

    def core(self, projected: RoutingParts, view: SequenceView) -> Tensor:
        q_LEK, v_LEV, backend = *projected[:2], self.config.computes_with
        operands = q_LEK, q_LEK, v_LEV
        y_LEV = attend_selected(view, operands, projected.selection, self.scale, backend)
        return self._tokens(y_LEV, projected)

    def core_reference(self, projected: RoutingParts, view: LocalView) -> Tensor:
        q_LEK, v_LEV, index_LE = *projected[:2], projected.selection.index_LE
        operands = q_LEK, q_LEK, v_LEV
        y_LEV = selected_reference(operands, index_LE, view, self.rule, self.scale)
        return self._tokens(y_LEV, projected)

    def advance(self, projected: RoutingParts, memory: Memory | None) -> tuple[Tensor, Memory]:
        index_LE, (rows, tokens) = projected.selection.index_LE, projected.wish_BTL.shape[:2]
        q_LEK, v_LEV, position_LE = projected[:3]
        row_LE = index_LE.div(tokens, rounding_mode="floor")
        new = Memory(q_LEK, v_LEV, row_LE, position_LE)
        if memory is None:
            view = LocalView.whole(rows, tokens, index_LE.device)
            return self.core(projected, view), new.packed()
        both = memory.joined(new)
        y_LEV = both.recalled(q_LEK, row_LE, position_LE, self.scale)
        return self._tokens(y_LEV, projected), both.packed()

    def output(self, y_BTHV: Tensor) -> Tensor:
        return self.project_out(y_BTHV.flatten(2))

    def losses(self, projected: RoutingParts, view: SequenceView) -> dict[str, Tensor]:
        away_BTHK = projected.unit_BTHK - projected.centroid_BTHK
        distance_BT1 = away_BTHK.square().sum(-1).mean(-1, keepdim=True)
        return {"commitment": self.config.commitment * view.reduce_mean(distance_BT1)[0]}

    def statistics(self, projected: RoutingParts, view: SequenceView) -> dict[str, Tensor]:
        unit_HMK = projected.unit_BTHK.flatten(0, 1).transpose(0, 1)
        wish_HCM = projected.wish_BTL.flatten(0, 1).T.unflatten(0, (self.num_heads, -1))
        return {
            "vectors": wish_HCM.to(unit_HMK) @ unit_HMK,
            "wanted": wish_HCM.sum(-1),
            "taken": (projected.selection.index_LE >= 0).sum(),
        }

    def adapt(self, sums: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """Moves centroids to the mean of their tokens; the share of tokens in each cluster of each
        head, of those without a slot, and of clusters that nobody chose."""
        count_HC1 = sums["wanted"][..., None]
        mean_HCK = (sums["vectors"] / count_HC1.clamp(min=1)).to(self.centroid_HCK)
        moved_HCK = self.centroid_HCK.lerp(mean_HCK, 1 - self.config.momentum)
        self.centroid_HCK.copy_(torch.where(count_HC1 > 0, unit(moved_HCK), self.centroid_HCK))
        return {
            "load": sums["wanted"].flatten() / tokens,
            "drop_rate": 1 - sums["taken"] / (tokens * self.num_heads),
            "idle": (sums["wanted"] == 0).double().mean(),
        }

    def core_flops(self, contexts_M: Tensor) -> int:
        lanes = self.num_heads * self.config.clusters
        return 4 * self.size * lanes * self.rule.pairs(contexts_M)

    def flops(self, contexts_M: Tensor) -> int:
        """Also of scores with centroids, and of the sums that centroids follow."""
        return super().flops(contexts_M) + 4 * self.centroid_HCK.numel() * contexts_M.numel()

    def expected_traffic(self, share: Share) -> Expected:
        """Of what is selected, and of the mean distance."""
        lanes = self.num_heads * self.config.clusters
        selected = select_traffic(share, self.rule, lanes, 2 * self.size)
        return combined([selected, reduce_traffic(share, 1, (1, 1))])
