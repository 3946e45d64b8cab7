"""Parts of mixers whose heads select tokens."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from longctx.mixers.attention import masked_attention
from longctx.sequence.local import LocalView
from longctx.sequence.selection_rules import Rule

Operands = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values of slots, `[L, E, K or V]`."""

BINS, NARROWEST, WIDEST = 256, 0.01, 14.5
"""Of logits: edges of bins are `NARROWEST * sinh(x)` of equal steps of x up to WIDEST."""


class PerHead(nn.Module):
    """A linear map for each head of tokens of its own."""

    def __init__(self, heads: int, size_in: int, size_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, size_in, size_out))
        nn.init.normal_(self.weight, std=size_in**-0.5)

    def forward(self, x_HED: Tensor) -> Tensor:
        """`[H, E, size_out]`."""
        return x_HED @ self.weight


class RunningQuantile(nn.Module):
    """A moving average of a quantile of each head's logits.

    Logits are counted in bins that widen with the distance from its present value, near which the
    quantile should be. Counts do not depend on how tokens are spread over ranks.
    """

    value_H: Tensor
    steps: Tensor
    edges: Tensor

    def __init__(self, heads: int, share: float, momentum: float):
        super().__init__()
        self.share, self.momentum = share, momentum
        self.register_buffer("value_H", torch.zeros(heads))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        edges = NARROWEST * torch.linspace(-WIDEST, WIDEST, BINS - 1, dtype=torch.float64).sinh()
        self.register_buffer("edges", edges, persistent=False)

    def counts(self, logit_BTH: Tensor) -> Tensor:
        """Logits in each bin, `[H, BINS]`."""
        away_HM = (logit_BTH - self.value_H).flatten(0, 1).T.contiguous()
        bin_HM = torch.bucketize(away_HM, self.edges.to(away_HM.dtype))
        counts = bin_HM.new_zeros(len(bin_HM), BINS)
        return counts.scatter_add(1, bin_HM, torch.ones_like(bin_HM))

    def adapt(self, counts_HN: Tensor) -> None:
        """Moves towards the quantile of counted logits. The first is taken as it is, and so that
        its coarse bins are soon forgotten, the value is a plain mean until that is slower."""
        quantile_H = self.value_H + self._away(counts_HN.double()).to(self.value_H)
        self.steps += 1
        kept = (1 - 1 / self.steps).clamp(max=self.momentum).to(self.value_H)
        self.value_H.copy_(kept * self.value_H + (1 - kept) * quantile_H)

    def _away(self, counts_HN: Tensor) -> Tensor:
        """How far from the value the quantile is."""
        up_to_HN = counts_HN.cumsum(1)
        wanted_H1 = self.share * up_to_HN[:, -1:]
        bin_H1 = (up_to_HN < wanted_H1).sum(1, keepdim=True).clamp(max=BINS - 1)
        inside_H1 = counts_HN.gather(1, bin_H1)
        missing_H1 = wanted_H1 - up_to_HN.gather(1, bin_H1) + inside_H1
        low, high = self.edges[(bin_H1 - 1).clamp(min=0)], self.edges[bin_H1.clamp(max=BINS - 2)]
        return (low + (high - low) * missing_H1 / inside_H1.clamp(min=1))[:, 0]


def selected_reference(
    operands: Operands, index_LE: Tensor, view: LocalView, rule: Rule, scale: float
) -> Tensor:
    """Attention of each lane's tokens among themselves, one by one, `[L, E, V]`.

    Slots that are not taken count as work, so that there is as much of it whatever is selected.
    """
    y_LEV, cuts = torch.zeros_like(operands[2]), view.plan.cuts
    for start, stop in zip(cuts, cuts[1:]):
        slots = int(rule.up_to(torch.tensor(stop - start)))
        for lane, index_E in enumerate(index_LE):
            own = ((index_E >= start) & (index_E < stop)).nonzero()[:, 0]
            q, k, v = (nn.functional.pad(x[lane, own], (0, 0, 0, slots)) for x in operands)
            rows = [
                (q[e : e + 1] @ k[: e + 1].T * scale).softmax(-1) @ v[: e + 1] for e in range(slots)
            ]
            y_LEV[lane, own] = torch.cat(rows)[: len(own)]
    return y_LEV


class Memory(NamedTuple):
    """Selected keys and values, their rows (-1 for none) and positions."""

    k_LUK: Tensor
    v_LUV: Tensor
    row_LU: Tensor
    position_LU: Tensor

    def recalled(self, q_LEK: Tensor, row_LE: Tensor, position_LE: Tensor, scale: float) -> Tensor:
        """What queries see of it, `[L, E, V]`."""
        seen_LEU = (self.row_LU[:, None] == row_LE[..., None]) & (row_LE >= 0)[..., None]
        seen_LEU = seen_LEU & (self.position_LU[:, None] <= position_LE[..., None])
        q, k, v = (x.transpose(0, 1)[None] for x in (q_LEK, self.k_LUK, self.v_LUV))
        return masked_attention(q, k, v, seen_LEU, scale)[0].transpose(0, 1)

    def joined(self, later: "Memory") -> "Memory":
        """With what comes after it."""
        return Memory(*(torch.cat(pair, 1) for pair in zip(self, later)))

    def packed(self) -> "Memory":
        """With no more empty slots than lanes differ by."""
        order_LU = (self.row_LU < 0).sort(dim=1, stable=True).indices
        order_LU = order_LU[:, : int((self.row_LU >= 0).sum(1).max())]
        lane_L1 = torch.arange(len(order_LU), device=order_LU.device)[:, None]
        return Memory(*(x[lane_L1, order_LU] for x in self))
