"""Which weights are matrices inside of layers: what Muon changes, and what muP scales by width."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from longctx.mixers.compact_parts import PerHead
from longctx.mixers.parts import LowRank
from longctx.model.block import Block


class HiddenMatrix(NamedTuple):
    """The whole of a weight that is one matrix or several."""

    shape: tuple[int, ...]
    """Of three dimensions each slice is a matrix."""
    sizes: tuple[int, ...]
    """Of the matrices side by side in the first dimension."""


def hidden_matrices(module: nn.Module) -> dict[str, HiddenMatrix]:
    """Weights of the linear layers in the blocks of a decoder, or in a block, by name.

    Left out are embedding and head, convolutions, and what a module draws in its own way, such as
    learned states and filters. Ask before processes share heads: the sizes are those of wholes.
    """
    found = {}
    for prefix, block in module.named_modules():
        if isinstance(block, Block):
            found |= {f"{prefix}.{n}".lstrip("."): matrix for n, matrix in _of_block(block)}
    return found


def _of_block(block: Block) -> Iterator[tuple[str, HiddenMatrix]]:
    sizes: dict[str, tuple[int, ...]] = {}
    for prefix, module in block.named_modules():
        stretches = getattr(module, "stretches", dict)()
        sizes |= {f"{prefix}.{name}": each for name, each in stretches.items()}
        if isinstance(module, nn.Linear | PerHead) and not hasattr(module, "initial"):
            name, shape = f"{prefix}.weight", tuple(module.weight.shape)
            yield name, HiddenMatrix(shape, sizes.get(name, shape[:1]))


def growing_matrices(module: nn.Module) -> set[str]:
    """Names of those whose input widens with the model; that of a low rank's second does not."""
    fixed = {
        f"{name}.up.weight" for name, part in module.named_modules() if isinstance(part, LowRank)
    }
    return hidden_matrices(module).keys() - fixed


def thin_matrices(module: nn.Module) -> set[str]:
    """Names of growing matrices with a side that never widens: those into a low rank, and those of
    each head."""
    thin = {n: "down.weight" for n, part in module.named_modules() if isinstance(part, LowRank)}
    thin |= {n: "weight" for n, part in module.named_modules() if isinstance(part, PerHead)}
    return growing_matrices(module) & {f"{name}.{weight}" for name, weight in thin.items()}
