"""Floating-point operations of one process in a step, from what each layer says of itself."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longctx.mixers.patterned import Patterned
from longctx.model.block import Block
from longctx.model.decoder import MLP_ONLY, ModelConfig, build_block
from longctx.model.memory import MemoryConfig
from longctx.plan.workload import Workload
from longctx.sequence.placement import Segment

EXACT = 1 << 14
"""Tokens of a document, its first ones, of which every one is asked."""
STRATA = 16
"""Equal parts of what is behind them, of each of which SAMPLE tokens in a row are asked."""
SAMPLE = 1 << 12
TABLE = 1 << 16
"""Position from which policies, which are asked for tables, are taken to go on as before it."""

Count = Callable[[Tensor], int]


class Contexts(NamedTuple):
    """Tokens that lie side by side, by how many of their document they see: themselves and all
    before them. `first` .. `last`, both of them included."""

    first: int
    last: int

    @property
    def count(self) -> int:
        """Tokens."""
        return self.last - self.first + 1

    @property
    def pairs(self) -> int:
        """Of a token and one that it sees."""
        return self.count * (self.first + self.last) // 2


class LayerFlops(NamedTuple):
    """Forward FLOPs of one layer, by who computes them."""

    projections: float
    """Products of the mixer with its weights."""
    core: float
    """Of the mixer's core."""
    mlp: float
    """Of the feed-forward part."""


def flops_of(work: Workload, sp_rank: int) -> dict[str, float]:
    """Forward FLOPs of a step on one of the processes of a sequence, by kind: mlp, head and kinds
    of mixers."""
    model, by_letter = work.settings.model, layer_flops(work, sp_rank)
    flops = {"mlp": 0.0, "head": head_flops(work, sp_rank)}
    for letter in model.letters:
        layer = by_letter[letter]
        flops["mlp"] += layer.mlp
        if letter != MLP_ONLY:
            kind = model.mixers[letter].kind
            flops[kind] = flops.get(kind, 0.0) + layer.projections + layer.core
    return flops


def layer_flops(work: Workload, sp_rank: int) -> dict[str, LayerFlops]:
    """The same by letter of the pattern, of one layer each."""
    contexts, repeats = contexts_of(work, sp_rank)
    model, share, found = work.settings.model, repeats / work.split.tp, {}
    tokens = share * sum(each.count for each in contexts)
    for letter in dict.fromkeys(model.letters):
        block = block_of(model, letter)
        projections, core, mlp = 0.0, 0.0, 0.0
        if block.mixer is not None:
            core = share * _summed(block, contexts, only_core=True)
            projections = share * _summed(block, contexts, only_core=False) - core
        if block.mlp is not None:
            mlp = 2 * tokens * sum(p.numel() for p in block.mlp.parameters())
        found[letter] = LayerFlops(projections, core, mlp)
    return found


def head_flops(work: Workload, sp_rank: int) -> float:
    """Forward FLOPs of the output head in a step."""
    contexts, repeats = contexts_of(work, sp_rank)
    tokens = repeats * sum(each.count for each in contexts)
    return 2 * tokens * work.settings.model.width * work.vocab_size / work.split.tp


def contexts_of(work: Workload, sp_rank: int) -> tuple[tuple[Contexts, ...], float]:
    """What one process computes in a step: tokens of a few rows, and how often there are such.

    Ranks that trade sequence for heads compute, of the tokens of all of them, equal shares.
    """
    heads, placement = work.split.transports.heads, work.placement
    first = sp_rank // heads * heads
    (own,) = placement.merged((tuple(range(first, first + heads)),)).segments
    rows, documents = work.settings.train.batch_size // work.split.dp, work.documents or ((0,),)
    found = [piece for starts in documents for s in own for piece in _cut(s, starts)]
    return tuple(found), rows / len(documents) / heads


def _cut(segment: Segment, starts: tuple[int, ...]) -> list[Contexts]:
    """The parts of a segment that lie in one document each."""
    before = max(start for start in starts if start <= segment.start)
    edges = [before, *(s for s in starts if segment.start < s < segment.stop)]
    stops = [*edges[1:], segment.stop]
    return [
        Contexts(max(start, segment.start) - start + 1, stop - start)
        for start, stop in zip(edges, stops)
    ]


def block_of(model: ModelConfig, letter: str) -> Block:
    """A layer with this letter, without memory for its weights; equal layers are one."""
    key = repr((letter == MLP_ONLY or model.mixers[letter], letter in model.without_mlp, model.mlp))
    return _block(_Keyed((key, model.width, model.mlp_hidden, model.depth), model, letter))


class _Keyed(NamedTuple):
    """A layer's place in a model, equal if the key is."""

    key: tuple[str, int, int, int]
    model: ModelConfig
    letter: str

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Keyed) and self.key == other.key

    def __ne__(self, other: object) -> bool:
        return not self == other


@lru_cache(maxsize=64)
def _block(place: _Keyed) -> Block:
    with torch.device("meta"):
        return build_block(place.model, place.model.letters.index(place.letter), MemoryConfig())


@lru_cache(maxsize=1024)
def _summed(block: Block, contexts: tuple[Contexts, ...], only_core: bool) -> float:
    """FLOPs of a layer's mixer over these tokens."""
    mixer = block.mixer
    assert mixer is not None
    count: Count = mixer.core_flops if only_core else mixer.flops
    if not isinstance(mixer, Patterned):
        return summed(count, contexts)
    near = [Contexts(c.first, min(c.last, TABLE)) for c in contexts if c.first <= TABLE]
    far = [Contexts(max(c.first, TABLE + 1), c.last) for c in contexts if c.last > TABLE]
    return summed(count, near) + sum(_continued(count, each) for each in far)


def summed(count: Count, contexts: tuple[Contexts, ...] | list[Contexts]) -> float:
    """A sum over tokens that depends on what each sees: of the first of a document token by token,
    of others by samples, which is exact for what grows by the same with every token."""
    total, asked = 0.0, []
    for each in contexts:
        if each.first <= EXACT:
            asked.append(torch.arange(each.first, min(each.last, EXACT) + 1))
        first = max(each.first, EXACT + 1)
        if each.last - first >= STRATA * SAMPLE:
            total += _sampled(count, Contexts(first, each.last))
        elif first <= each.last:
            asked.append(torch.arange(first, each.last + 1))
    return total + count(torch.cat(asked)) if asked else total


def _sampled(count: Count, contexts: Contexts) -> float:
    size = contexts.count / STRATA
    middles = (contexts.first + (torch.arange(STRATA) + 0.5) * size).long()
    samples = middles[:, None] + torch.arange(-SAMPLE // 2, SAMPLE // 2)
    return count(samples.flatten()) * size / SAMPLE


def _continued(count: Count, contexts: Contexts) -> float:
    """The sum where the table does not reach.

    From octave to octave the mean goes on growing as it did over the last three of the table: by
    twice as much each time if it grows with what tokens see, by as much if with its logarithm.
    """
    ends = [TABLE // 8, TABLE // 4, TABLE // 2, TABLE]
    means = [count(torch.arange(a, b) + 1) / (b - a) for a, b in zip(ends, ends[1:])]
    before, growth = (after - earlier for earlier, after in zip(means, means[1:]))
    ratio = min(2.0, growth / before) if before > 0 and growth > 0 else 0.0
    middle, values, places = 3 * TABLE / 4, [means[-1]], [3 * TABLE / 4]
    while places[-1] < contexts.last:
        middle, growth = 2 * middle, ratio * growth
        places.append(middle)
        values.append(values[-1] + growth)
    steps = (np.arange(SAMPLE) + 0.5) / SAMPLE
    at = contexts.first + steps * (contexts.last - contexts.first)
    return contexts.count * float(np.interp(at, places, values).mean())
