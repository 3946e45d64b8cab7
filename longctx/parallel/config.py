"""The `[parallel]` table, and the pure function that turns its `auto` into something definite."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from longctx.errors import InputError
from longctx.mixers import MixerConfig
from longctx.sequence.placement import Placement, place
from longctx.sequence.refusal import refuse
from longctx.sequence.sharded import Transports

SCAN_PAYS_FROM = 9
"""Ranks from which a chain of states beats gathering them all."""


@dataclass(frozen=True)
class ParallelConfig:
    """The `[parallel]` table."""

    dp: int = 0
    """Replicas that work on different sequences; 0 means processes / sp."""
    sp: int = 1
    """Processes that share each sequence."""
    tp: int = 1
    """Processes that share the heads, hidden columns and vocabulary of each layer."""
    engine: Literal["fsdp2", "deepspeed", "none"] = "fsdp2"
    """Who holds weights and optimizer state; none, and one process alone: everybody everything."""
    zero_stage: Literal[1, 2, 3] = 3
    """What DeepSpeed spreads: optimizer state (1), gradients too (2), weights too (3)."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """How FSDP2 sends weights of layers; bf16 halves the traffic and rounds norms and gates too."""
    replicas: int = 1
    """Copies of the weights; each is spread over processes / tp / replicas (fsdp2)."""
    placement: Literal["auto", "contiguous", "zigzag", "mirror"] = "auto"
    """Which parts of a sequence a rank holds; auto: mirror with heads, zigzag if softmax layers
    see whole documents, else contiguous."""
    prefix: Literal["auto", "allgather", "scan", "serial", "ulysses"] = "auto"
    """How states of linear layers travel; auto: allgather up to 8 ranks, then scan."""
    stream: Literal["auto", "allgather", "ring"] = "auto"
    """How keys and values of softmax layers travel; auto: allgather."""
    heads: int = 1
    """Ranks that trade sequence for heads (Ulysses); 1 does not."""
    gather_heads: int = 0
    """Key heads that allgather brings at a time, which bounds its memory; 0 brings all."""
    timeout_seconds: int = 600
    """How long a rank waits for another before the run ends."""

    def __post_init__(self) -> None:
        for name in ("sp", "tp", "replicas", "heads", "timeout_seconds"):
            if getattr(self, name) < 1:
                raise InputError(f"parallel.{name} = {getattr(self, name)}: must be at least 1")
        if self.weights != "fp32" and self.engine != "fsdp2":
            raise InputError(
                f"parallel.weights = {self.weights!r}: only engine 'fsdp2' sends weights in it"
            )
        for name in ("dp", "gather_heads"):
            if getattr(self, name) < 0:
                raise InputError(f"parallel.{name} = {getattr(self, name)}: must not be negative")


@dataclass(frozen=True)
class Split:
    """A run's definite split; what `auto` stood for is settled."""

    dp: int
    sp: int
    placement: str
    transports: Transports
    tp: int = 1
    engine: str = "none"
    replicas: int = 1

    def __str__(self) -> str:
        way = self.transports
        return (
            f"dp {self.dp} x sp {self.sp} x tp {self.tp}, engine {self.engine}, {self.placement}, "
            f"prefix {way.prefix}, stream {way.stream}, heads {way.heads}"
        )

    def place(self, seq_len: int) -> Placement:
        """Where the parts of a sequence lie."""
        return place(self.placement, self.sp, seq_len, self.transports.heads)


def resolve(
    config: ParallelConfig, layers: Sequence[MixerConfig], processes: int, seq_len: int
) -> Split:
    """Settles `auto`, and refuses what these layers cannot do on this many processes."""
    dp = _batches(config, processes)
    sees_all = any({"stream", "gather", "select", "means"} & layer.verbs() for layer in layers)
    placement = config.placement
    if placement == "auto":
        mirrored = config.heads % 2 == 0 and config.heads < config.sp
        placement = "mirror" if mirrored else "zigzag" if sees_all else "contiguous"
        if config.heads == config.sp:
            placement = "contiguous"
    prefix = config.prefix
    if prefix == "auto":
        prefix = "scan" if config.sp >= SCAN_PAYS_FROM else "allgather"
    stream = "allgather" if config.stream == "auto" else config.stream
    transports = Transports(prefix, stream, config.heads, config.gather_heads)
    engine = "none" if config.engine == "fsdp2" and dp * config.sp == 1 else config.engine
    split = Split(dp, config.sp, placement, transports, config.tp, engine, config.replicas)
    _check(split, layers, seq_len)
    return split


def _batches(config: ParallelConfig, processes: int) -> int:
    """How many processes, or groups of them, work on different sequences."""
    together = config.sp * config.tp
    sizes = f"parallel.sp = {config.sp}" + f" times parallel.tp = {config.tp}" * (config.tp > 1)
    if processes % together:
        raise InputError(
            f"{sizes} does not divide the {processes} processes of this run; "
            f"start a multiple of {together} (torchrun --nproc-per-node, or launch/local.sh -n)"
        )
    dp = processes // together
    if config.dp not in (0, dp):
        raise InputError(
            f"parallel.dp = {config.dp} times {sizes} is not the {processes} processes of this "
            "run; leave dp at 0 or start that many"
        )
    if (dp * config.sp) % config.replicas:
        raise InputError(
            f"parallel.replicas = {config.replicas} does not divide the {dp * config.sp} "
            "processes that hold weights (processes / parallel.tp)"
        )
    if config.replicas > 1 and config.engine != "fsdp2":
        raise InputError(
            f"parallel.replicas = {config.replicas}: only engine 'fsdp2' has replicas of shards"
        )
    return dp


def _check(split: Split, layers: Sequence[MixerConfig], seq_len: int) -> None:
    if split.sp == 1:
        return
    if split.sp % split.transports.heads:
        raise InputError(
            f"parallel.heads = {split.transports.heads} does not divide parallel.sp = {split.sp}"
        )
    try:
        split.place(seq_len)
    except ValueError as error:
        raise InputError(
            f"train.seq_len = {seq_len}, parallel.sp = {split.sp}, parallel.placement = "
            f"{split.placement!r}: {error}"
        ) from error
    for layer, mixer in enumerate(layers):
        if reason := refuse(mixer, split.placement, split.transports, split.sp):
            raise InputError(f"layer {layer} ({mixer.kind}) cannot be split like this: {reason}")
