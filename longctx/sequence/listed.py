"""Attention of blocks of queries to blocks of their documents that were chosen for them."""

from typing import NamedTuple

import torch
from longctx_kernels.blocklist import flash_blocklist
from torch import Tensor

from longctx.sequence.block_sums import lay
from longctx.sequence.patterned import LARGEST, Operands
from longctx.sequence.plan import Plan
from longctx.sequence.selected import KeyBlocks, key_blocks, keys_in_blocks
from longctx.sequence.view import SequenceView


class QueryBlocks(NamedTuple):
    """Own tokens in blocks of their documents, M of them in rising order."""

    documents: tuple[tuple[tuple[int, int], slice], ...]
    """Row and start of each document that has own tokens, and which blocks are its."""
    numbers_M: Tensor
    """Within the document."""
    first_M: Tensor
    """Number in the batch of their document's first block."""
    tokens_N: Tensor
    """Own token at each place, -1 for none."""
    places_T1: Tensor
    """Place of each own token."""
    coordinates_N: Tensor
    key_coordinates_U: Tensor
    """Of places in blocks of keys."""


@torch.compiler.disable
def listed_blocks_attention(
    view: SequenceView, operands: Operands, blocks_ML: Tensor, block: int, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(out `[B, T, H, V]`, lse `[B, T, H]`) of own blocks of queries, each over what comes before
    its queries in the blocks of their document that it lists; -1 is none."""
    q_BTHK = operands[0]
    shape, device = q_BTHK.shape[:2], q_BTHK.device
    layout: KeyBlocks = view.plan.once(key_blocks, block, device)
    queries: QueryBlocks = view.plan.once(query_blocks, block, device)
    k_UJK, v_UJV = keys_in_blocks(view, operands, layout)
    here_ML = layout.blocks_N[(blocks_ML + queries.first_M[:, None]).clamp(min=0)]
    out, lse = flash_blocklist(
        lay(q_BTHK.flatten(0, 1), queries.tokens_N, queries.places_T1)[None],
        k_UJK[None],
        v_UJV[None],
        here_ML.masked_fill(blocks_ML < 0, -1).int()[None],
        block,
        expiry=torch.where(layout.items_U < 0, 0, LARGEST).int()[None],
        query_positions=queries.coordinates_N[None],
        key_positions=queries.key_coordinates_U[None],
        backend=backend,
    )
    places = queries.places_T1[:, 0]
    return tuple(x[0].index_select(0, places).unflatten(0, shape) for x in (out, lse))


def query_blocks(plan: Plan, block: int, device: torch.device) -> QueryBlocks:
    """Of a plan's own tokens."""
    layout: KeyBlocks = plan.once(key_blocks, block, torch.device("cpu"))
    own_T = layout.queries_M.long()
    numbers_M = (own_T // block).unique()
    places_T = torch.searchsorted(numbers_M, own_T // block) * block + own_T % block
    tokens_N = torch.full((len(numbers_M) * block,), -1)
    tokens_N[places_T] = torch.arange(len(own_T))
    first_T, inner_N = layout.first_M11[:, 0, 0], torch.arange(block)
    first_M = torch.empty_like(numbers_M)
    first_M[places_T // block] = first_T
    found = {(p.row, p.document): int(first_T[p.start]) for p in plan.pieces}
    documents = tuple(
        (document, slice(*torch.searchsorted(first_M, torch.tensor([first, first + 1])).tolist()))
        for document, first in found.items()
    )
    keys_n = (layout.blocks_N >= 0).nonzero()
    return QueryBlocks(
        documents,
        (numbers_M - first_M).to(device),
        first_M.to(device),
        tokens_N.to(device),
        places_T[:, None].to(device),
        (numbers_M[:, None] * block + inner_N).flatten().to(device, torch.int32),
        (keys_n * block + inner_N).flatten().to(device, torch.int32),
    )
