"""Which earlier blocks of its document a query sees, and attention to them.

Blocks count from the start of a document. A selection is a number that nothing is differentiated
through; scores of all blocks are laid out for some queries at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from longctx_kernels.keeping import recalled
from longctx_kernels.selected_blocks import selected_block_attention
from torch import Tensor

from longctx.sequence.block_sums import lay
from longctx.sequence.expected import Expected, Share, Sizes
from longctx.sequence.fetch import VERB, Routes, fetch, fetch_traffic
from longctx.sequence.patterned import LARGEST, Operands, block_places
from longctx.sequence.plan import Plan
from longctx.sequence.policy import Full
from longctx.sequence.view import SequenceView

TILE_ELEMENTS = 1 << 24
"""Most elements of scores that are laid out at once, unless one query has more."""
NOBODY = 2**31 - 1
"""Position of a pad, which nobody sees."""


@dataclass(frozen=True)
class Choice:
    """Blocks of so many tokens, of which a query sees so many: its own and the best before it."""

    block: int
    count: int
    keeps_edges: bool = False
    """Whether the first block and the one before the query's own come first."""


class Tile(NamedTuple):
    """Own tokens of one document that are scored at once."""

    tokens: slice
    """Of own tokens, rows laid end to end."""
    document: tuple[int, int]
    """Row and start of their document."""
    positions: Tensor
    """Within the document."""
    blocks: int
    """Blocks before the last query's own."""


Score = Callable[[Tile], Tensor]
"""Scores `[t, J, n]` of a tile's queries and the first `tile.blocks` blocks of their document."""


def highest(score_XN: Tensor, count: int) -> Tensor:
    """Numbers of the `count` highest scores above -inf, the lower of equal ones; -1 is none."""
    blocks = score_XN.shape[-1]
    most = min(count, blocks)
    if most == 0:
        return torch.full((*score_XN.shape[:-1], count), -1, device=score_XN.device)
    least_X1 = score_XN.topk(most).values[..., -1:]
    is_above, is_equal = score_XN > least_X1, score_XN == least_X1
    room_X1 = most - is_above.sum(-1, keepdim=True)
    is_best = is_above | (is_equal & (is_equal.cumsum(-1) <= room_X1))
    is_best = is_best & (score_XN > -torch.inf)
    # Whole numbers that all differ: the order does not depend on who sorts.
    falling_N = torch.arange(blocks, 0, -1, device=score_XN.device)
    found = (is_best * falling_N).topk(most).values
    return F.pad(torch.where(found > 0, blocks - found, -1), (0, count - most), value=-1)


def best(score_TJn: Tensor, own_T: Tensor, choice: Choice) -> Tensor:
    """Each query's own block and the best before it, `[..., T, J, count]`, -1 where there are
    fewer; ties go to the lower block."""
    number_n, own_T1 = torch.arange(score_TJn.shape[-1], device=own_T.device), own_T[:, None]
    if choice.keeps_edges:
        is_edge_T1n = ((number_n == 0) | (number_n == own_T1 - 1))[:, None]
        score_TJn = score_TJn.masked_fill(is_edge_T1n, torch.inf)
    score_TJn = score_TJn.masked_fill((number_n >= own_T1)[:, None], -torch.inf)
    earlier_TJl = highest(score_TJn, choice.count - 1)
    return torch.cat((own_T1[:, None].expand(*earlier_TJl.shape[:-1], 1), earlier_TJl), -1)


@torch.compiler.disable
@torch.no_grad()
def best_blocks(
    view: SequenceView, score: Score, choice: Choice, key_heads: int, cost: int
) -> Tensor:
    """`[B, T, J, count]`: numbers within the document of the blocks that own tokens see, -1 for
    none. `cost` is the number of elements that scoring a query and a block lays out.
    """
    few_MJL, tiles = view.plan.once(_tiles, choice, key_heads, cost, view.positions_BT.device)

    def chosen() -> Tensor:
        blocks_MJL = few_MJL.clone()
        for tile in tiles:
            blocks_MJL[tile.tokens] = best(score(tile), tile.positions // choice.block, choice)
        return blocks_MJL

    return recalled(chosen).unflatten(0, view.positions_BT.shape)


def _tiles(
    plan: Plan, choice: Choice, key_heads: int, cost: int, device: torch.device
) -> tuple[Tensor, tuple[Tile, ...]]:
    """What is seen wherever all earlier blocks are, and the queries that have more."""
    own_M1 = plan.positions_BT.flatten()[:, None] // choice.block
    number_L = torch.arange(choice.count - 1).expand(len(own_M1), -1)
    few_ML = torch.cat((own_M1, torch.where(number_L < own_M1, number_L, -1)), 1)
    tiles = []
    for piece in plan.pieces:
        begin = piece.position - piece.document
        end = begin + piece.stop - piece.start
        step = max(1, TILE_ELEMENTS // (cost * (1 + (end - 1) // choice.block)))
        for start in range(max(begin, choice.count * choice.block), end, step):
            positions = torch.arange(start, min(start + step, end))
            local = piece.start + start - begin
            tokens, blocks = (
                slice(local, local + len(positions)),
                int(positions[-1]) // choice.block,
            )
            document = piece.row, piece.document
            tiles.append(Tile(tokens, document, positions.to(device), blocks))
    return few_ML[:, None].expand(-1, key_heads, -1).to(device), tuple(tiles)


class KeyBlocks(NamedTuple):
    """Own and fetched tokens in blocks of their documents."""

    items_U: Tensor
    """Which item is where, -1 for none."""
    places_I1: Tensor
    births_U: Tensor
    """Coordinates of tokens, NOBODY where none is."""
    blocks_N: Tensor
    """Which of the blocks here a block of the batch is, -1 if it is elsewhere."""
    queries_M: Tensor
    """Coordinates of own tokens."""
    first_M11: Tensor
    """First block of their documents."""


@torch.compiler.disable
def selected_blocks_attention(
    view: SequenceView,
    operands: Operands,
    blocks_BTJL: Tensor,
    block: int,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(out `[B, T, H, V]`, lse `[B, T, H]`) of queries over what comes before them in the blocks of
    their documents that they list; own and earlier ones only, -1 for none."""
    q_BTHK, shape = operands[0], operands[0].shape[:2]
    layout = view.plan.once(key_blocks, block, q_BTHK.device)
    k_UJK, v_UJV = keys_in_blocks(view, operands, layout)
    blocks_MJL = blocks_BTJL.flatten(0, 1)
    here_MJL = layout.blocks_N[(blocks_MJL + layout.first_M11).clamp(min=0)]
    out, lse = selected_block_attention(
        q_BTHK.flatten(0, 1),
        k_UJK,
        v_UJV,
        here_MJL.masked_fill(blocks_MJL < 0, -1),
        block,
        query_positions_N=layout.queries_M,
        key_positions_U=layout.births_U,
        backend=backend,
    )
    return out.unflatten(0, shape), lse.unflatten(0, shape)


def selected_blocks_traffic(share: Share, sizes: Sizes) -> Expected:
    """Of the keys and values of all that comes before a rank's tokens in their documents."""
    return fetch_traffic(share, Full(), sizes.key_heads * (sizes.key_dim + sizes.value_dim))


def keys_in_blocks(
    view: SequenceView, operands: Operands, layout: KeyBlocks
) -> tuple[Tensor, Tensor]:
    """Keys and values of own tokens and of those before them in their documents."""
    _, k_BTJK, v_BTJV = operands
    routes = view.plan.once(Routes, Full())
    pairs_MJD = torch.cat((k_BTJK, v_BTJV), -1).flatten(0, 1)
    pairs_IJD = fetch(pairs_MJD, routes, view.wire(VERB))
    pairs_UJD = lay(pairs_IJD, layout.items_U, layout.places_I1)
    return pairs_UJD.split((k_BTJK.shape[-1], v_BTJV.shape[-1]), -1)


def key_blocks(plan: Plan, block: int, device: torch.device) -> KeyBlocks:
    """For the items that `Full` fetches."""
    _, row, position = plan.once(Routes, Full()).places
    coordinates = block_places(plan, block, row, position)
    numbers = (coordinates // block).unique()
    places = torch.searchsorted(numbers, coordinates // block) * block + coordinates % block
    items_U = torch.full((len(numbers) * block,), -1)
    births_U = torch.full_like(items_U, NOBODY)
    items_U[places], births_U[places] = torch.arange(len(places)), coordinates
    blocks_N = torch.full((int(numbers[-1]) + 1,), -1)
    blocks_N[numbers] = torch.arange(len(numbers))
    queries_M = coordinates[: plan.rows * plan.length]
    first_M = (queries_M - plan.positions_BT.flatten()) // block
    return KeyBlocks(
        items_U.to(device),
        places[:, None].to(device),
        births_U.to(device, torch.int32),
        blocks_N.to(device),
        queries_M.to(device, torch.int32),
        first_M[:, None, None].to(device),
    )


def selected_after(
    operands: Operands, blocks_BTJL: Tensor, block: int, backend: str = "auto"
) -> Tensor:
    """Out `[B, T, H, V]` of the last T of the U tokens that rows of keys and values have."""
    q_BTHK, k_BUJK, v_BUJV = operands
    (rows, tokens), length = q_BTHK.shape[:2], k_BUJK.shape[1]
    padded = -(-length // block) * block
    if rows * padded > LARGEST:
        raise ValueError("more positions in a batch than int32 holds: use fewer rows")
    k_UJK, v_UJV = (
        F.pad(x, (0, 0, 0, 0, 0, padded - length)).flatten(0, 1) for x in (k_BUJK, v_BUJV)
    )
    births_U = torch.arange(padded, device=q_BTHK.device)
    births_U = births_U.masked_fill(births_U >= length, NOBODY).repeat(rows)
    first_B = torch.arange(rows, device=q_BTHK.device) * (padded // block)
    numbers = torch.where(blocks_BTJL < 0, -1, blocks_BTJL + first_B.view(-1, 1, 1, 1))
    out, _ = selected_block_attention(
        q_BTHK.flatten(0, 1),
        k_UJK,
        v_UJV,
        numbers.flatten(0, 1),
        block,
        query_positions_N=torch.arange(length - tokens, length, device=q_BTHK.device).repeat(rows),
        key_positions_U=births_U,
        backend=backend,
    )
    return out.unflatten(0, (rows, tokens))
