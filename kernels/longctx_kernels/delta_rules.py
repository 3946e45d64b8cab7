"""With which coefficients the tokens of a chunk see each other and the state that enters it.

Every rule gives the coefficients of q and k, and takes their gradients back.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from longctx_kernels.decay_torch import decay_factors
from longctx_kernels.pieces import Slab


class Coefficients(NamedTuple):
    """Gradients of what a rule made of q and k, all `[N, H, C, ..]`, and what it moved."""

    read: Tensor
    scores: Tensor
    key_read: Tensor
    products: Tensor
    kept: Tensor
    starts: Tensor
    ends: Tensor
    """States entering chunks, and gradients of those leaving them."""


class Rule(Protocol):
    """The coefficients of a slab's chunks."""

    def read(self, q: Tensor) -> Tensor:
        """What queries see of the state, `[N, H, C, Z]`."""

    def key_read(self, k: Tensor) -> Tensor:
        """What keys see of the state before they write."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """What queries see of each write, `[N, H, C, C]`."""

    def products(self, k: Tensor) -> Tensor:
        """What keys see of each earlier write, zero on and above the diagonal."""

    def kept(self, k: Tensor) -> Tensor:
        """What is left of writes at the end, `[N, H, C, Z]`."""

    def add_carried(self, move: Tensor) -> None:
        """Adds to `[N, H, Z, Z]` what a chunk keeps of a state if nothing is written."""

    def backward(self, q: Tensor, k: Tensor, d: Coefficients) -> tuple[Tensor, ...]:
        """Gradients of q, k and each gate `[N, H, C, 1 or K]`; none for a constant gate."""


class Decayed:
    """The delta rule: a state that decays, then is written to."""

    def __init__(self, slab: Slab, g: Tensor):
        self._factors = decay_factors(slab, g)
        chunks = range(len(slab.chunks))
        self._whole = torch.stack([self._factors.whole(i) for i in chunks])[..., 0]
        self._is_constant = g.ndim == 1
        self._is_scalar = g.ndim == 2

    def read(self, q: Tensor) -> Tensor:
        return q * self._factors.since_start

    key_read = read

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return self._factors.scores(q, k)

    def products(self, k: Tensor) -> Tensor:
        return self._factors.scores(k, k).tril_(-1)

    def kept(self, k: Tensor) -> Tensor:
        return k * self._factors.until_end

    def add_carried(self, move: Tensor) -> None:
        move.diagonal(dim1=-2, dim2=-1).add_(self._whole)

    def backward(self, q: Tensor, k: Tensor, d: Coefficients) -> tuple[Tensor, ...]:
        factors, own = self._factors, d.scores.diagonal(dim1=2, dim2=3)[..., None].clone()
        dq, dk = factors.score_gradients(d.scores, q, k)
        dq.add_(d.read * factors.since_start)
        dk_reading, dk_read = factors.score_gradients(d.products, k, k)
        dk_reading.add_(d.key_read * factors.since_start)
        dk_kept = d.kept * factors.until_end
        dk.add_(dk_read)
        if self._is_constant:
            return dq + own * k, dk + dk_reading + dk_kept + own * q
        # Of running sums since a chunk's start: queries and reading keys gain, written ones lose.
        dsums = q * dq + k * (dk_reading - dk - dk_kept)
        whole = self._whole * (d.starts * d.ends).sum(-1)
        dsums[:, :, -1] += whole + (k * dk_kept).sum(2)
        if self._is_scalar:
            dsums = dsums.sum(-1, keepdim=True)
        dk = dk + dk_reading + dk_kept + own * q
        return dq + own * k, dk, dsums.flip(2).cumsum(2).flip(2)


class Momentum:
    """A linear memory with momentum: a state [memory; momentum] of 2 K rows.

    `M_t = a_t M_{t-1} + P_t`, `P_t = b_t P_{t-1} + k_t u_t^T` and
    `u_t = beta_t (v_t - M_{t-1}^T k_t)`. A[t, s] is what is left at t of a memory of s, B that of a
    momentum, with tokens of a chunk numbered from 1 and its start 0. The memory at t has
    `C[t, j] = sum of A[t, s] B[s, j] over max(1, j) <= s <= t` of the write at j, or of the
    incoming momentum at j = 0: products and sums of numbers in 0..1.
    """

    def __init__(self, slab: Slab, log_keep_TH: Tensor, log_momentum_TH: Tensor):
        self._keep, self._pass = (_between(slab, g) for g in (log_keep_TH, log_momentum_TH))
        # Where a chunk is short nothing more is added to its memory.
        is_token = (slab.rows() >= 0).view(len(slab.chunks), 1, -1, 1)
        self._is_token = is_token.to(self._keep)
        self._memory = self._keep[..., 1:] @ (self._pass[..., 1:, :] * self._is_token)

    def _seen(self, x: Tensor, rows: slice) -> Tensor:
        memory, momentum = self._keep[:, :, rows, :1], self._memory[:, :, rows, :1]
        return torch.cat((x * memory, x * momentum), -1)

    def read(self, q: Tensor) -> Tensor:
        return self._seen(q, slice(1, None))

    def key_read(self, k: Tensor) -> Tensor:
        return self._seen(k, slice(0, -1))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.mT).mul_(self._memory[:, :, 1:, 1:])

    def products(self, k: Tensor) -> Tensor:
        return (k @ k.mT).mul_(self._memory[:, :, :-1, 1:])

    def kept(self, k: Tensor) -> Tensor:
        memory, momentum = self._memory[:, :, -1, 1:, None], self._pass[:, :, -1, 1:, None]
        return torch.cat((k * memory, k * momentum), -1)

    def add_carried(self, move: Tensor) -> None:
        K = move.shape[-1] // 2
        blocks = (
            (move[..., :K, :K], self._keep),
            (move[..., :K, K:], self._memory),
            (move[..., K:, K:], self._pass),
        )
        for block, factor in blocks:
            block.diagonal(dim1=-2, dim2=-1).add_(factor[:, :, -1, :1])

    def backward(self, q: Tensor, k: Tensor, d: Coefficients) -> tuple[Tensor, ...]:
        K = q.shape[-1]
        dkeep, dpass, dmemory = (
            torch.zeros_like(x) for x in (self._keep, self._pass, self._memory)
        )
        dk_written = torch.zeros_like(k)
        seeing = []
        for x, dread, dscores, rows in (
            (q, d.read, d.scores, slice(1, None)),
            (k, d.key_read, d.products, slice(0, -1)),
        ):
            dread_memory, dread_momentum = dread.split(K, -1)
            dkeep[:, :, rows, 0] += (dread_memory * x).sum(-1)
            dmemory[:, :, rows, 0] += (dread_momentum * x).sum(-1)
            dmemory[:, :, rows, 1:] += dscores * (x @ k.mT)
            weight = dscores * self._memory[:, :, rows, 1:]
            dx = weight @ k
            dx.add_(dread_memory * self._keep[:, :, rows, :1])
            dx.add_(dread_momentum * self._memory[:, :, rows, :1])
            dk_written.add_(weight.mT @ x)
            seeing.append(dx)
        dkept_memory, dkept_momentum = d.kept.split(K, -1)
        dmemory[:, :, -1, 1:] += (dkept_memory * k).sum(-1)
        dpass[:, :, -1, 1:] += (dkept_momentum * k).sum(-1)
        dk_written.add_(dkept_memory * self._memory[:, :, -1, 1:, None])
        dk_written.add_(dkept_momentum * self._pass[:, :, -1, 1:, None])
        (memory, momentum), (dm, dp) = d.starts.split(K, -2), d.ends.split(K, -2)
        dkeep[:, :, -1, 0] += (memory * dm).sum((-2, -1))
        dmemory[:, :, -1, 0] += (momentum * dm).sum((-2, -1))
        dpass[:, :, -1, 0] += (momentum * dp).sum((-2, -1))
        dkeep[..., 1:] += dmemory @ (self._pass[..., 1:, :] * self._is_token).mT
        dpass[..., 1:, :] += (self._keep[..., 1:].mT @ dmemory) * self._is_token
        gates = _log_gradient(dkeep, self._keep), _log_gradient(dpass, self._pass)
        return seeing[0], seeing[1] + dk_written, *gates


def _between(slab: Slab, log_TH: Tensor) -> Tensor:
    """What is left at each row of each column, `[N, H, 1 + C, 1 + C]`, the chunk's start first."""
    factors = decay_factors(slab, log_TH)
    inner, C = factors.between, slab.chunk_size
    whole = inner.new_zeros(*inner.shape[:2], C + 1, C + 1)
    whole[..., 1:, 1:] = inner
    whole[..., 1:, :1] = factors.since_start
    whole[..., 0, 0] = 1
    return whole


def _log_gradient(dfactors: Tensor, factors: Tensor) -> Tensor:
    """Gradient `[N, H, C, 1]` of the logs of single tokens' factors."""
    weight = dfactors * factors
    dsums = weight.sum(-1) - weight.sum(-2)
    return dsums[:, :, 1:].flip(2).cumsum(2).flip(2)[..., None]


def rule_of(slab: Slab, gates: Sequence[Tensor]) -> Rule:
    """One gate is a decay; two are those of a memory with momentum."""
    if len(gates) == 1:
        return Decayed(slab, *gates)
    return Momentum(slab, *gates)


def state_rows(key_dim: int, gates: Sequence[Tensor]) -> int:
    """Z: a momentum is a state of its own."""
    return key_dim * len(gates)
