"""RMSNorm over the last dimension, times a weight, times the activation of a gate, in one pass.

`y = x rsqrt(mean(x^2) + eps) weight f(gate)`, statistics in at least fp32. Backward computes the
norm again, so that only the inputs are kept. Two custom ops, one forward and one backward.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from longctx_kernels.launch import backend_of

ACTIVATIONS = {"none": lambda x: x, "silu": F.silu, "sigmoid": torch.sigmoid}


SLAB_ELEMENTS = 1 << 20
"""Elements of rows whose gradients are computed at once."""


def norm_gate_reference(
    x_BTHV: Tensor,
    gate_BTHV: Tensor | None = None,
    weight_V: Tensor | None = None,
    *,
    eps: float = 1e-6,
    activation: str = "silu",
) -> Tensor:
    """The definition; differentiable by autograd."""
    wide = x_BTHV.to(torch.promote_types(x_BTHV.dtype, torch.float32))
    out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight_V is not None:
        out = out * weight_V.to(wide.dtype)
    if gate_BTHV is not None:
        out = out * ACTIVATIONS[activation](gate_BTHV.to(wide.dtype))
    return out.to(x_BTHV.dtype)


def norm_gate(
    x_BTHV: Tensor,
    gate_BTHV: Tensor | None = None,
    weight_V: Tensor | None = None,
    *,
    eps: float = 1e-6,
    activation: str = "silu",
    backend: str = "auto",
) -> Tensor:
    """The same in one pass. Any leading dimensions will do; `activation` is that of the gate."""
    _check(x_BTHV, gate_BTHV, weight_V)
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: expected one of {', '.join(ACTIVATIONS)}")
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend {backend!r}: expected auto, torch or triton")
    return torch.ops.longctx.norm_gate(x_BTHV, gate_BTHV, weight_V, float(eps), activation, backend)


def _check(x: Tensor, gate: Tensor | None, weight: Tensor | None) -> None:
    if x.ndim < 1 or 0 in x.shape or not x.dtype.is_floating_point:
        got = f"{x.dtype} {tuple(x.shape)}"
        raise ValueError(f"x must be floats [..., V] and hold at least one row, got {got}")
    for name, y, shape in (("gate", gate, x.shape), ("weight", weight, x.shape[-1:])):
        if y is not None and y.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(y.shape)}")
        if y is not None and y.device != x.device:
            raise ValueError(f"{name} must be on {x.device} as x is, got {y.device}")
    if gate is not None and gate.dtype != x.dtype:
        raise ValueError(f"gate must have x's dtype {x.dtype}, got {gate.dtype}")


def _torch_forward(x, gate, weight, eps, activation) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight = None if weight is None else weight.to(dtype)
    out = F.rms_norm(x.to(dtype), x.shape[-1:], weight, eps)
    if gate is not None:
        out *= ACTIVATIONS[activation](gate.to(dtype))
    return out.to(x.dtype)


def _torch_backward(dout, x, gate, weight, eps, activation):
    """Gradients of x, the gate and the weight; None for what is None.

    Slab after slab of rows: what is computed on the way takes several times the memory of x.
    """
    options, V = (weight, eps, activation), x.shape[-1]
    if x.numel() <= SLAB_ELEMENTS:
        return _slab_backward(dout, x, gate, *options)
    slabs = [y.reshape(-1, V).split(max(1, SLAB_ELEMENTS // V)) for y in (dout, x)]
    gates = [None] * len(slabs[0]) if gate is None else gate.reshape(-1, V).split(len(slabs[0][0]))
    dtype, dweight = torch.promote_types(x.dtype, torch.float32), None
    dx = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    dgate = None if gate is None else torch.empty_like(dx)
    start = 0
    for dout_slab, x_slab, gate_slab in zip(*slabs, gates):
        rows, start = slice(start, start + len(x_slab)), start + len(x_slab)
        found = _slab_backward(dout_slab, x_slab, gate_slab, *options)
        dx.view(-1, V)[rows] = found[0]
        if dgate is not None:
            dgate.view(-1, V)[rows] = found[1]
        if weight is not None:
            dweight = found[2] if dweight is None else dweight + found[2]
    return dx, dgate, dweight


def _slab_backward(dout, x, gate, weight, eps, activation):
    dtype = torch.promote_types(x.dtype, torch.float32)
    dout, wide = dout.to(dtype), x.to(dtype)
    weight = None if weight is None else weight.to(dtype)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed, dgate, dweight = wide * rstd, None, None
    if gate is not None:
        factor = ACTIVATIONS[activation](gate.to(dtype))
        dgate = dout * normed
        if activation == "silu":
            dgate = torch.ops.aten.silu_backward(dgate, gate.to(dtype))
        elif activation == "sigmoid":
            dgate = torch.ops.aten.sigmoid_backward(dgate, factor)
        dgate = dgate if weight is None else dgate.mul_(weight)
        dout = dout * factor
    product = dout * normed
    if weight is None:
        along = product.mean(-1, keepdim=True)
    else:
        dweight = product.reshape(-1, x.shape[-1]).sum(0)
        along = (product @ weight)[..., None] / x.shape[-1]
        dout = dout * weight
    return torch.addcmul(dout, normed, along, value=-1).mul_(rstd), dgate, dweight


@torch.library.custom_op("longctx::norm_gate", mutates_args=())
def _forward(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    eps: float,
    activation: str,
    backend: str,
) -> Tensor:
    out = _passes(x, backend)[0](x, gate, weight, eps, activation)
    return out.contiguous()


@_forward.register_fake
def _(x, gate, weight, eps, activation, backend):  # noqa: ARG001
    return x.new_empty(x.shape)


@torch.library.custom_op("longctx::norm_gate_backward", mutates_args=())
def _backward(
    dout: Tensor,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    eps: float,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, the gate and the weight (nothing for what is None)."""
    grads = _passes(x, backend)[1](dout, x, gate, weight, eps, activation)
    return tuple(
        x.new_zeros(0) if y is None else dy.to(y.dtype).contiguous()
        for y, dy in zip((x, gate, weight), grads)
    )


@_backward.register_fake
def _(dout, x, gate, weight, eps, activation, backend):  # noqa: ARG001
    return tuple(x.new_empty(0) if y is None else y.new_empty(y.shape) for y in (x, gate, weight))


def _passes(x: Tensor, backend: str):
    """Forward and backward pass of a backend."""
    if backend_of(x, backend) == "torch":
        return _torch_forward, _torch_backward
    from longctx_kernels import norm_gate_kernels as kernels

    return kernels.forward, kernels.backward


def _keep(ctx, inputs, output) -> None:  # noqa: ARG001
    *tensors, ctx.eps, ctx.activation, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, dout):
    inputs = ctx.saved_tensors
    grads = torch.ops.longctx.norm_gate_backward(
        dout, *inputs, ctx.eps, ctx.activation, ctx.backend
    )
    return *(None if y is None else dy for y, dy in zip(inputs, grads)), None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)
