"""What a model remembers of a sequence to go on with it."""

from typing import Any

import torch
from torch import Tensor

from longctx.model.decoder import Decoder


def cache_bytes(model: Decoder, tokens_BT: Tensor) -> int | None:
    """Bytes of the memory after these tokens; None if a layer's selection leaves no memory."""
    mixers = [block.mixer for block in model.blocks if block.mixer is not None]
    if not all(mixer.causal_selection for mixer in mixers):
        return None
    _, memory = model.step(tokens_BT, 0, [])
    return sum(x.numel() * x.element_size() for x in tensors(memory))


def tensors(memory: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(memory, torch.Tensor):
        return [memory]
    if isinstance(memory, list | tuple):
        return [x for part in memory for x in tensors(part)]
    if isinstance(memory, dict):
        return tensors(list(memory.values()))
    return []
