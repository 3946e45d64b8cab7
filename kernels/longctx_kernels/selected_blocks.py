"""Attention of single queries to key blocks that each lists for itself, as NSA and MoBA select.

Keys lie in blocks of `block_size`. Query n sees, in key head j, key u iff its block is in
`blocks[n, j]` and `key_positions[u] <= query_positions[n]`; what it gets depends on those alone.
"""

from types import ModuleType

import torch
from torch import Tensor

from longctx_kernels import selected_blocks_torch
from longctx_kernels.keeping import recalled
from longctx_kernels.launch import backend_of
from longctx_kernels.score import wide_dtype
from longctx_kernels.selected_blocks_lists import Selection, listed_once

LARGEST_HEAD = 256
TRITON_BLOCKS = (16, 32, 64, 128)


def selected_block_attention(
    q_NHK: Tensor,
    k_UJK: Tensor,
    v_UJV: Tensor,
    blocks_NJL: Tensor,
    block_size: int,
    *,
    query_positions_N: Tensor,
    key_positions_U: Tensor,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(out [N, H, V], lse [N, H]), the natural log-sum-exp; 0 and -inf where nothing is seen.

    H is a multiple of J and U one of `block_size`. Blocks are listed in any order, -1 is none, and
    one that is listed twice counts once. Keys at position 2^31 - 1 are pads: queries stand below.
    "auto" computes in torch where Triton cannot: other blocks than 16, 32, 64 and 128, wide heads.
    """
    operands = (q_NHK, k_UJK, v_UJV)
    _check_operands(*operands)
    _check_lists(operands, blocks_NJL, block_size)
    _check_positions("query_positions", query_positions_N, len(q_NHK))
    _check_positions("key_positions", key_positions_U, len(k_UJK))
    if backend == "fla":
        raise ValueError("backend 'fla' takes no lists: choose auto, torch or triton")
    scale = q_NHK.shape[-1] ** -0.5 if scale is None else scale
    blocks_NJL = listed_once(blocks_NJL, len(k_UJK) // block_size)
    positions = (x.to(torch.int32).contiguous() for x in (query_positions_N, key_positions_U))
    return _forward_op(*operands, blocks_NJL, *positions, block_size, scale, backend)


def selected_block_reference(
    q_NHK: Tensor,
    k_UJK: Tensor,
    v_UJV: Tensor,
    blocks_NJL: Tensor,
    block_size: int,
    *,
    query_positions_N: Tensor,
    key_positions_U: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, one head of one query at a time; differentiable by autograd."""
    (N, H, K), J = q_NHK.shape, k_UJK.shape[1]
    scale = K**-0.5 if scale is None else scale
    q_NHK, k_UJK, v_UJV = (x.to(wide_dtype(x)) for x in (q_NHK, k_UJK, v_UJV))
    listed, born = blocks_NJL.tolist(), key_positions_U.tolist()
    outs, sums = [], []
    for n, position in enumerate(query_positions_N.tolist()):
        for h in range(H):
            j = h // (H // J)
            blocks = [block for block in set(listed[n][j]) if block >= 0]
            keys = [u for b in blocks for u in range(b * block_size, (b + 1) * block_size)]
            seen = torch.tensor([u for u in keys if born[u] <= position], dtype=torch.int64)
            scores_u = k_UJK[seen, j] @ q_NHK[n, h] * scale
            lse = scores_u.logsumexp(0) if len(seen) else scores_u.new_tensor(-torch.inf)
            outs.append((scores_u - lse).exp() @ v_UJV[seen, j])
            sums.append(lse)
    return torch.stack(outs).view(N, H, -1), torch.stack(sums).view(N, H)


def _check_operands(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not (q.dim() == k.dim() == v.dim() == 3):
        raise ValueError("q, k and v must be [tokens, heads, size]")
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k {tuple(k.shape)} must have the head size of q {tuple(q.shape)}")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"v {tuple(v.shape)} must have the tokens and heads of k {tuple(k.shape)}")
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        raise ValueError("q, k and v must have at least one token, head and channel")
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} heads, which k's {k.shape[1]} must divide: repeat or drop heads"
        )
    if not (q.dtype == k.dtype == v.dtype and q.dtype.is_floating_point):
        raise ValueError(
            f"q, k and v must be of one float dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
        )


def _check_lists(operands: tuple[Tensor, Tensor, Tensor], blocks: Tensor, block_size: int) -> None:
    q, k, _ = operands
    if block_size < 1 or len(k) % block_size:
        raise ValueError(
            f"block_size {block_size} must divide the {len(k)} keys: "
            "pad them with keys at position 2^31 - 1"
        )
    expected = (len(q), k.shape[1])
    if blocks.dim() != 3 or tuple(blocks.shape[:2]) != expected or 0 in blocks.shape:
        raise ValueError(
            f"blocks must be [{expected[0]}, {expected[1]}, at least 1], got {tuple(blocks.shape)}"
        )
    if blocks.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"blocks must be int32 or int64, got {blocks.dtype}")


def _check_positions(name: str, positions: Tensor, count: int) -> None:
    if tuple(positions.shape) != (count,) or positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name} must be integers [{count}], got {positions.dtype} {tuple(positions.shape)}"
        )


def _path(q: Tensor, sizes: tuple[int, int, int], backend: str) -> ModuleType:
    """The module that computes, given the block size and the sizes of keys and values."""
    block_size, *heads = sizes
    is_fit = block_size in TRITON_BLOCKS and max(heads) <= LARGEST_HEAD
    if backend_of(q, backend) != "triton" or (backend == "auto" and not is_fit):
        return selected_blocks_torch
    if not is_fit:
        raise ValueError(
            f"backend 'triton' needs block_size {', '.join(map(str, TRITON_BLOCKS))} and heads of "
            f"at most {LARGEST_HEAD}, got {block_size} and {max(heads)}: choose 'torch'"
        )
    from longctx_kernels import selected_blocks_triton

    return selected_blocks_triton


@torch.library.custom_op("longctx::selected_blocks_forward", mutates_args=())
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, query_positions: Tensor, key_positions: Tensor,
    block_size: int, scale: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    path = _path(q, (block_size, k.shape[-1], v.shape[-1]), backend)
    selection = Selection(blocks, query_positions, key_positions, block_size)
    return recalled(lambda: path.forward((q, k, v), selection, scale))


@_forward_op.register_fake
def _(q, _k, v, *_others):
    shape = q.shape[:2]
    return v.new_empty(*shape, v.shape[-1]), q.new_empty(shape, dtype=wide_dtype(q))


@torch.library.custom_op("longctx::selected_blocks_backward", mutates_args=())
def _backward_op(
    dout: Tensor, dlse: Tensor, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, query_positions: Tensor, key_positions: Tensor,
    block_size: int, scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    path = _path(q, (block_size, k.shape[-1], v.shape[-1]), backend)
    selection = Selection(blocks, query_positions, key_positions, block_size)
    return path.backward((dout, dlse), (q, k, v), (out, lse), selection, scale)


@_backward_op.register_fake
def _(_dout, _dlse, _out, _lse, q, k, v, *_others):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.constants = inputs[6:]


def _differentiate(ctx, dout, dlse):
    *inputs, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    return *_backward_op(dout, dlse, out, lse, *inputs, *ctx.constants), *(None,) * 6


_forward_op.register_autograd(_differentiate, setup_context=_save)
