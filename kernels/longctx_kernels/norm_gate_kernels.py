"""Norm and gate in Triton: a program holds whole rows, reads them once and writes them once."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from longctx_kernels.launch import SIZES, Options, launch, launch_options
from longctx_kernels.sigmoid import sigmoid

LARGEST = 8192
"""Values of a row that one program can hold."""


def forward(x, gate, weight, eps, activation) -> Tensor:
    """The output, in the dtype of x."""
    x_MV, gate_MV, weight_V = _flat(x), _flat(gate), _flat(weight)
    M = x_MV.shape[0]
    options = _options("norm_gate_forward", x_MV, activation)
    out = torch.empty_like(x_MV).view(x.shape)
    grid = (cdiv(M, options["BLOCK_M"]),)
    launch(norm_gate_forward, grid, x_MV, gate_MV, weight_V, out, eps, M, options=options)
    return out


def backward(dout, x, gate, weight, eps, activation) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, the gate and the weight (fp32); None for what is None."""
    dout_MV, x_MV, gate_MV, weight_V = _flat(dout), _flat(x), _flat(gate), _flat(weight)
    M, V = x_MV.shape
    options = _options("norm_gate_backward", x_MV, activation)
    dx = torch.empty_like(x_MV).view(x.shape)
    dgate = None if gate is None else torch.empty_like(gate_MV).view(x.shape)
    programs = cdiv(M, options["BLOCK_M"] * options["BLOCKS"])
    sums = None
    if weight is not None:
        sums = torch.empty(programs, V, dtype=torch.float32, device=x.device)
    arguments = dout_MV, x_MV, gate_MV, weight_V, dx, dgate, sums, eps, M
    launch(norm_gate_backward, (programs,), *arguments, options=options)
    return dx, dgate, None if sums is None else sums.sum(0)


def _flat(x: Tensor | None) -> Tensor | None:
    """Rows end to end."""
    return None if x is None else x.contiguous().view(-1, x.shape[-1])


def _options(kernel: str, x_MV: Tensor, activation: str) -> Options:
    """Options from the table; rows larger than it knows get fewer to a program and more warps."""
    V = x_MV.shape[1]
    if V > LARGEST:
        raise ValueError(f"x has rows of {V}: at most {LARGEST}, or choose backend 'torch'")
    options = launch_options(kernel, min(V, SIZES[-1]), x_MV.device)
    width = max(16, next_power_of_2(V))
    if width > SIZES[-1]:
        held = options["BLOCK_M"] * SIZES[-1]
        options["BLOCK_M"] = max(1, held // width)
        options["num_warps"] *= max(1, min(width // held, 16 // options["num_warps"]))
    return options | {"ACTIVATION": activation, "V": V, "WIDTH": width}


@triton.jit
def _activated(gate_MV, ACTIVATION: tl.constexpr):
    """The activation of a gate and its derivative."""
    if ACTIVATION == "none":
        return gate_MV, tl.full(gate_MV.shape, 1.0, tl.float32)
    else:
        sigmoid_MV = sigmoid(gate_MV)
        if ACTIVATION == "sigmoid":
            return sigmoid_MV, sigmoid_MV * (1 - sigmoid_MV)
        else:
            return gate_MV * sigmoid_MV, sigmoid_MV * (1 + gate_MV * (1 - sigmoid_MV))


@triton.jit
def _weight(weight_V, v, V: tl.constexpr):
    if weight_V is None:
        return tl.full(v.shape, 1.0, tl.float32)
    else:
        return tl.load(weight_V + v, mask=v < V, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["eps", "M"])
def norm_gate_forward(
    x_MV,
    gate_MV,
    weight_V,
    out_MV,
    eps,
    M,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """BLOCK_M rows."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    v = tl.arange(0, WIDTH)
    at, mask = m[:, None] * V + v[None, :], (m < M)[:, None] & (v < V)[None, :]
    x = tl.load(x_MV + at, mask=mask, other=0.0).to(tl.float32)
    if gate_MV is not None:
        gate = tl.load(gate_MV + at, mask=mask, other=0.0).to(tl.float32)
    rstd_M = tl.rsqrt(tl.sum(x * x, 1) / V + eps)
    y = x * rstd_M[:, None] * _weight(weight_V, v, V)[None, :]
    if gate_MV is not None:
        factor, _ = _activated(gate, ACTIVATION)
        y *= factor
    tl.store(out_MV + at, y.to(out_MV.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["eps", "M"])
def norm_gate_backward(
    dout_MV,
    x_MV,
    gate_MV,
    weight_V,
    dx_MV,
    dgate_MV,
    sums_PV,
    eps,
    M,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCKS: tl.constexpr,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """BLOCKS times BLOCK_M rows, and a row of their sum for the weight."""
    v = tl.arange(0, WIDTH)
    weight = _weight(weight_V, v, V)[None, :]
    sums = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for block in range(BLOCKS):
        first = (tl.program_id(0).to(tl.int64) * BLOCKS + block) * BLOCK_M
        m = first + tl.arange(0, BLOCK_M)
        at, mask = m[:, None] * V + v[None, :], (m < M)[:, None] & (v < V)[None, :]
        x = tl.load(x_MV + at, mask=mask, other=0.0).to(tl.float32)
        dout = tl.load(dout_MV + at, mask=mask, other=0.0).to(tl.float32)
        if gate_MV is not None:
            gate = tl.load(gate_MV + at, mask=mask, other=0.0).to(tl.float32)
        rstd_M1 = tl.rsqrt(tl.sum(x * x, 1) / V + eps)[:, None]
        normed = x * rstd_M1
        if gate_MV is not None:
            factor, slope = _activated(gate, ACTIVATION)
            dgate = dout * normed * weight * slope
            tl.store(dgate_MV + at, dgate.to(dgate_MV.dtype.element_ty), mask=mask)
            dout *= factor
        sums += dout * normed
        dout *= weight
        dx = rstd_M1 * (dout - normed * (tl.sum(dout * normed, 1) / V)[:, None])
        tl.store(dx_MV + at, dx.to(dx_MV.dtype.element_ty), mask=mask)
    if sums_PV is not None:
        at_V = tl.program_id(0).to(tl.int64) * V + v
        tl.store(sums_PV + at_V, tl.sum(sums, 0), mask=v < V)
