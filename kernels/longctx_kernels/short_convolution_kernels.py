"""Short convolution in Triton: a program walks along time with the last tokens in registers.

Every token is read once and written once, forward as well as backward, but for the few at the
edges of a chunk. What a program sums over time lies in a row of its own, so nothing is atomic.
"""

# Triton's language has no starred expressions.
# ruff: noqa: RUF005

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from longctx_kernels.launch import Options, launch, launch_options
from longctx_kernels.sigmoid import sigmoid

UNROLLED = tl.constexpr(4)
"""Tokens that are read before the first of them is needed."""

OLD = tl.constexpr(8)
"""An age at which every tap is kept."""


def convolve(x_BTC, weight_CW, bias_C, before_BWC, age_BT, is_silu) -> Tensor:
    """The output, in the dtype of x."""
    (B, T, C), W = x_BTC.shape, weight_CW.shape[1]
    operands, strides = _operands(x_BTC, weight_CW, bias_C, before_BWC, age_BT)
    options = _options("short_convolution_forward", x_BTC.device, C, W, is_silu)
    out_BTC = x_BTC.new_empty(B, T, C)
    grid = (cdiv(T, options["BLOCK_T"]) * cdiv(C, options["BLOCK_C"]), B)
    launch(short_convolution_forward, grid, *operands, out_BTC, T, *strides, options=options)
    return out_BTC


def convolve_backward(dout_BTC, x_BTC, weight_CW, bias_C, before_BWC, age_BT, is_silu):
    """Gradients of what is before (or None), of x, the weight and a bias (fp32)."""
    (B, T, C), W = x_BTC.shape, weight_CW.shape[1]
    operands, strides = _operands(x_BTC, weight_CW, bias_C, before_BWC, age_BT)
    options = _options("short_convolution_backward", x_BTC.device, C, W, is_silu)
    chunks = cdiv(T, options["BLOCK_T"] - W + 1)
    dx_BTC = x_BTC.new_empty(B, T, C)
    dbefore_BWC = None if before_BWC is None else x_BTC.new_empty(B, W - 1, C)
    sums = torch.empty(B * chunks, W + 1, C, dtype=torch.float32, device=x_BTC.device)
    grid = (chunks * cdiv(C, options["BLOCK_C"]), B)
    arguments = *operands, dout_BTC.contiguous(), dx_BTC, dbefore_BWC, sums, T, *strides
    launch(short_convolution_backward, grid, *arguments, options=options)
    total = sums.sum(0)
    return dbefore_BWC, dx_BTC, total[:W].flip(0).t(), total[W]


def _operands(x_BTC, weight_CW, bias_C, before_BWC, age_BT):
    """What the kernels read, and strides of rows and tokens of x and of what is before.

    Tokens may lie apart, as they do in a slice of a wider projection.
    """
    x_BTC, before_BWC = (
        x if x is None or x.stride(2) == 1 else x.contiguous() for x in (x_BTC, before_BWC)
    )
    weight_CW, bias_C, age_BT = (
        None if x is None else x.contiguous() for x in (weight_CW, bias_C, age_BT)
    )
    edges = (0, 0) if before_BWC is None else before_BWC.stride()[:2]
    return (x_BTC, weight_CW, bias_C, before_BWC, age_BT), (*x_BTC.stride()[:2], *edges)


def _options(kernel: str, device: torch.device, C: int, W: int, is_silu: bool) -> Options:
    """Options from the table, which knows one size."""
    options = launch_options(kernel, 1, device)
    options["BLOCK_C"] = min(options["BLOCK_C"], max(16, next_power_of_2(C)))
    return options | {"SILU": is_silu, "C": C, "W": W}


@triton.jit
def _row(x_TC, row, stride, first, last, c, C: tl.constexpr):
    """A token in fp32, zeros if it is none of `first .. last - 1`."""
    mask = (c < C) & (row >= first) & (row < last)
    return tl.load(x_TC + row * stride + c, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _rows(x_TC, row, stride, last, c, C: tl.constexpr):
    """The next UNROLLED tokens."""
    rows = ()
    for u in tl.static_range(UNROLLED):
        rows = rows + (_row(x_TC, row + u, stride, 0, last, c, C),)
    return rows


@triton.jit
def _window(
    x_TC, stride, before_BWC, edge, edge_stride, start, c, C: tl.constexpr, W: tl.constexpr
):
    """The W - 1 tokens before the one at `x_TC`, number `start` of all, the nearest first.

    Those before all lie `edge` values into `before_BWC`.
    """
    window = ()
    for d in tl.static_range(1, W):
        # Chunks are no shorter than the window: those but the first have all of it.
        row_C = _row(x_TC, -d, stride, -start, 0, c, C)
        if before_BWC is not None:
            row_C += _row(before_BWC + edge, W - 1 - d, edge_stride, start, W - 1, c, C)
        window = window + (row_C,)
    return window


@triton.jit
def _filters(weight_CW, c, C: tl.constexpr, W: tl.constexpr):
    """What the token d back is multiplied by, for d = 0 .. W - 1."""
    filters = ()
    for d in tl.static_range(W):
        at = weight_CW + c * W + (W - 1 - d)
        filters = filters + (tl.load(at, mask=c < C, other=0.0).to(tl.float32),)
    return filters


@triton.jit
def _kept(x_C, age, d: tl.constexpr):
    """Zeros if the document of a token does not reach `d` tokens back."""
    return tl.where(age >= d, x_C, 0.0)


@triton.jit
def _taps(x_C, window, age, W: tl.constexpr):
    """What a token is made of, itself first; the first W - 1 are the window of the next."""
    taps = (x_C,)
    for d in tl.static_range(1, W):
        taps = taps + (_kept(window[d - 1], age, d),)
    return taps


@triton.jit
def _ages(age_BT, start, row, last):
    """Of the next UNROLLED tokens, `start + row` and on of all."""
    ages = ()
    for u in tl.static_range(UNROLLED):
        if age_BT is None:
            ages = ages + (OLD,)
        else:
            ages = ages + (tl.load(age_BT + start + row + u, mask=row + u < last, other=0),)
    return ages


@triton.jit
def _convolved(taps, filters, bias_C, W: tl.constexpr):
    pre_C = bias_C + taps[0] * filters[0]
    for d in tl.static_range(1, W):
        pre_C += taps[d] * filters[d]
    return pre_C


@triton.jit
def _bias(bias_C, c, C: tl.constexpr):
    if bias_C is None:
        return tl.zeros_like(c).to(tl.float32)
    else:
        return tl.load(bias_C + c, mask=c < C, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def short_convolution_forward(
    x_BTC,
    weight_CW,
    bias_C,
    before_BWC,
    age_BT,
    out_BTC,
    T,
    x_row,
    x_token,
    before_row,
    before_token,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
):
    """BLOCK_T tokens of one row of the batch, BLOCK_C of their channels."""
    parts: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    start = (tl.program_id(0) // parts) * BLOCK_T
    c = (tl.program_id(0) % parts) * BLOCK_C + tl.arange(0, BLOCK_C)
    b, at = tl.program_id(1).to(tl.int64), start.to(tl.int64)
    x_TC, out_TC = x_BTC + b * x_row + at * x_token, out_BTC + (b * T + at) * C
    filters, bias_C = _filters(weight_CW, c, C, W), _bias(bias_C, c, C)
    window = _window(x_TC, x_token, before_BWC, b * before_row, before_token, start, c, C, W)
    last = T - start
    for first in range(0, BLOCK_T, UNROLLED):
        rows, ages = _rows(x_TC, first, x_token, last, c, C), _ages(age_BT, b * T + at, first, last)
        for u in tl.static_range(UNROLLED):
            t = first + u
            taps = _taps(rows[u], window, ages[u], W)
            y_C = _convolved(taps, filters, bias_C, W)
            if SILU:
                y_C *= sigmoid(y_C)
            y_C = y_C.to(out_TC.dtype.element_ty)
            tl.store(out_TC + t * C + c, y_C, mask=(c < C) & (t < last))
            window = taps[: W - 1]


@triton.jit
def _with_product(sums, taps, factor_C, W: tl.constexpr):
    """Adds to each sum its tap times the factor."""
    added = ()
    for d in tl.static_range(W):
        added = added + (sums[d] + taps[d] * factor_C,)
    return added


@triton.jit
def _with_gradient(grads, filters, dpre_C, age, W: tl.constexpr):
    """Adds a token's share to gradients of itself and its window; the last one is complete."""
    added = (filters[0] * dpre_C,)
    for d in tl.static_range(1, W):
        added = added + (grads[d - 1] + filters[d] * _kept(dpre_C, age, d),)
    return added


@triton.jit
def _zeros(c, count: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(count):
        zeros = zeros + (tl.zeros_like(c).to(tl.float32),)
    return zeros


@triton.jit(do_not_specialize=["T"])
def short_convolution_backward(
    x_BTC,
    weight_CW,
    bias_C,
    before_BWC,
    age_BT,
    dout_BTC,
    dx_BTC,
    dbefore_BWC,
    sums_RWC,
    T,
    x_row,
    x_token,
    before_row,
    before_token,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
):
    """Gradients of BLOCK_T - W + 1 tokens, whose outputs reach W - 1 tokens further."""
    parts: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    own: tl.constexpr = BLOCK_T - W + 1
    start = (tl.program_id(0) // parts) * own
    c = (tl.program_id(0) % parts) * BLOCK_C + tl.arange(0, BLOCK_C)
    b, at = tl.program_id(1).to(tl.int64), start.to(tl.int64)
    x_TC, dx_TC = x_BTC + b * x_row + at * x_token, dx_BTC + (b * T + at) * C
    dout_TC = dout_BTC + (b * T + at) * C
    filters, bias_C = _filters(weight_CW, c, C, W), _bias(bias_C, c, C)
    window = _window(x_TC, x_token, before_BWC, b * before_row, before_token, start, c, C, W)
    grads, sums, dbias_C = _zeros(c, W - 1), _zeros(c, W), tl.zeros_like(bias_C)
    last = T - start
    for first in range(0, BLOCK_T, UNROLLED):
        rows, ages = _rows(x_TC, first, x_token, last, c, C), _ages(age_BT, b * T + at, first, last)
        drows = _rows(dout_TC, first, C, last, c, C)
        for u in tl.static_range(UNROLLED):
            t = first + u
            taps = _taps(rows[u], window, ages[u], W)
            dpre_C = drows[u]
            if SILU:
                pre_C = _convolved(taps, filters, bias_C, W)
                gate_C = sigmoid(pre_C)
                dpre_C *= gate_C * (1 + pre_C * (1 - gate_C))
            own_C = tl.where(t < own, dpre_C, 0.0)
            sums, dbias_C = _with_product(sums, taps, own_C, W), dbias_C + own_C
            added = _with_gradient(grads, filters, dpre_C, ages[u], W)
            done_C, s = added[W - 1].to(dx_TC.dtype.element_ty), t - (W - 1)
            tl.store(dx_TC + s * C + c, done_C, mask=(c < C) & (s >= 0) & (s < last))
            if dbefore_BWC is not None:
                mask = (c < C) & (s < 0) & (start == 0)
                tl.store(dbefore_BWC + (b * (W - 1) + t) * C + c, done_C, mask=mask)
            grads, window = added[: W - 1], taps[: W - 1]
    r = b * tl.cdiv(T, own) + tl.program_id(0) // parts
    for d in tl.static_range(W):
        tl.store(sums_RWC + (r * (W + 1) + d) * C + c, sums[d], mask=c < C)
    tl.store(sums_RWC + (r * (W + 1) + W) * C + c, dbias_C, mask=c < C)
