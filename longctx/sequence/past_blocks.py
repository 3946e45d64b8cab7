"""Attention to whole earlier blocks of a document, each of which is one key."""

import torch
import torch.nn.functional as F
from longctx_kernels.lifetime_attention import flash_lifetime
from torch import Tensor

from longctx.sequence.block_sums import Blocks
from longctx.sequence.patterned import LARGEST, document_bounds
from longctx.sequence.plan import Plan
from longctx.sequence.view import SequenceView


@torch.compiler.disable
def past_blocks_attention(
    view: SequenceView,
    operands: tuple[Tensor, Tensor, Tensor],
    block: int,
    stride: int = 0,
    delay: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(out `[B, T, H, V]`, lse `[B, T, H]`) of own queries over keys and values `[U, J, ...]` of
    all blocks, each seen from `delay` tokens after its last one on."""
    q_BTHK, k_UJK, v_UJV = operands
    sight = view.plan.once(_sight, block, stride or block, delay, q_BTHK.device)
    return _attend((q_BTHK, k_UJK, v_UJV), sight, backend)


def past_blocks_after(
    operands: tuple[Tensor, Tensor, Tensor], last_m: Tensor, total: int, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The same of the last of `total` tokens that rows have, over `[B, m, J, ...]` of their own;
    `last_m` are the positions from which these are seen."""
    q_BTHK, k_BmJK, v_BmJV = operands
    rows, tokens = q_BTHK.shape[:2]
    if rows * total > LARGEST:
        raise ValueError("more positions in a batch than int32 holds: use fewer rows")
    first_B1 = torch.arange(rows, device=last_m.device)[:, None] * total
    births_Bm = first_B1 + last_m
    expiry_Bm = (first_B1 + total).expand_as(births_Bm)
    queries_BT = first_B1 + torch.arange(total - tokens, total, device=last_m.device)
    sight = births_Bm.flatten(), expiry_Bm.flatten(), queries_BT.flatten()
    return _attend((q_BTHK, k_BmJK.flatten(0, 1), v_BmJV.flatten(0, 1)), sight, backend)


def _attend(
    operands: tuple[Tensor, Tensor, Tensor], sight: tuple[Tensor, Tensor, Tensor], backend: str
) -> tuple[Tensor, Tensor]:
    """Given when keys appear and vanish, and when queries look."""
    q_BTHK, k_UJK, v_UJV = operands
    births_U, expiry_U, queries_M = sight
    if not len(k_UJK):
        # One key that nobody sees, so that what made none has a gradient all the same.
        k_UJK, v_UJV = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k_UJK, v_UJV))
        births_U = expiry_U = queries_M.new_full((1,), LARGEST)
    out, lse = flash_lifetime(
        q_BTHK.flatten(0, 1)[None],
        k_UJK[None],
        v_UJV[None],
        expiry=expiry_U[None],
        query_positions=queries_M[None],
        key_positions=births_U[None],
        backend=backend,
    )
    shape = q_BTHK.shape[:2]
    return out[0].unflatten(0, shape), lse[0].unflatten(0, shape)


def _sight(
    plan: Plan, block: int, stride: int, delay: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Of all blocks and own queries."""
    length = plan.placement.length
    if plan.rows * length + delay > LARGEST:
        raise ValueError("more positions in a batch than int32 holds: use fewer rows")
    last_U = plan.once(Blocks, block, stride).last_tokens
    _, stop_U = document_bounds(plan, last_U // length, last_U % length)
    births_U, expiry_U = last_U + delay, last_U // length * length + stop_U
    queries_M = (plan.token_ids_BT + torch.arange(plan.rows)[:, None] * length).flatten()
    parts = births_U, expiry_U, queries_M
    return tuple(x.to(device, torch.int32) for x in parts)  # type: ignore[return-value]
