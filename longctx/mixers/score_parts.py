"""Parts of attention with other scores: projections, factors, gates, keys that are remembered."""

from typing import NamedTuple

import torch
from longctx_kernels.lifetime_attention import flash_lifetime
from torch import Tensor, nn
from torch.nn import functional as F

from longctx.mixers.base import RMSNorm
from longctx.sequence.patterned import Operands, Scoring
from longctx.sequence.policy import Lifetime
from longctx.sequence.running import wide
from longctx.sequence.view import one_row


class SharedHeads(nn.Module):
    """One projection for all heads, and a vector a head that is added to it (MHE).

    `[B, T, D]` to `[B, T, heads * size]`, as a projection for each head gives it.
    """

    def __init__(self, width: int, heads: int, size: int):
        super().__init__()
        self.all = nn.Linear(width, size, bias=False)
        self.each = nn.Parameter(0.02 * torch.randn(heads, size))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Heads side by side."""
        shared_BT1K = self.all(x_BTD)[..., None, :]
        return (shared_BT1K + self.each.to(shared_BT1K.dtype)).flatten(2)


class Temperature(nn.Module):
    """Factors `[B, T, heads]` about 1 that depend on the token, and on how far it is into its
    document: 1 + tanh(two small layers) + exp(-exp(beta)) ln(position from 1)."""

    def __init__(self, width: int, heads: int, by_position: bool):
        super().__init__()
        self.down = nn.Linear(width, heads, bias=False)
        self.up = nn.Linear(heads, heads, bias=False)
        self.beta = nn.Parameter(torch.full((heads,), 1.5)) if by_position else None

    def forward(self, x_BTD: Tensor, position_BT: Tensor) -> Tensor:
        """In at least fp32."""
        factor_BTH = 1 + wide(self.up(F.gelu(self.down(x_BTD)))).tanh()
        if self.beta is None:
            return factor_BTH
        ln_BT1 = (position_BT + 1).to(factor_BTH.dtype).log()[..., None]
        return factor_BTH + (-self.beta.exp()).exp() * ln_BT1


class ReluGate(nn.Module):
    """s y / rms(y) sigmoid(w y), which takes the place of a normaliser after relu scores."""

    def __init__(self, size: int):
        super().__init__()
        self.norm = RMSNorm(size)
        self.rate = nn.Parameter(torch.zeros(size))

    def forward(self, y: Tensor) -> Tensor:
        """Over the last dimension."""
        return self.norm(y) * (y * self.rate.to(y.dtype)).sigmoid()


def alibi_slopes(heads: int) -> Tensor:
    """2^(-8 h / heads), h from 1."""
    return 2.0 ** (-8 * torch.arange(1, heads + 1, dtype=torch.float64) / heads)


class Remembered(NamedTuple):
    """Keys that tokens to come may see, values and any key biases; positions, tokens so far."""

    keys: tuple[Tensor, ...]
    position_U: Tensor
    tokens: int


def attend_on(
    operands: Operands,
    policy: Lifetime,
    scoring: Scoring,
    memory: Remembered | None,
    backend: str,
) -> tuple[tuple[Tensor, Tensor], Remembered]:
    """(out, log-sum-exp) of the next tokens of every row, and the memory after them."""
    before = memory.tokens if memory else 0
    total = before + operands[0].shape[1]
    own_T = position_U = torch.arange(before, total)
    keys = tuple(x for x in (*operands[1:], scoring.key_bias_BTH) if x is not None)
    if memory:
        keys = tuple(torch.cat(pair, 1) for pair in zip(memory.keys, keys))
        position_U = torch.cat((memory.position_U, own_T))
    expiry_U = policy.expiry(position_U)[0]
    if len(keys) > 2:
        scoring = scoring._replace(key_bias_BTH=keys[2])
    where = own_T, position_U, expiry_U.clamp(max=total)
    found = _attend_rows((operands[0], keys[0], keys[1]), where, scoring, backend)
    kept_U = (expiry_U > total).nonzero()[:, 0]
    kept = tuple(x[:, kept_U.to(x.device)] for x in keys)
    return found, Remembered(kept, position_U[kept_U], total)


def _attend_rows(
    operands: Operands, where: tuple[Tensor, ...], scoring: Scoring, backend: str
) -> tuple[Tensor, Tensor]:
    """Given positions of queries and of keys, and those at which keys expire."""
    q_BTHK = operands[0]
    base_B1 = torch.arange(len(q_BTHK))[:, None] * (int(where[0][-1]) + 1)
    queries, places, expiry = (
        (base_B1 + x).view(1, -1).to(q_BTHK.device, torch.int32) for x in where
    )
    biases = scoring.key_bias_BTH, scoring.query_bias_BTH
    key_bias, query_bias = (None if b is None else one_row(b) for b in biases)
    q, k, v = (one_row(x) for x in operands)
    out, lse = flash_lifetime(
        q,
        k,
        v,
        expiry=expiry,
        query_positions=queries,
        key_positions=places,
        key_bias=key_bias,
        query_bias=query_bias,
        slope=scoring.slope_H,
        normaliser=scoring.normaliser,
        scale=scoring.scale,
        backend=backend,
    )
    return out.view(*q_BTHK.shape[:3], -1), lse.view(q_BTHK.shape[:3])
