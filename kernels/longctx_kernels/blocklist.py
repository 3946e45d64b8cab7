"""Attention of blocks of queries to listed blocks of keys: routed, strided or other patterns."""

import torch
from torch import Tensor

from longctx_kernels.launch import backend_of
from longctx_kernels.lifetime_attention import attend, sight_of

TRITON_SIZES = (16, 32, 64, 128)
"""Block sizes of Triton's kernels; in torch operations all are possible."""


def flash_blocklist(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    block_size: int,
    expiry: Tensor | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    key_bias: Tensor | None = None,
    query_bias: Tensor | None = None,
    slope: Tensor | None = None,
    normaliser: str = "softmax",
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`flash_lifetime` within listed blocks; rows of a batch are numbered through.

    `blocks` [1 or J, ceil(B * T / block_size), L] int32 holds the key blocks of each query block,
    in any order, by key head if it has J rows; -1 is no block, and a block counts once. Where torch
    computes, blocks may have any size.
    """
    _check_size(q, block_size, backend)
    _check_blocks(q, k, blocks, block_size)
    lifetimes = expiry, query_positions, key_positions
    sight = sight_of((q, k, v), lifetimes, blocks.to(torch.int32), block_size)
    return attend((q, k, v), sight, (key_bias, query_bias, slope), normaliser, scale, backend)


def _check_size(q: Tensor, block_size: int, backend: str) -> None:
    if block_size < 1:
        raise ValueError(f"block_size {block_size}: must be at least 1")
    if block_size in TRITON_SIZES or backend == "fla":
        return
    if backend_of(q, backend) == "triton":
        raise ValueError(
            f"block_size {block_size}: Triton's kernels take 16, 32, 64 or 128; choose one of "
            "them, or backend 'torch'"
        )


def _check_blocks(q: Tensor, k: Tensor, blocks: Tensor, block_size: int) -> None:
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError("q, k and v must be [batch, tokens, heads, size]")
    query_blocks = -(-q.shape[0] * q.shape[1] // block_size)
    rows = (1, k.shape[2])
    if blocks.dim() != 3 or blocks.shape[0] not in rows or blocks.shape[1] != query_blocks:
        raise ValueError(
            f"blocks must be [1 or {k.shape[2]}, {query_blocks}, any], got {tuple(blocks.shape)}"
        )
    if blocks.shape[2] == 0 or blocks.is_floating_point():
        raise ValueError("blocks must hold integers, and at least one entry (-1: no block) a row")
