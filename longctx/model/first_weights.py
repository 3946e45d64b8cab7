"""First weights of a model that no process holds whole: one layer at a time is made and drawn."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from longctx.model.decoder import Decoder, ModelConfig, build_block, draw, outside_blocks
from longctx.model.memory import MemoryConfig


class FirstWeights:
    """What `initialise` would give a whole model."""

    def __init__(self, config: ModelConfig, vocab_size: int, seed: int):
        self._config, self._vocab_size, self._seed = config, vocab_size, seed
        self._prefix, self._module = "", nn.Module()

    def read(self, name: str, offsets: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """A block of the weight `model/NAME`; names of one layer should follow one another."""
        name = name.removeprefix("model/")
        words = name.split(".")
        prefix = f"blocks.{words[1]}." if words[0] == "blocks" else "outside"
        own_name = name.removeprefix(prefix)
        tensor = self._layer(prefix).state_dict()[own_name]
        return tensor[tuple(slice(a, a + n) for a, n in zip(offsets, shape))]

    @torch.no_grad()
    def fill_buffers(self, model: Decoder, cut: Callable[[str, Tensor], Tensor]) -> None:
        """Copies all buffers, of which a model may hold parts that `cut` takes by name."""
        for layer, block in enumerate(model.blocks):
            if own := dict(block.named_buffers()):
                prefix = f"blocks.{layer}."
                whole = dict(self._layer(prefix).named_buffers())
                for name, buffer in own.items():
                    buffer.copy_(cut(prefix + name, whole[name]))

    def _layer(self, prefix: str) -> nn.Module:
        if prefix != self._prefix:
            self._prefix, self._module = prefix, self._make(prefix)
        return self._module

    def _make(self, prefix: str) -> nn.Module:
        config = self._config
        if prefix.startswith("blocks."):
            module: nn.Module = build_block(config, int(prefix.split(".")[1]), MemoryConfig())
            draw(module, config, self._seed, prefix)
            return module
        module = nn.Module()
        module.embedding, module.norm, module.head = outside_blocks(config, self._vocab_size)
        draw(module, config, self._seed, "")
        return module
