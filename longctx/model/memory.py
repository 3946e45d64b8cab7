"""What is kept between the forward and the backward pass: the `[memory]` table and its checks."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from longctx.errors import InputError
from longctx.host import free_memory

Checkpointing = Literal["none", "full", "keep"]
WIDTH_OF_RESIDUAL = 4
"""Bytes of a number in the residual stream, which autocast leaves in fp32."""


@dataclass(frozen=True)
class MemoryConfig:
    """The `[memory]` table."""

    checkpointing: Literal["none", "full", "keep", "auto"] = "none"
    """What layers keep for their backward pass: all they need; with full their input, from which
    the rest is computed again; with keep also (out, log-sum-exp) of softmax cores, incoming states
    of linear and delta layers and small results of exchanges, so that these are not repeated; auto
    takes the fastest that fits, and with it mlp_tokens and activations where these are left out."""
    layers: dict[str, Checkpointing] = field(default_factory=dict)
    """The same for letters of model.pattern that differ; only in a config file."""
    activations: Literal["device", "cpu"] = "device"
    """Where inputs of checkpointed layers wait until they are needed; cpu takes them off a GPU."""
    optimizer: Literal["device", "cpu", "nvme"] = "device"
    """Where optimizer state lies between steps; nvme needs parallel.engine 'deepspeed'."""
    weights: Literal["device", "cpu", "nvme"] = "device"
    """Where weights lie while no layer computes with them; engine 'fsdp2' keeps optimizer state in
    the same place."""
    nvme_path: str = ""
    """Folder for what lies on NVMe."""
    mlp_tokens: int = 0
    """Tokens that a feed-forward layer and its norm compute at a time, forward and backward; 0
    computes all at once."""
    loss_tokens: int = 0
    """Tokens whose logits are held at a time; 0 takes as many as make 64 MiB."""

    def __post_init__(self) -> None:
        for name in ("mlp_tokens", "loss_tokens"):
            if getattr(self, name) < 0:
                raise InputError(f"memory.{name} = {getattr(self, name)}: must be 0 or positive")
        policies = {self.checkpointing, *self.layers.values()}
        if self.activations == "cpu" and policies == {"none"}:
            raise InputError(
                "memory.activations = 'cpu': only inputs of checkpointed layers wait elsewhere; "
                "set memory.checkpointing to full or keep"
            )

    def check(self, letters: Iterable[str]) -> None:
        """Raises InputError if `layers` names a letter that no layer has."""
        known = sorted(set(letters))
        for letter in self.layers:
            if letter not in known:
                raise InputError(
                    f"memory.layers.{letter}: no layer of model.pattern has this letter "
                    f"(there are: {', '.join(known)})"
                )

    def of_layer(self, letter: str) -> Checkpointing:
        """How a layer with this letter is checkpointed; InputError while that is to be chosen."""
        policy = self.layers.get(letter, self.checkpointing)
        if policy == "auto":
            raise InputError(
                "memory.checkpointing = 'auto': only longctx train, check and plan choose by the "
                "size of a machine; set 'none', 'keep' or 'full'"
            )
        return policy

    def __str__(self) -> str:
        """What layers keep, in the words of the fields."""
        own = [f"{letter} {policy}" for letter, policy in sorted(self.layers.items())]
        tiles = [f"mlp_tokens {self.mlp_tokens}"] if self.mlp_tokens else []
        waiting = ["activations cpu"] if self.activations == "cpu" else []
        return ", ".join([f"checkpointing {self.checkpointing}", *own, *tiles, *waiting])


class BlockMemory(NamedTuple):
    """What concerns one layer."""

    checkpointing: Checkpointing = "none"
    mlp_tokens: int = 0
    takes_keys: bool = False
    """Whether it takes keys or values of an earlier layer."""


def host_bytes_needed(memory: MemoryConfig, letters: str, width: int, tokens: int) -> int:
    """Host memory that inputs of layers take while `tokens` tokens of one process are in flight.

    Pinned memory is handed out in powers of two.
    """
    if memory.activations != "cpu":
        return 0
    waiting = sum(memory.of_layer(letter) != "none" for letter in letters)
    return waiting * (1 << (tokens * width * WIDTH_OF_RESIDUAL - 1).bit_length())


def check_host(needed: int) -> None:
    """Raises InputError if the host has less memory than all of its processes need together."""
    available = free_memory()
    if needed > available:
        raise InputError(
            f"memory.activations = 'cpu': inputs of layers need {needed / 2**30:.1f} GiB of host "
            f"memory and {available / 2**30:.1f} GiB are free; shorten train.seq_len, take a "
            "smaller train.micro_batch or more processes, or set it to 'device'"
        )
