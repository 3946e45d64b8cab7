"""Settles `memory.checkpointing = "auto"`, before processes speak to each other."""

from dataclasses import replace

import torch

from longctx.data.config import DataConfig
from longctx.data.sources import source_tokenizer
from longctx.data.tokenizer import open_tokenizer
from longctx.host import total_memory
from longctx.plan.search import Room, choose_memory
from longctx.train.settings import Settings

SHARE = 0.9
"""Of memory that there is; the rest is for CUDA or for Python and the system."""


def settle_memory(settings: Settings, processes: int, here: int) -> Settings:
    """With the fastest way to keep activations that fits this machine, on which so many of all
    processes are; unchanged unless the settings leave it to that."""
    if settings.memory.checkpointing != "auto":
        return settings
    device = settings.train.resolve_device()
    precision, room = settings.train.resolve_precision(device), room_here(device, here)
    return settle_within(settings, processes, size_of_vocabulary(settings.data), precision, room)


def settle_within(
    settings: Settings, processes: int, vocab_size: int, precision: str, room: Room
) -> Settings:
    """The same for processes that have so much memory each."""
    if settings.memory.checkpointing != "auto":
        return settings
    memory = choose_memory(settings, processes, vocab_size, precision, room)
    return replace(settings, memory=memory)


def room_here(device: torch.device, here: int) -> Room:
    """Of each of so many processes on this machine: what there is, not what is free, so that each
    of them finds the same, and again when a run goes on."""
    host = SHARE * total_memory() / here
    if device.type == "cpu":
        return Room(host, 0.0, is_apart=False)
    return Room(SHARE * torch.cuda.get_device_properties(device).total_memory, host)


def size_of_vocabulary(data: DataConfig) -> int:
    """Of the tokenizer of the first source; InputError if it is not on this machine."""
    if data.task:
        return data.vocabulary
    source = next(iter(data.sources().values()))
    if source.streaming:
        return open_tokenizer(data.tokenizer).vocab_size
    return source_tokenizer(source, data).vocab_size
