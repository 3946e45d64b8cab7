"""Selections of earlier blocks: the best, ties to the lower, whatever is scored at once."""

import pytest
import torch
from torch import Tensor

from longctx.sequence import selected
from longctx.sequence.local import LocalView
from longctx.sequence.selected import Choice, Tile, best, best_blocks, highest

LENGTH = 45
DOCUMENTS = ((0, 3, 20), (0, 44))


def ranked(scores: list[float], count: int) -> set[int]:
    order = sorted(range(len(scores)), key=lambda n: (-scores[n], n))
    return {n for n in order[:count] if scores[n] > -torch.inf}


@pytest.mark.parametrize("count", [0, 1, 3, 9, 12])
def test_the_highest_are_distinct_and_ties_go_to_the_lower(count):
    generator = torch.Generator().manual_seed(count)
    scores = torch.randint(0, 4, (50, 2, 9), generator=generator).float()
    scores[scores == 0] = -torch.inf
    found = highest(scores, count)
    assert found.shape == (50, 2, count)
    for row, numbers in zip(scores.flatten(0, 1).tolist(), found.flatten(0, 1).tolist()):
        listed = [n for n in numbers if n >= 0]
        assert len(listed) == len(set(listed))
        assert set(listed) == ranked(row, count)


@pytest.mark.parametrize("keeps_edges", [False, True])
def test_a_query_has_its_own_block_and_the_edges_if_they_are_kept(keeps_edges):
    generator = torch.Generator().manual_seed(1)
    own_T = torch.arange(12)
    scores = torch.rand(12, 2, 11, generator=generator)
    found = best(scores, own_T, Choice(4, 5, keeps_edges))
    for own, by_head, rows in zip(own_T.tolist(), scores, found):
        for score, numbers in zip(by_head, rows):
            chosen = {n for n in numbers.tolist() if n >= 0}
            edges = {n for n in (0, own - 1) if 0 <= n < own} if keeps_edges else set()
            others = [-torch.inf if n in edges else x for n, x in enumerate(score[:own].tolist())]
            assert chosen == {own} | edges | ranked(others, 4 - len(edges))


@pytest.mark.parametrize("elements", [1, 40, 1 << 24])
@pytest.mark.parametrize("count", [2, 3])
def test_what_is_scored_at_once_does_not_matter(monkeypatch, elements, count):
    monkeypatch.setattr(selected, "TILE_ELEMENTS", elements)
    view, block = LocalView(DOCUMENTS, LENGTH), 4
    generator = torch.Generator().manual_seed(2)
    scores = torch.rand(len(DOCUMENTS) * LENGTH, 1, LENGTH // block, generator=generator)
    sizes = []

    def score(tile: Tile) -> Tensor:
        sizes.append(len(tile.positions) * tile.blocks)
        return scores[tile.tokens, :, : tile.blocks]

    found = best_blocks(view, score, Choice(block, count), 1, 1).flatten(0, 1)
    assert max(sizes) <= max(elements, LENGTH // block)
    own_M = view.positions_BT.flatten() // block
    for own, (row,), (numbers,) in zip(own_M.tolist(), scores.tolist(), found.tolist()):
        assert {n for n in numbers if n >= 0} == {own} | ranked(row[:own], count - 1)
