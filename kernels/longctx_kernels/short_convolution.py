"""Causal convolution along time, one short filter per channel, that documents and cuts respect.

`y_t = f(bias + sum_d weight[:, W-1-d] x_{t-d})` over the taps d = 0 .. W-1 that lie in the
document of t. Two custom ops, one forward and one backward, as compilers and checkpointing want.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from longctx_kernels.launch import backend_of

WIDTHS = range(2, 9)


def short_convolution_reference(
    x_BTC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None = None,
    *,
    before_BWC: Tensor | None = None,
    age_BT: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """The definition, token by token; differentiable by autograd."""
    T, W = x_BTC.shape[1], weight_CW.shape[1]
    dtype = torch.promote_types(x_BTC.dtype, torch.float32)
    padded, weight_CW = _padded(x_BTC, before_BWC, W).to(dtype), weight_CW.to(dtype)
    rows = []
    for t in range(T):
        pre_BC = torch.zeros_like(padded[:, 0])
        for d in range(W):
            tap_BC = padded[:, t + W - 1 - d] * weight_CW[:, W - 1 - d]
            pre_BC = pre_BC + (tap_BC if age_BT is None else tap_BC * (age_BT[:, t, None] >= d))
        pre_BC = pre_BC if bias_C is None else pre_BC + bias_C.to(dtype)
        rows.append(F.silu(pre_BC) if activation == "silu" else pre_BC)
    return torch.stack(rows, 1).to(x_BTC.dtype)


def short_convolution(
    x_BTC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None = None,
    *,
    before_BWC: Tensor | None = None,
    age_BT: Tensor | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """The same at once; gradients reach all but `age_BT`. `activation` is None or "silu".

    `before_BWC` are the W - 1 tokens just before the first; without them there are zeros.
    `age_BT` are ints, the distance of each token from the start of its document, wherever that
    lies: taps further back than that are dropped. Without it nothing is.
    """
    _check(x_BTC, weight_CW, bias_C, before_BWC, age_BT)
    if activation not in (None, "silu"):
        raise ValueError(f"activation {activation!r}: expected None or 'silu'")
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend {backend!r}: expected auto, torch or triton")
    if age_BT is not None:
        age_BT = age_BT.to(torch.int32)
    return torch.ops.longctx.short_convolution(
        x_BTC, weight_CW, bias_C, before_BWC, age_BT, activation == "silu", backend
    )


def _check(x_BTC, weight_CW, bias_C, before_BWC, age_BT) -> None:
    if x_BTC.ndim != 3 or 0 in x_BTC.shape or not x_BTC.dtype.is_floating_point:
        got = f"{x_BTC.dtype} {tuple(x_BTC.shape)}"
        raise ValueError(f"x must be floats [B, T, C] and hold at least one token, got {got}")
    B, T, C = x_BTC.shape
    if weight_CW.ndim != 2 or weight_CW.shape[0] != C or weight_CW.shape[1] not in WIDTHS:
        got = tuple(weight_CW.shape)
        raise ValueError(f"weight must be [C, W], C = {C} and W from 2 to 8, got {got}")
    W = weight_CW.shape[1]
    shapes = {"bias": (C,), "before": (B, W - 1, C), "age": (B, T)}
    for (name, shape), x in zip(shapes.items(), (bias_C, before_BWC, age_BT)):
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(x.shape)}")
        if x is not None and x.device != x_BTC.device:
            raise ValueError(f"{name} must be on {x_BTC.device} as x is, got {x.device}")
    if before_BWC is not None and before_BWC.dtype != x_BTC.dtype:
        raise ValueError(f"before must have x's dtype {x_BTC.dtype}, got {before_BWC.dtype}")
    if age_BT is not None and (age_BT.dtype.is_floating_point or age_BT.dtype == torch.bool):
        raise ValueError(f"age must be ints, got {age_BT.dtype}")


def _padded(x_BTC: Tensor, before_BWC: Tensor | None, W: int) -> Tensor:
    """The tokens behind what comes before them."""
    if before_BWC is None:
        return F.pad(x_BTC, (0, 0, W - 1, 0))
    return torch.cat([before_BWC, x_BTC], 1)


def _young(age_BT: Tensor | None, W: int) -> tuple[Tensor, Tensor] | None:
    """Rows and numbers of the tokens, few, that lack a tap."""
    return None if age_BT is None else (age_BT < W - 1).nonzero(as_tuple=True)


def _filters(weight_CW: Tensor, dtype: torch.dtype) -> Tensor:
    """What each tap is multiplied by, `[W, C]`: row d belongs to the token d back."""
    return weight_CW.to(dtype).t().flip(0).contiguous()


def _convolve(padded: Tensor, weight_CW, bias_C, age_BT) -> Tensor:
    """Before the activation, in the dtype of `padded`."""
    filters_WC = _filters(weight_CW, padded.dtype)
    W, T = len(filters_WC), padded.shape[1] - len(filters_WC) + 1
    pre_BTC = padded[:, W - 1 :] * filters_WC[0]
    for d in range(1, W):
        pre_BTC.addcmul_(padded[:, W - 1 - d : W - 1 - d + T], filters_WC[d])
    if (young := _young(age_BT, W)) is not None:
        b, t = young
        pre_MC = padded[b, t + W - 1] * filters_WC[0]
        for d in range(1, W):
            is_dropped = (age_BT[young] < d)[:, None]
            pre_MC.addcmul_(padded[b, t + W - 1 - d].masked_fill(is_dropped, 0), filters_WC[d])
        pre_BTC[young] = pre_MC
    return pre_BTC if bias_C is None else pre_BTC.add_(bias_C.to(padded.dtype))


def _torch_forward(x_BTC, weight_CW, bias_C, before_BWC, age_BT, is_silu) -> Tensor:
    dtype = torch.promote_types(x_BTC.dtype, torch.float32)
    padded = _padded(x_BTC, before_BWC, weight_CW.shape[1]).to(dtype)
    pre_BTC = _convolve(padded, weight_CW, bias_C, age_BT)
    return (F.silu(pre_BTC, inplace=True) if is_silu else pre_BTC).to(x_BTC.dtype)


def _torch_backward(dout_BTC, x_BTC, weight_CW, bias_C, before_BWC, age_BT, is_silu):
    """Gradients of what is before, of x, the weight and a bias."""
    dtype = torch.promote_types(x_BTC.dtype, torch.float32)
    filters_WC = _filters(weight_CW, dtype)
    W, T = len(filters_WC), x_BTC.shape[1]
    padded = _padded(x_BTC, before_BWC, W).to(dtype)
    dpre_BTC = dout_BTC.to(dtype)
    if is_silu:
        pre_BTC = _convolve(padded, weight_CW, bias_C, age_BT)
        dpre_BTC = torch.ops.aten.silu_backward(dpre_BTC, pre_BTC)
    dbias_C = dpre_BTC.sum((0, 1))
    # Tokens that lack a tap are left out at first; each tap then takes those that have it.
    if (young := _young(age_BT, W)) is not None:
        dyoung_MC, dpre_BTC = dpre_BTC[young], dpre_BTC.index_put(young, dpre_BTC.new_zeros(()))
    dpadded, dfilters_WC = torch.zeros_like(padded), torch.empty_like(filters_WC)
    product_BTC = torch.empty_like(dpre_BTC)
    for d in range(W):
        taps = slice(W - 1 - d, W - 1 - d + T)
        dpadded[:, taps].addcmul_(dpre_BTC, filters_WC[d])
        dfilters_WC[d] = torch.mul(dpre_BTC, padded[:, taps], out=product_BTC).sum((0, 1))
        if young is not None:
            has_tap = age_BT[young] >= d
            b, t = (index[has_tap] for index in young)
            dpadded[b, t + W - 1 - d] += filters_WC[d] * dyoung_MC[has_tap]
            dfilters_WC[d] += (padded[b, t + W - 1 - d] * dyoung_MC[has_tap]).sum(0)
    dbefore_BWC, dx_BTC = dpadded.split([W - 1, T], 1)
    return dbefore_BWC, dx_BTC, dfilters_WC.flip(0).t(), dbias_C


@torch.library.custom_op("longctx::short_convolution", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    age: Tensor | None,
    is_silu: bool,
    backend: str,
) -> Tensor:
    return _passes(x, backend)[0](x, weight, bias, before, age, is_silu)


@_forward.register_fake
def _(x, weight, bias, before, age, is_silu, backend):  # noqa: ARG001
    return x.new_empty(x.shape)


@torch.library.custom_op("longctx::short_convolution_backward", mutates_args=())
def _backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    age: Tensor | None,
    is_silu: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, the weight, the bias and the tokens before (nothing for what is None)."""
    grads = _passes(x, backend)[1](dout, x, weight, bias, before, age, is_silu)
    dbefore, dx, dweight, dbias = grads
    dbias = x.new_zeros(0) if bias is None else dbias.to(bias.dtype)
    dbefore = x.new_zeros(0) if before is None else _owned(dbefore, x.dtype)
    return _owned(dx, x.dtype), _owned(dweight, weight.dtype), dbias, dbefore


@_backward.register_fake
def _(dout, x, weight, bias, before, age, is_silu, backend):  # noqa: ARG001
    nothing = x.new_empty(0)
    given = (nothing if y is None else y.new_empty(y.shape) for y in (bias, before))
    return x.new_empty(x.shape), weight.new_empty(weight.shape), *given


def _owned(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous, in memory that starts with it, as the fake results are."""
    is_owned = x.is_contiguous() and x.untyped_storage().nbytes() == x.numel() * x.element_size()
    return x.to(dtype) if is_owned else x.to(dtype, copy=True).contiguous()


def _passes(x: Tensor, backend: str):
    """Forward and backward pass of a backend."""
    if backend_of(x, backend) == "torch":
        return _torch_forward, _torch_backward
    from longctx_kernels import short_convolution_kernels as kernels

    return kernels.convolve, kernels.convolve_backward


def _keep(ctx, inputs, output) -> None:  # noqa: ARG001
    *tensors, ctx.is_silu, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, dout):
    inputs = ctx.saved_tensors
    dx, dweight, dbias, dbefore = torch.ops.longctx.short_convolution_backward(
        dout, *inputs, ctx.is_silu, ctx.backend
    )
    bias, before = inputs[2:4]
    dbias, dbefore = (None if y is None else dy for y, dy in ((bias, dbias), (before, dbefore)))
    return dx, dweight, dbias, dbefore, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)
