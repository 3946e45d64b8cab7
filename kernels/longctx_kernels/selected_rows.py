"""Rows that heads select: taken out of a sequence, and weighted, summed over heads and put back.

`index_BHE` holds token numbers, -1 for an empty slot; a head selects a token at most once. Each is
the other's gradient. Sums over heads have a fixed order, so results do not vary between runs.
"""

import torch
from torch import Tensor

from longctx_kernels.launch import backend_of


def gather_rows(x_BTD: Tensor, index_BHE: Tensor, *, backend: str = "auto") -> Tensor:
    """The selected rows `[B, H, E, D]`, zeros for empty slots."""
    if x_BTD.ndim != 3 or 0 in x_BTD.shape or not x_BTD.dtype.is_floating_point:
        got = f"{x_BTD.dtype} {tuple(x_BTD.shape)}"
        raise ValueError(f"x must be floats [B, T, D] and hold at least one token, got {got}")
    _check(index_BHE, x_BTD.shape[:1], x_BTD, backend)
    return torch.ops.longctx.gather_rows(x_BTD, index_BHE, backend)


def scatter_rows(
    rows_BHED: Tensor,
    index_BHE: Tensor,
    length: int,
    weight_BHE: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """`y[b, t] = sum of weight[b, h, e] rows[b, h, e]` over the slots of token t, `[B, length, D]`.

    Gradients reach rows and weight.
    """
    if rows_BHED.ndim != 4 or 0 in rows_BHED.shape or not rows_BHED.dtype.is_floating_point:
        got = f"{rows_BHED.dtype} {tuple(rows_BHED.shape)}"
        raise ValueError(f"rows must be floats [B, H, E, D] and hold at least one row, got {got}")
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    shape = rows_BHED.shape[:3]
    _check(index_BHE, shape, rows_BHED, backend)
    if weight_BHE is not None and (weight_BHE.shape != shape or weight_BHE.dtype.is_complex):
        raise ValueError(f"weight must be {tuple(shape)}, got {tuple(weight_BHE.shape)}")
    return torch.ops.longctx.scatter_rows(rows_BHED, index_BHE, weight_BHE, length, backend)


def _check(index: Tensor, shape: torch.Size, rows: Tensor, backend: str) -> None:
    if index.ndim != 3 or index.shape[: len(shape)] != shape or 0 in index.shape:
        expected = f"[B, H, E] and start with {tuple(shape)}"
        raise ValueError(f"index must be {expected}, got {tuple(index.shape)}")
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"index must be int32 or int64, got {index.dtype}")
    if index.device != rows.device:
        raise ValueError(f"index must be on {rows.device} as the rows are, got {index.device}")
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend {backend!r}: expected auto, torch or triton")


def _flat(index_BHE: Tensor, length: int) -> Tensor:
    """Numbers of the rows with the batch laid end to end; an empty slot's is one past the last."""
    rows_B = torch.arange(len(index_BHE), device=index_BHE.device)[:, None, None] * length
    return torch.where(index_BHE < 0, len(index_BHE) * length, index_BHE + rows_B)


def _torch_gather(x_BTD: Tensor, index_BHE: Tensor) -> Tensor:
    number = _flat(index_BHE, x_BTD.shape[1]).clamp_(max=x_BTD.shape[:2].numel() - 1)
    rows_MD = x_BTD.flatten(0, 1).index_select(0, number.flatten())
    return rows_MD.view(*number.shape, -1).masked_fill_((index_BHE < 0)[..., None], 0.0)


def _torch_scatter(rows_BHED: Tensor, index_BHE: Tensor, weight_BHE, length: int) -> Tensor:
    B, H, _, D = rows_BHED.shape
    dtype = torch.promote_types(rows_BHED.dtype, torch.float32)
    number = _flat(index_BHE, length)
    # A head's rows are all different: nothing depends on the order in which they are added.
    out = torch.zeros(B * length + 1, D, dtype=dtype, device=rows_BHED.device)
    for h in range(H):
        rows_BED = rows_BHED[:, h].to(dtype)
        if weight_BHE is not None:
            rows_BED = rows_BED * weight_BHE[:, h, :, None].to(dtype)
        out.index_add_(0, number[:, h].flatten(), rows_BED.flatten(0, 1))
    return out[:-1].to(rows_BHED.dtype, copy=True).view(B, length, D)


def _torch_scatter_backward(dout_BTD, rows_BHED, index_BHE, weight_BHE):
    """Gradients of rows and of the weight (or None)."""
    dtype = torch.promote_types(rows_BHED.dtype, torch.float32)
    drows = _torch_gather(dout_BTD.to(dtype), index_BHE)
    if weight_BHE is None:
        return drows, None
    dweight = (drows * rows_BHED.to(dtype)).sum(-1)
    return drows.mul_(weight_BHE[..., None].to(dtype)), dweight


def _passes(x: Tensor, backend: str):
    """Gather, scatter and the backward pass of scatter, by a backend."""
    if backend_of(x, backend) == "torch":
        return _torch_gather, _torch_scatter, _torch_scatter_backward
    from longctx_kernels import selected_rows_kernels as kernels

    return kernels.gather, kernels.scatter, kernels.scatter_backward


@torch.library.custom_op("longctx::gather_rows", mutates_args=())
def _gather(x: Tensor, index: Tensor, backend: str) -> Tensor:
    return _passes(x, backend)[0](x, index)


@_gather.register_fake
def _(x, index, backend):  # noqa: ARG001
    return x.new_empty(*index.shape, x.shape[2])


def _keep_gather(ctx, inputs, output) -> None:  # noqa: ARG001
    x, index, ctx.backend = inputs
    ctx.length = x.shape[1]
    ctx.save_for_backward(index)


def _differentiate_gather(ctx, dout):
    (index,) = ctx.saved_tensors
    return torch.ops.longctx.scatter_rows(dout, index, None, ctx.length, ctx.backend), None, None


_gather.register_autograd(_differentiate_gather, setup_context=_keep_gather)


@torch.library.custom_op("longctx::scatter_rows", mutates_args=())
def _scatter(
    rows: Tensor, index: Tensor, weight: Tensor | None, length: int, backend: str
) -> Tensor:
    return _passes(rows, backend)[1](rows, index, weight, length)


@_scatter.register_fake
def _(rows, index, weight, length, backend):  # noqa: ARG001
    return rows.new_empty(rows.shape[0], length, rows.shape[3])


@torch.library.custom_op("longctx::scatter_rows_backward", mutates_args=())
def _scatter_backward(
    dout: Tensor, rows: Tensor, index: Tensor, weight: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    drows, dweight = _passes(rows, backend)[2](dout, rows, index, weight)
    dweight = rows.new_zeros(0) if weight is None else dweight.to(weight.dtype)
    return drows.to(rows.dtype), dweight


@_scatter_backward.register_fake
def _(dout, rows, index, weight, backend):  # noqa: ARG001
    dweight = rows.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    return rows.new_empty(rows.shape), dweight


def _keep_scatter(ctx, inputs, output) -> None:  # noqa: ARG001
    *tensors, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_scatter(ctx, dout):
    # Checkpointing lets them be read once.
    saved = ctx.saved_tensors
    drows, dweight = torch.ops.longctx.scatter_rows_backward(dout, *saved, ctx.backend)
    return drows, None, None if saved[2] is None else dweight, None, None


_scatter.register_autograd(_differentiate_scatter, setup_context=_keep_scatter)
