"""Local linear attention (arXiv 2510.01450): a linear fit to the values near a query, read there.

With `w_j = exp(q.k_j s)` and `d_j = k_j - q`, sums over the keys a query sees: omega of w_j, mu of
w_j d_j, Sigma of w_j d_j d_j^T plus ridge omega I. `rho = Sigma^-1 mu` weighs value j by
`w_j (1 - rho.d_j) / (omega - mu.rho)`; weights sum to 1, and rho = 0 is softmax attention. The
paper solves by conjugate gradients; here each query's matrix is factored (Cholesky), exactly, in at
least fp32, and again in the backward pass, which has a solution of its own. Nothing is as large as
queries times keys: a block of queries at a time sees all its keys, and Sigma some keys at a time.

q is `[B, T, H, K]`, k and v `[B, G, H, K or V]`; query t of a row sees keys `first..last`.
"""

import torch
from torch import Tensor

from longctx_kernels.keeping import recalled

MOST_SCORES = 2**22
"""Scores of a block of queries that are held at a time."""
MOST_PRODUCTS = 2**22
"""Products of entries of keys that are held at a time."""


def local_linear_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, ridge: float, scale: float
) -> Tensor:
    """The definition, query by query; differentiable by autograd."""
    wide = _wide(q)
    bounds = list(zip(first.flatten().tolist(), last.flatten().tolist()))
    outputs = []
    for index, (start, stop) in enumerate(bounds):
        row, t = divmod(index, q.shape[1])
        q_HK = q[row, t].to(wide)
        k_HJK, v_HJV = (x[row, start : stop + 1].to(wide).transpose(0, 1) for x in (k, v))
        w_HJ1 = ((k_HJK @ q_HK[..., None]) * scale).softmax(1)
        d_HJK = k_HJK - q_HK[:, None]
        mu_HK1 = d_HJK.mT @ w_HJ1
        eye = torch.eye(q.shape[-1], dtype=wide, device=q.device)
        sigma_HKK = (d_HJK * w_HJ1).mT @ d_HJK + ridge * eye
        rho_HK1 = torch.linalg.solve(sigma_HKK, mu_HK1)
        weight_HJ1 = w_HJ1 * (1 - d_HJK @ rho_HK1) / (1 - (mu_HK1 * rho_HK1).sum(1, keepdim=True))
        outputs.append((weight_HJ1.mT @ v_HJV)[:, 0])
    return torch.stack(outputs).view(*q.shape[:3], -1).to(v.dtype)


def local_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, ridge: float, scale: float
) -> Tensor:
    """The same by blocks of queries, `[B, T, H, V]`; the backward pass solves again."""
    if ridge <= 0:
        raise ValueError(f"ridge must be positive, got {ridge}")
    if first.shape != q.shape[:2] or last.shape != q.shape[:2]:
        raise ValueError(f"first and last must be {tuple(q.shape[:2])}")
    return _forward_op(q, k, v, first, last, ridge, scale)


class _Block:
    """Some queries `[B, H, Q, K]` and the keys `[B, H, J, K]` among which theirs are."""

    def __init__(self, q: Tensor, k: Tensor, hidden_BQJ: Tensor, ridge: float, scale: float):
        self.q, self.k, self.scale = q, k, scale
        scores = (q @ k.mT).mul_(scale).masked_fill_(hidden_BQJ[:, None], -torch.inf)
        self.p = scores.softmax(-1)
        mu, sigma = self._moments()
        sigma.diagonal(dim1=-2, dim2=-1).add_(ridge)
        self._factor = torch.linalg.cholesky_ex(sigma).L
        self.rho = self.solve(mu)
        self.total = 1 - (mu * self.rho).sum(-1, keepdim=True)
        self.slope = 1 - self.along(self.rho)

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Means of d and of d d^T, the latter from products of keys, which queries share."""
        (B, H, Q, K), mean = self.q.shape, self.p @ self.k
        squares = self.q.new_zeros(B, H, Q, K * K)
        size = max(1, MOST_PRODUCTS // (B * H * K * K))
        for p, k in zip(self.p.split(size, -1), self.k.split(size, -2)):
            squares += p @ (k[..., None] * k[..., None, :]).flatten(-2)
        mu = mean - self.q
        spread = squares.view(B, H, Q, K, K) - mean[..., None] * mean[..., None, :]
        return mu, spread.addcmul_(mu[..., None], mu[..., None, :])

    def solve(self, x: Tensor) -> Tensor:
        """`Sigma^-1 x` of each query."""
        return torch.cholesky_solve(x[..., None], self._factor)[..., 0]

    def along(self, x: Tensor) -> Tensor:
        """`x.d_j` of each query and key."""
        return x @ self.k.mT - (x * self.q).sum(-1, keepdim=True)

    def attend(self, v: Tensor) -> Tensor:
        return (self.p * self.slope / self.total) @ v

    def backward(self, v: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v."""
        read = self.p * self.slope
        weight, dweight = read / self.total, dout @ v.mT
        dread = (dweight - (weight * dweight).sum(-1, keepdim=True)) / self.total
        drho_by_key = self.p * dread
        drho = drho_by_key.sum(-1, keepdim=True) * self.q - drho_by_key @ self.k
        dmu = self.solve(drho)
        both = dread + self.along(dmu)
        dp = both * self.slope
        dscores = self.p * (dp - (self.p * dp).sum(-1, keepdim=True)) * self.scale
        bent = self.p * both
        sums = (x.sum(-1, keepdim=True) for x in (read, bent))
        dq = dscores @ self.k - dmu * next(sums) + self.rho * next(sums)
        dk = dscores.mT @ self.q + read.mT @ dmu - bent.mT @ self.rho
        return dq, dk, weight.mT @ dout


def _blocks(q, k, first, last, ridge, scale):
    """(queries, keys, block) of everything; operands are `[B, H, .., K]`."""
    (B, H, T, _), G = q.shape, k.shape[2]
    size = min(T, max(8, min(128, MOST_SCORES // (B * H * G))))
    starts = range(0, T, size)
    # Elsewhere than on a CPU to look would be to wait.
    looks = q.device.type == "cpu"
    for start in starts:
        rows = slice(start, min(T, start + size))
        low, high = first[:, rows], last[:, rows]
        keys = slice(int(low.min()), int(high.max()) + 1) if looks else slice(0, G)
        places_J = torch.arange(G, device=q.device)[keys]
        hidden_BQJ = (places_J < low[..., None]) | (places_J > high[..., None])
        yield rows, keys, _Block(q[:, :, rows], k[:, :, keys], hidden_BQJ, ridge, scale)


def _by_head(*operands: Tensor) -> list[Tensor]:
    """`[B, H, .., K]`, in at least fp32."""
    return [x.to(_wide(x)).transpose(1, 2) for x in operands]


@torch.library.custom_op("longctx::local_linear_attention", mutates_args=())
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, ridge: float, scale: float
) -> Tensor:
    return recalled(lambda: _attended((q, k, v), first, last, ridge, scale))


def _attended(operands, first, last, ridge, scale) -> Tensor:
    q, _, v = operands
    q_BHTK, k_BHGK, v_BHGV = _by_head(*operands)
    out = v.new_empty(*q.shape[:3], v.shape[-1])
    for rows, keys, block in _blocks(q_BHTK, k_BHGK, first, last, ridge, scale):
        out[:, rows] = block.attend(v_BHGV[:, :, keys]).transpose(1, 2).to(out.dtype)
    return out


@_forward_op.register_fake
def _(q, _k, v, *_others):
    return v.new_empty(*q.shape[:3], v.shape[-1])


@torch.library.custom_op("longctx::local_linear_attention_backward", mutates_args=())
def _backward_op(
    dout: Tensor, operands: list[Tensor], first: Tensor, last: Tensor, ridge: float, scale: float
) -> list[Tensor]:
    """Gradients of q, k and v."""
    q, k, v, dout = _by_head(*operands, dout)
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for rows, keys, block in _blocks(q, k, first, last, ridge, scale):
        grads = block.backward(v[:, :, keys], dout[:, :, rows])
        dq[:, :, rows] = grads[0]
        dk[:, :, keys] += grads[1]
        dv[:, :, keys] += grads[2]
    return [dx.transpose(1, 2).to(x.dtype).contiguous() for dx, x in zip((dq, dk, dv), operands)]


@_backward_op.register_fake
def _(_dout, operands, *_others):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in operands]


def _keep(ctx, inputs, output) -> None:  # noqa: ARG001
    *tensors, ctx.ridge, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, dout):
    q, k, v, first, last = ctx.saved_tensors
    grads = _backward_op(dout, [q, k, v], first, last, ctx.ridge, ctx.scale)
    return *grads, None, None, None, None


_forward_op.register_autograd(_differentiate, setup_context=_keep)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
