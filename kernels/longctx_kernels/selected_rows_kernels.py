"""Selected rows in Triton: each row is read once and written once, without atomics.

Summed over heads, a token asks a table which slot each head has for it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from longctx_kernels.launch import Options, launch, launch_options


def gather(x_BTD: Tensor, index_BHE: Tensor) -> Tensor:
    """Rows `[B, H, E, D]`."""
    return _gathered(x_BTD, index_BHE, None, None)[0]


def scatter_backward(dout_BTD, rows_BHED, index_BHE, weight_BHE) -> tuple[Tensor, Tensor | None]:
    """Gradients of rows and of the weight (fp32, or None)."""
    rows_BHED = None if weight_BHE is None else rows_BHED
    return _gathered(dout_BTD, index_BHE, rows_BHED, weight_BHE)


def _gathered(x_BTD, index_BHE, rows_BHED, weight_BHE) -> tuple[Tensor, Tensor | None]:
    """Rows times the weight, and products of `rows` with them before, both if there is a weight."""
    (_, T, D), (B, H, E) = x_BTD.shape, index_BHE.shape
    x_BTD, index_BHE = x_BTD.contiguous(), index_BHE.to(torch.int32).contiguous()
    out_BHED, products_BHE = x_BTD.new_empty(B, H, E, D), None
    if weight_BHE is not None:
        rows_BHED, weight_BHE = rows_BHED.contiguous(), weight_BHE.contiguous()
        products_BHE = torch.empty(B, H, E, dtype=torch.float32, device=x_BTD.device)
    options = _options("gather_rows_kernel", x_BTD)
    arguments = x_BTD, index_BHE, rows_BHED, weight_BHE, out_BHED, products_BHE, T, H * E
    launch(gather_rows_kernel, (H * E, B), *arguments, options=options)
    return out_BHED, products_BHE


def scatter(rows_BHED: Tensor, index_BHE: Tensor, weight_BHE: Tensor | None, length: int) -> Tensor:
    """Weighted rows summed over heads, `[B, length, D]`."""
    B, H, E, D = rows_BHED.shape
    rows_BHED = rows_BHED.contiguous()
    weight_BHE = None if weight_BHE is None else weight_BHE.contiguous()
    slots_BTH = _slots(index_BHE, length)
    out_BTD = rows_BHED.new_empty(B, length, D)
    options = _options("scatter_rows_kernel", rows_BHED) | {"H": H}
    grid = (length * cdiv(D, options["BLOCK_D"]), B)
    arguments = rows_BHED, slots_BTH, weight_BHE, out_BTD, length, E
    launch(scatter_rows_kernel, grid, *arguments, options=options)
    return out_BTD


def _slots(index_BHE: Tensor, length: int) -> Tensor:
    """The slot that each head has for each token, or -1; tokens end with one for empty slots."""
    B, H, E = index_BHE.shape
    slots_BHT = torch.full((B, H, length + 1), -1, dtype=torch.int32, device=index_BHE.device)
    index_BHE = torch.where(index_BHE < 0, length, index_BHE).to(torch.int64)
    slot_E = torch.arange(E, dtype=torch.int32, device=index_BHE.device)
    slots_BHT.scatter_(2, index_BHE, slot_E.expand(B, H, E))
    return slots_BHT[:, :, :length].transpose(1, 2).contiguous()


def _options(kernel: str, x: Tensor) -> Options:
    """Options from the table, which knows one size."""
    options, D = launch_options(kernel, 1, x.device), x.shape[-1]
    options["BLOCK_D"] = min(options["BLOCK_D"], max(16, next_power_of_2(D)))
    return options | {"D": D}


@triton.jit(do_not_specialize=["T", "M"])
def gather_rows_kernel(
    x_BTD,
    index_BM,
    rows_BMD,
    weight_BM,
    out_BMD,
    products_BM,
    T,
    M,
    BLOCK_D: tl.constexpr,
    D: tl.constexpr,
):
    """One row; if there is a weight it is multiplied, and the product with another row is kept."""
    b = tl.program_id(1).to(tl.int64)
    m = b * M + tl.program_id(0)
    t = tl.load(index_BM + m)
    row = (b * T + t) * D
    product_D = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        x_D = tl.load(x_BTD + row + d, mask=(d < D) & (t >= 0), other=0.0)
        if weight_BM is not None:
            x_D = x_D.to(tl.float32)
            product_D += x_D * tl.load(rows_BMD + m * D + d, mask=d < D, other=0.0).to(tl.float32)
            x_D *= tl.load(weight_BM + m).to(tl.float32)
        tl.store(out_BMD + m * D + d, x_D.to(out_BMD.dtype.element_ty), mask=d < D)
    if weight_BM is not None:
        tl.store(products_BM + m, tl.sum(product_D, 0))


@triton.jit(do_not_specialize=["T", "E"])
def scatter_rows_kernel(
    rows_BHED,
    slots_BTH,
    weight_BHE,
    out_BTD,
    T,
    E,
    BLOCK_D: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
):
    """BLOCK_D values of a token, summed over the heads that selected it."""
    parts: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    b = tl.program_id(1).to(tl.int64)
    t = b * T + tl.program_id(0) // parts
    d = (tl.program_id(0) % parts) * BLOCK_D + tl.arange(0, BLOCK_D)
    sum_D = tl.zeros([BLOCK_D], tl.float32)
    for h in range(H):
        e = tl.load(slots_BTH + t * H + h)
        if e >= 0:
            m = (b * H + h) * E + e
            row_D = tl.load(rows_BHED + m * D + d, mask=d < D, other=0.0).to(tl.float32)
            if weight_BHE is not None:
                row_D *= tl.load(weight_BHE + m).to(tl.float32)
            sum_D += row_D
    tl.store(out_BTD + t * D + d, sum_D.to(out_BTD.dtype.element_ty), mask=d < D)
