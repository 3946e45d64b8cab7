"""Bytes that a model keeps between its forward and its backward pass, by formula.

The residual stream is counted by the layer that reads it, also where that is its only tensor;
weights, gradients and what a view has of a batch are not counted, weights that autocast has
rounded are. M tokens are in flight on a process, N pieces of documents. Formulas say what kernels
keep, as the views of one process or of several call them. Layers of other kinds are run.
"""

from collections.abc import Mapping
from typing import Any

import torch

from longctx.mixers import Place
from longctx.mixers.attention import AttentionConfig
from longctx.model.block import Block
from longctx.model.decoder import ModelConfig, build_block
from longctx.model.in_flight import DTYPES, Batch
from longctx.model.layers import FEED_FORWARD, SwiGLU
from longctx.model.memory import MemoryConfig
from longctx.model.saved_formulas import formula_of
from longctx.model.saved_runs import Layer, counted, saved_by_running

__all__ = [
    "DTYPES",
    "Batch",
    "counted",
    "hollow_block",
    "of_block",
    "of_ends",
    "of_hollow",
    "of_model",
    "of_shelf",
]


def hollow_block(config: ModelConfig, layer: int, part: tuple[int, int] = (0, 1)) -> Block:
    """A layer without contents; with one of so many shares of its heads and hidden columns."""
    number, parts = part
    with torch.device("meta"):
        block = build_block(config, layer, MemoryConfig())
        mlp: Any = block.mlp
        if parts > 1 and mlp is not None:
            hidden = mlp.up.out_features
            own = hidden * (number + 1) // parts - hidden * number // parts
            block.mlp = FEED_FORWARD[config.mlp](config.width, own)
        if parts > 1 and block.mixer is not None:
            mixer = config.mixers[config.letters[layer]].on(config.backend)
            where = Place(config.width, layer, config.depth, number, parts)
            block.mixer = mixer.over_tp(config.width, parts).build(where)
    return block


def of_block(config: ModelConfig, letter: str, memory: MemoryConfig, batch: Batch) -> int:
    """Of one layer; inputs that wait on the host are not counted on a device that is none."""
    block = hollow_block(config, config.letters.index(letter))
    return sum(of_hollow(block, (config, letter, (0, 1)), memory, batch))


def of_hollow(
    block: Block,
    which: tuple[ModelConfig, str, tuple[int, int]],
    memory: MemoryConfig,
    batch: Batch,
) -> tuple[int, int]:
    """The same of a layer that is built, or of a share of it: of its mixer with the input of the
    layer, and of its feed-forward part. It is `which` letter of a model, and which share."""
    config, letter, part = which
    stream = batch.total * config.width * batch.wide
    policy = memory.of_layer(letter)
    dropped = batch.total * config.width if config.dropout and policy == "none" else 0
    mixing = feeding = 0
    if block.mixer is not None:
        formula = formula_of(block.mixer)
        if formula is None:
            mixer = config.mixers[letter].on(config.backend)
            mixer = mixer.over_tp(config.width, part[1]) if part[1] > 1 else mixer
            where = Place(config.width, config.letters.index(letter), config.depth, *part)
            mixing = saved_by_running(Layer(mixer, where, policy), batch) + dropped
        else:
            saved = getattr(formula(block.mixer, config.width, batch), policy)
            mixing = stream + saved + dropped
            mixing += batch.rounded(block.mixer) if policy == "none" else 0
    if policy != "none":
        return mixing or stream, 0
    if block.mlp is not None:
        feeding = stream + dropped
        if not memory.mlp_tokens:
            feeding += _feed_forward(block.mlp, config.width, batch) + batch.rounded(block.mlp)
    return mixing, feeding


def of_ends(config: ModelConfig, vocab_size: int, batch: Batch) -> int:
    """Of the last norm and the loss, which keeps its gradients."""
    hidden = batch.total * config.width
    return hidden * batch.wide + (hidden + vocab_size * config.width) * batch.narrow


def of_shelf(
    config: ModelConfig, memory: MemoryConfig, blocks: Mapping[str, Block], batch: Batch
) -> dict[int, int]:
    """Of keys and values that wait for later layers and that no layer counts, by the number of the
    layer that makes them; `blocks` has one of each letter."""
    found: dict[int, int] = {}
    maker = 0
    for number, letter in enumerate(config.letters):
        outer = config.mixers.get(letter)
        mixer = getattr(outer, "inner", outer)
        if not isinstance(mixer, AttentionConfig):
            continue
        if mixer.reuses == "nothing":
            maker = number
            continue
        # One process keeps them once, by whichever layer; several lay out their own for a core.
        is_again = memory.of_layer(letter) != "none"
        if is_again if batch.split else memory.of_layer(config.letters[maker]) != "none":
            made: Any = blocks[config.letters[maker]].mixer
            made = getattr(made, "inner", made)
            each = batch.total * made.num_kv_heads * made.size * batch.narrow
            both = is_again or mixer.reuses == "keys and values"
            found[maker] = max(found.get(maker, 0), each * (1 + both))
    return found


def of_model(config: ModelConfig, vocab_size: int, memory: MemoryConfig, batch: Batch) -> int:
    """Of all layers, embedding and head."""
    by_letter = {a: of_block(config, a, memory, batch) for a in set(config.letters)}
    total = sum(by_letter[a] for a in config.letters) + of_ends(config, vocab_size, batch)
    blocks = {a: hollow_block(config, config.letters.index(a)) for a in by_letter}
    return total + sum(of_shelf(config, memory, blocks, batch).values())


def _feed_forward(mlp: Any, width: int, batch: Batch) -> int:
    """Before and after the activation, the gated product; without a gate it takes fewer."""
    gated = isinstance(mlp, SwiGLU)
    hidden = mlp.up.out_features
    return batch.normed(width, 1 + gated) + batch.total * hidden * batch.narrow * (
        4 if gated else 2
    )
