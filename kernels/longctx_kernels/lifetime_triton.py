"""Launches of the lifetime kernels."""

import torch
import triton
from torch import Tensor

from longctx_kernels import lifetime_kernels as kernels
from longctx_kernels.launch import INTERPRETER, Options, architecture_of, launch, launch_options
from longctx_kernels.score import Gradients, Score
from longctx_kernels.sight import Sight

_NORMALISERS = {"softmax": 0, "sigmoid": 1, "relu": 2, "softplus": 3, "signed": 4}
Operands = tuple[Tensor, Tensor, Tensor]


def forward(operands: Operands, sight: Sight, score: Score, wide: bool):
    """(out [T, H, V], lse [T, H] fp32)."""
    operands = tuple(x.contiguous() for x in operands)
    q_THK, _, v_UJV = operands
    T, H, _ = q_THK.shape
    dtype = torch.float32 if wide else v_UJV.dtype
    out_THV = v_UJV.new_empty(T, H, v_UJV.shape[-1], dtype=dtype)
    lse_TH = q_THK.new_empty(T, H, dtype=torch.float32)
    options = _options("lifetime_forward_kernel", operands, sight, score)
    launch(
        kernels.lifetime_forward_kernel,
        (triton.cdiv(T, options["BLOCK_M"]), H),
        *operands,
        *_sight_arguments(sight, score),
        *_plan(sight, options),
        out_THV,
        lse_TH,
        *_sizes(operands, sight, score.scale, options),
        _listed_width(sight),
        options=options,
    )
    return out_THV, lse_TH


def backward(
    cotangents: tuple[Tensor, Tensor | None],
    operands: Operands,
    results: tuple[Tensor, Tensor],
    sight: Sight,
    score: Score,
    wide: bool,
) -> Gradients:
    """Gradients of operands and biases: two kernels after one for delta."""
    dout_THV, dlse_TH = cotangents
    operands = tuple(x.contiguous() for x in operands)
    # Products need both factors in one dtype.
    dout_THV = dout_THV.to(operands[2].dtype).contiguous()
    out_THV, lse_TH = (x.contiguous() for x in results)
    delta_TH = _delta(dout_THV, dlse_TH, out_THV, lse_TH)
    saved = (dout_THV, lse_TH, delta_TH)
    dq, dquery_bias = _query_gradients(operands, saved, sight, score, wide)
    dk, dv, dkey_bias = _key_gradients(operands, saved, sight, score, wide)
    return Gradients(dq, dk, dv, dkey_bias, dquery_bias)


def _delta(dout_THV, dlse_TH, out_THV, lse_TH) -> Tensor:
    delta_TH = torch.empty_like(lse_TH)
    V, rows = out_THV.shape[-1], lse_TH.numel()
    options = launch_options("lifetime_delta_kernel", V, out_THV.device)
    options |= {"V": V, "PADDED_V": _padded(V), "HAS_DLSE": dlse_TH is not None}
    dlse_TH = None if dlse_TH is None else dlse_TH.contiguous()
    grid = (triton.cdiv(rows, options["BLOCK_M"]),)
    arguments = (dout_THV, out_THV, dlse_TH, delta_TH, rows)
    launch(kernels.lifetime_delta_kernel, grid, *arguments, options=options)
    return delta_TH


def _query_gradients(operands, saved, sight, score, wide) -> tuple[Tensor, Tensor | None]:
    q_THK = operands[0]
    T, H, _ = q_THK.shape
    dq_THK = torch.empty_like(q_THK, dtype=torch.float32 if wide else q_THK.dtype)
    bias = score.query_bias_TH
    dbias = None if bias is None else q_THK.new_empty(T, H, dtype=torch.float32)
    options = _options("lifetime_dq_kernel", operands, sight, score)
    launch(
        kernels.lifetime_dq_kernel,
        (triton.cdiv(T, options["BLOCK_M"]), H),
        *operands,
        *saved,
        *_sight_arguments(sight, score),
        *_plan(sight, options),
        dq_THK,
        dbias,
        *_sizes(operands, sight, score.scale, options),
        _listed_width(sight),
        options=options,
    )
    return dq_THK, dbias


def _key_gradients(operands, saved, sight, score, wide) -> tuple[Tensor, Tensor, Tensor | None]:
    q_THK, k_UJK, v_UJV = operands
    U, J, _ = k_UJK.shape
    dtype = torch.float32 if wide else k_UJK.dtype
    dk_UJK, dv_UJV = (torch.empty_like(x, dtype=dtype) for x in (k_UJK, v_UJV))
    bias = score.key_bias_UH
    dbias = None if bias is None else q_THK.new_empty(U, q_THK.shape[1], dtype=torch.float32)
    options = _options("lifetime_dkdv_kernel", operands, sight, score)
    if sight.blocks is None:
        plan = sight.transposed(options["BLOCK_M"], options["BLOCK_N"]), None, None
    else:
        plan = None, *sight.lists()[2:]
    del options["SKIP"]
    *sizes, _, key_blocks = _sizes(operands, sight, score.scale, options)
    launch(
        kernels.lifetime_dkdv_kernel,
        (key_blocks, J),
        *operands,
        *saved,
        *_sight_arguments(sight, score),
        *plan,
        dk_UJK,
        dv_UJV,
        dbias,
        *sizes,
        key_blocks,
        options=options,
    )
    return dk_UJK, dv_UJV, dbias


def _options(kernel: str, operands: Operands, sight: Sight, score: Score) -> Options:
    q_THK, _, v_UJV = operands
    K, V = q_THK.shape[-1], v_UJV.shape[-1]
    is_fp32 = q_THK.dtype == torch.float32
    options = launch_options(kernel, max(K, V), q_THK.device)
    most = min(128, sight.block_size or 128)
    if is_fp32 and architecture_of(q_THK.device) != INTERPRETER:
        # Exact products are unrolled into registers, not given to tensor cores.
        most = min(most, 32 if max(K, V) <= 64 else 16)
    options |= {x: min(options[x], most) for x in ("BLOCK_M", "BLOCK_N")}
    return options | {
        "H": q_THK.shape[1],
        "J": v_UJV.shape[1],
        "K": K,
        "V": V,
        "PADDED_K": _padded(K),
        "PADDED_V": _padded(V),
        "NORM": _NORMALISERS[score.normaliser],
        "EXPIRES": sight.expiry is not None,
        "EXPIRY_BY_HEAD": sight.expires_by_head,
        "SKIP": sight.expires_by_head and sight.blocks is None,
        "KEY_BIAS": score.key_bias_UH is not None,
        "QUERY_BIAS": score.query_bias_TH is not None,
        "SLOPED": score.slope_H is not None,
        "LISTED": 0 if sight.blocks is None else sight.block_size,
        "PRECISION": "ieee" if is_fp32 else "tf32",
    }


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _sight_arguments(sight: Sight, score: Score) -> tuple[Tensor | None, ...]:
    biases = (score.key_bias_UH, score.query_bias_TH, score.slope_H)
    biases = (None if b is None else b.float().contiguous() for b in biases)
    return sight.query_positions, sight.key_positions, sight.expiry, *biases


def _plan(sight: Sight, options: Options) -> tuple[Tensor | None, ...]:
    """Ranges and block expiry, or lists and their lengths."""
    if sight.blocks is not None:
        return None, None, *sight.lists()[:2]
    ranges = sight.ranges(options["BLOCK_M"], options["BLOCK_N"])
    expiry = sight.block_expiry(options["BLOCK_N"]) if options["SKIP"] else None
    return ranges, expiry, None, None


def _sizes(operands, sight: Sight, scale: float, options: Options) -> tuple[int | float, ...]:
    T, U = len(operands[0]), len(operands[1])
    blocks = triton.cdiv(T, options["BLOCK_M"]), triton.cdiv(U, options["BLOCK_N"])
    return T, U, scale, int(sight.is_by_head), *blocks


def _listed_width(sight: Sight) -> int:
    return 0 if sight.blocks is None else sight.blocks.shape[-1]
