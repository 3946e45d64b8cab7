"""Launches of the kernels of attention to listed key blocks."""

import torch
import triton
from torch import Tensor

from longctx_kernels import selected_blocks_kernels as kernels
from longctx_kernels.launch import INTERPRETER, Options, architecture_of, launch, launch_options
from longctx_kernels.lifetime_triton import _delta, _padded
from longctx_kernels.selected_blocks_lists import Selection, shared_out

MOST_PARTS = 1024
"""Each holds the gradients of one block in fp32; also, no program sums over a larger share."""

SMALLEST_CHUNK = 256
"""Queries of a part that is worth a program."""

Operands = tuple[Tensor, Tensor, Tensor]


def forward(operands: Operands, selection: Selection, scale: float) -> tuple[Tensor, Tensor]:
    """(out [N, H, V], lse [N, H] fp32)."""
    operands = tuple(x.contiguous() for x in operands)
    q_NHK, _, v_UJV = operands
    N, H, _ = q_NHK.shape
    out_NHV = v_UJV.new_empty(N, H, v_UJV.shape[-1])
    lse_NH = q_NHK.new_empty(N, H, dtype=torch.float32)
    options = _options("selected_forward_kernel", operands, selection)
    launch(
        kernels.selected_forward_kernel,
        _grid_of_queries(options, N),
        *operands,
        *_lists(selection),
        out_NHV,
        lse_NH,
        scale,
        selection.blocks_NJL.shape[-1],
        options=options,
    )
    return out_NHV, lse_NH


def backward(
    cotangents: tuple[Tensor, Tensor],
    operands: Operands,
    results: tuple[Tensor, Tensor],
    selection: Selection,
    scale: float,
) -> Operands:
    """Gradients of the operands, given (dout, dlse) and (out, lse)."""
    operands = tuple(x.contiguous() for x in operands)
    dout_NHV, out_NHV, lse_NH = (x.contiguous() for x in (cotangents[0], *results))
    # Products need both factors in one dtype.
    dout_NHV = dout_NHV.to(operands[2].dtype)
    saved = (dout_NHV, lse_NH, _delta(dout_NHV, cotangents[1], out_NHV, lse_NH))
    dq_NHK = torch.empty_like(operands[0])
    options = _options("selected_dq_kernel", operands, selection)
    launch(
        kernels.selected_dq_kernel,
        _grid_of_queries(options, len(dq_NHK)),
        *operands,
        *saved,
        *_lists(selection),
        dq_NHK,
        scale,
        selection.blocks_NJL.shape[-1],
        options=options,
    )
    return dq_NHK, *_key_gradients(operands, saved, selection, scale)


def _key_gradients(
    operands: Operands, saved: Operands, selection: Selection, scale: float
) -> tuple[Tensor, Tensor]:
    _, k_UJK, v_UJV = operands
    options = _options("selected_dkdv_kernel", operands, selection)
    N, J, L = selection.blocks_NJL.shape
    chunk = max(SMALLEST_CHUNK, triton.cdiv(N * J * L, MOST_PARTS))
    parts = max(1, N * J * L // chunk)
    offsets, queries = selection.by_block()
    owners, firsts = shared_out(offsets, chunk, parts)
    positions = selection.query_positions_N, selection.key_positions_U
    inputs = *operands, *saved, offsets, queries, *positions
    numbers = scale, selection.key_blocks, chunk
    size, tile = selection.block_size, options["BLOCK_N"]
    sums = tuple(x.new_empty(parts, size, x.shape[-1], dtype=torch.float32) for x in (k_UJK, v_UJV))
    dk_UJK, dv_UJV = torch.empty_like(k_UJK), torch.empty_like(v_UJV)
    launch(
        kernels.selected_parts_kernel,
        (parts, size // tile),
        *inputs,
        owners,
        firsts,
        *sums,
        *numbers,
        options=options,
    )
    launch(
        kernels.selected_dkdv_kernel,
        (len(k_UJK) // tile, J),
        *inputs,
        firsts,
        *sums,
        dk_UJK,
        dv_UJV,
        *numbers,
        options=options,
    )
    return dk_UJK, dv_UJV


def _lists(selection: Selection) -> tuple[Tensor, ...]:
    positions = selection.query_positions_N, selection.key_positions_U
    return selection.blocks_NJL, selection.counts(), *positions


def _options(kernel: str, operands: Operands, selection: Selection) -> Options:
    (_, H, K), (_, J, V) = operands[0].shape, operands[2].shape
    is_fp32 = operands[0].dtype == torch.float32
    options = launch_options(kernel, max(K, V), operands[0].device)
    most = selection.block_size
    if is_fp32 and architecture_of(operands[0].device) != INTERPRETER:
        # Exact products are unrolled into registers, not given to tensor cores.
        most = min(most, 32 if max(K, V) <= 64 else 16)
        options["BLOCK_M"] = min(options["BLOCK_M"], most)
    options["BLOCK_N"] = min(options["BLOCK_N"], most)
    if kernel != "selected_dkdv_kernel":
        options["BLOCK_M"] = min(options["BLOCK_M"], _padded(H // J))
    return options | {
        "H": H,
        "J": J,
        "K": K,
        "V": V,
        "PADDED_K": _padded(K),
        "PADDED_V": _padded(V),
        "LISTED": selection.block_size,
        "PRECISION": "ieee" if is_fp32 else "tf32",
    }


def _grid_of_queries(options: Options, queries: int) -> tuple[int, int, int]:
    return queries, options["J"], triton.cdiv(options["H"] // options["J"], options["BLOCK_M"])
