"""A small set of combinations in which every possible pair of values occurs."""

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

CANDIDATES = 40
"""Combinations among which each step takes the one that covers most."""

Combination = dict[str, Any]
Pair = tuple[tuple[str, int], tuple[str, int]]


def pairwise_cover(
    values: dict[str, Sequence[Any]], is_legal: Callable[[Combination], bool], seed: int
) -> list[Combination]:
    """Legal combinations that together hold every pair of values some legal combination holds."""
    chance = random.Random(seed)
    holders: dict[Pair, list[tuple[int, ...]]] = {}
    for places in itertools.product(*(range(len(v)) for v in values.values())):
        if is_legal(_combination(values, places)):
            for pair in _pairs(values, places):
                holders.setdefault(pair, []).append(places)
    missing, chosen = dict.fromkeys(holders), []
    while missing:
        holding = holders[chance.choice(list(missing))]
        candidates = chance.sample(holding, min(len(holding), CANDIDATES))
        best = max(candidates, key=lambda c: sum(pair in missing for pair in _pairs(values, c)))
        for pair in _pairs(values, best):
            missing.pop(pair, None)
        chosen.append(_combination(values, best))
    return chosen


def _combination(values: dict[str, Sequence[Any]], places: tuple[int, ...]) -> Combination:
    return {name: options[i] for (name, options), i in zip(values.items(), places)}


def _pairs(values: dict[str, Sequence[Any]], places: tuple[int, ...]) -> list[Pair]:
    return list(itertools.combinations(zip(values, places), 2))
