"""How long one process computes in a step, by letter of the pattern."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import nn

from longctx.mixers import MixerConfig
from longctx.mixers.attention import RotaryConfig
from longctx.mixers.delta import DeltaConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.mixers.titans import TitansConfig
from longctx.model.block import Block
from longctx.model.decoder import MLP_ONLY
from longctx.plan.clusters import ClusterConfig
from longctx.plan.flops import LayerFlops, block_of, head_flops, layer_flops
from longctx.plan.workload import Workload
from longctx.sequence.expected import WIDTHS, Widths

BACKWARD = {"matmul": 2.0, "softmax": 2.5, "linear": 2.0, "delta": 2.25, "sparse": 2.5}
"""Seconds of the backward pass by those of the forward pass: attention makes five products of two,
flash-linear-attention's gated DeltaNet takes 2.24 times as long, others make two of one."""
STREAM_PASSES = 14
"""Numbers of the residual stream's width that a layer reads or writes a token, outside of products:
in two norms and two sums, and on the way into the core and out of it."""
HIDDEN_PASSES = 3
"""Numbers a hidden column that the feed-forward part reads or writes a token."""
LOGIT_PASSES = 8
"""Numbers that the loss reads or writes for each token and entry of the vocabulary, with
gradients."""
MOVING = "norms and sums"
"""Stands for a kind: what memory bounds."""
SEGMENT_MAPS = 0.5
"""What the matrices of a delta rule's segments take, by its forward pass, where they are sent."""


class Part(NamedTuple):
    """Seconds of a part of a layer."""

    forward: float = 0.0
    backward: float = 0.0
    repeated: float = 0.0
    """Forward once more, before the backward pass."""

    @property
    def total(self) -> float:
        """Both ways."""
        return self.forward + self.backward + self.repeated


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer in a step."""

    mlp: Part
    projections: Part
    core: Part
    moving: Part
    """Outside of products: what is bound by memory."""

    @property
    def forward(self) -> float:
        """Of the first pass."""
        return sum(part.forward for part in self._parts)

    @property
    def backward(self) -> float:
        """Of the backward pass, and what it repeats."""
        return sum(part.backward + part.repeated for part in self._parts)

    @property
    def _parts(self) -> tuple[Part, ...]:
        return self.mlp, self.projections, self.core, self.moving


def kernels_of(mixer: MixerConfig) -> str:
    """The class of kernels that computes a mixer's core."""
    inner = getattr(mixer, "inner", mixer)
    if isinstance(inner, SoftmaxConfig):
        return "softmax"
    if isinstance(inner, RotaryConfig):
        return "sparse"
    if isinstance(inner, (DeltaConfig, TitansConfig)) or "handoff" in inner.verbs():
        return "delta"
    return "linear" if "prefix" in inner.verbs() else "softmax"


@dataclass(frozen=True)
class Compute:
    """What one process computes in a step, on a cluster."""

    work: Workload
    cluster: ClusterConfig
    sp_rank: int

    @cached_property
    def own_tokens(self) -> int:
        """Of a row, that a core sees at once as queries."""
        heads = self.work.split.transports.heads
        first = self.sp_rank // heads * heads
        return sum(self.work.placement.lengths[first : first + heads])

    @cached_property
    def tokens(self) -> float:
        """Of a whole step, on this process."""
        rows = self.work.settings.train.batch_size // self.work.split.dp
        return rows * self.work.placement.lengths[self.sp_rank]

    @cached_property
    def layers(self) -> dict[str, LayerTime]:
        """One layer of each letter."""
        flops = layer_flops(self.work, self.sp_rank)
        return {letter: self._layer(letter, own) for letter, own in flops.items()}

    @cached_property
    def head(self) -> float:
        """Seconds of the output head and the loss, both ways."""
        seconds = head_flops(self.work, self.sp_rank) / self._rate("matmul")
        logits = LOGIT_PASSES * self.tokens * self.work.vocab_size / self.work.split.tp
        moving = logits * self.widths.state / self.cluster.memory_bandwidth
        return seconds * (1 + BACKWARD["matmul"]) + moving

    @property
    def by_kind(self) -> dict[str, float]:
        """Seconds of the whole model, both ways, by kind."""
        model = self.work.settings.model
        found = {"mlp": 0.0, "head": self.head, MOVING: 0.0}
        for letter in model.letters:
            layer = self.layers[letter]
            found["mlp"] += layer.mlp.total
            found[MOVING] += layer.moving.total
            if letter != MLP_ONLY:
                kind, seconds = model.mixers[letter].kind, layer.projections.total
                found[kind] = found.get(kind, 0.0) + seconds + layer.core.total
        return found

    @property
    def widths(self) -> Widths:
        """Bytes of a number."""
        return WIDTHS[self.work.precision]

    def _rate(self, kernels: str) -> float:
        tokens = self.own_tokens
        if kernels == "matmul":
            tokens = max(self.work.micro_rows) * self.work.placement.lengths[self.sp_rank]
        return self.cluster.rate(kernels, tokens, self.work.precision)

    def _layer(self, letter: str, flops: LayerFlops) -> LayerTime:
        model, policy = self.work.settings.model, self.work.settings.memory.of_layer(letter)
        block, repeats = block_of(model, letter), float(policy != "none")
        products, back = self._rate("matmul"), BACKWARD["matmul"]
        mixer = flops.projections / products
        mlp, core = flops.mlp / products, Part()
        if letter != MLP_ONLY:
            core = self._core(model.mixers[letter], flops.core, policy)
        moving = self._moving(0 if block.mlp is None else mlp_columns(block.mlp))
        return LayerTime(
            mlp=Part(mlp, back * mlp, self._repeated_mlp(block, repeats) * mlp),
            projections=Part(mixer, back * mixer, repeats * mixer),
            core=core,
            moving=Part(moving, back * moving, repeats * moving),
        )

    def _core(self, mixer: MixerConfig, flops: float, policy: str) -> Part:
        """Kept results of softmax and sparse cores are not computed again."""
        kernels = kernels_of(mixer)
        seconds = flops / self._rate(kernels)
        is_again = policy == "full" or (policy == "keep" and kernels in ("linear", "delta"))
        extra = 0.0
        if kernels == "delta" and self.work.split.sp > 1:
            extra = SEGMENT_MAPS * seconds * (self.work.split.transports.prefix != "ulysses")
        repeated = seconds + extra * (policy == "full")
        return Part(seconds + extra, BACKWARD[kernels] * seconds, repeated * is_again)

    def _repeated_mlp(self, block: Block, repeats: float) -> float:
        """Tiles are always computed again; a repeated pass ends before the last matrix."""
        if block.mlp is None or self.work.settings.memory.mlp_tokens:
            return float(block.mlp is not None)
        sizes = {name: p.numel() for name, p in block.mlp.named_parameters()}
        return repeats * (1 - sizes["project_out.weight"] / sum(sizes.values()))

    def _moving(self, hidden: int) -> float:
        """Forward seconds of one layer."""
        stream = STREAM_PASSES * self.work.settings.model.width * self.widths.state
        columns = HIDDEN_PASSES * hidden * self.widths.activation / self.work.split.tp
        return self.tokens * (stream + columns) / self.cluster.memory_bandwidth


def mlp_columns(mlp: nn.Module) -> int:
    """Hidden columns of a feed-forward part."""
    return mlp.get_parameter("project_out.weight").shape[1]
