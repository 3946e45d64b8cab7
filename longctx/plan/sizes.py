"""Numbers and shapes of a model's weights, from one layer of each letter without contents."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod

import torch

from longctx.model.block import Block
from longctx.model.decoder import ModelConfig, outside_blocks
from longctx.model.matrices import hidden_matrices
from longctx.model.saved_bytes import hollow_block


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights."""

    layers: dict[str, int]
    """Of a layer of each letter; of a first layer that differs from others of its letter not."""
    embedding: int
    norm: int
    """Of the last norm."""
    head: int
    """0 if it is the embedding."""
    total: int
    """Of the whole model, tied ones counted once."""


@dataclass(frozen=True)
class Weight:
    """A weight without contents."""

    shape: tuple[int, ...]
    is_hidden_matrix: bool
    """Whether Muon would change it."""

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return prod(self.shape)


@dataclass(frozen=True)
class HollowLayer:
    """A layer, or a share of it, without contents."""

    letter: str
    block: Block
    weights: tuple[Weight, ...]
    floats: int
    """Elements of its buffers that have a weight's precision."""
    fixed: int
    """Bytes of its other buffers."""

    @property
    def numel(self) -> int:
        """How many weights it has."""
        return sum(weight.numel for weight in self.weights)


@dataclass(frozen=True)
class HollowModel:
    """A model, or a share of its heads, hidden columns and vocabulary, without contents."""

    first: HollowLayer
    """The first layer: a kind may give that something of its own."""
    others: dict[str, HollowLayer]
    """Of each letter among the layers after it."""
    counts: Counter[str]
    """How many of these there are."""
    outside: tuple[Weight, ...]
    """Embedding, last norm, and a head of its own."""

    def layers(self) -> Iterator[tuple[HollowLayer, int]]:
        """Different layers, and how many of each there are."""
        yield self.first, 1
        for letter, count in self.counts.items():
            yield self.others[letter], count


@dataclass(frozen=True)
class _Asked:
    """A model, which cannot be hashed, under its text."""

    text: str
    vocab_size: int
    part: tuple[int, int]
    model: ModelConfig = field(compare=False)


def hollow_model(model: ModelConfig, vocab_size: int, part: tuple[int, int]) -> HollowModel:
    """One of so many shares of a model; built once."""
    return _built(_Asked(repr(model), vocab_size, part, model))


def parameters_of(model: ModelConfig, vocab_size: int) -> Parameters:
    """Of a model of whatever size, in no memory."""
    hollow = hollow_model(model, vocab_size, (0, 1))
    layers = {model.letters[0]: hollow.first.numel}
    layers |= {letter: layer.numel for letter, layer in hollow.others.items()}
    embedding, norm, *head = (weight.numel for weight in hollow.outside)
    total = sum(layer.numel * count for layer, count in hollow.layers())
    total += sum(weight.numel for weight in hollow.outside)
    return Parameters(layers, embedding, norm, sum(head), total)


@lru_cache(maxsize=256)
def _built(asked: _Asked) -> HollowModel:
    model, (number, parts) = asked.model, asked.part
    rest = model.letters[1:]
    others = {
        letter: _layer(model, 1 + rest.index(letter), asked.part) for letter in dict.fromkeys(rest)
    }
    rows = asked.vocab_size * (number + 1) // parts - asked.vocab_size * number // parts
    with torch.device("meta"):
        modules = outside_blocks(model, rows)
    weights = {id(p): p for module in modules for p in module.parameters()}
    outside = tuple(Weight(tuple(p.shape), False) for p in weights.values())
    return HollowModel(_layer(model, 0, asked.part), others, Counter(rest), outside)


def _layer(model: ModelConfig, number: int, part: tuple[int, int]) -> HollowLayer:
    block = hollow_block(model, number, part)
    matrices = hidden_matrices(block)
    weights = (Weight(tuple(p.shape), name in matrices) for name, p in block.named_parameters())
    buffers = list(block.buffers())
    floats = sum(buffer.numel() for buffer in buffers if buffer.is_floating_point())
    fixed = sum(buffer.nbytes for buffer in buffers if not buffer.is_floating_point())
    return HollowLayer(model.letters[number], block, tuple(weights), floats, fixed)
