"""The one decoder: a pattern of mixers tiled over depth."""

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from longctx.errors import InputError
from longctx.mixers import MixerConfig, Place
from longctx.mixers.attention import AttentionConfig
from longctx.mixers.base import Backend, RMSNorm
from longctx.model.block import Block
from longctx.model.layers import FEED_FORWARD
from longctx.model.loss import linear_cross_entropy, score_labels
from longctx.model.matrices import growing_matrices
from longctx.model.memory import BlockMemory, MemoryConfig
from longctx.model.offload import Copier, waiting_room
from longctx.sequence.local import LocalView
from longctx.sequence.view import SequenceView

MLP_ONLY = "-"
"""The letter of a layer without a mixer."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The `[model]` table."""

    width: int = 128
    """Size of the residual stream."""
    depth: int = 4
    """Number of layers."""
    pattern: str = "LLLS"
    """One letter a layer, repeated until depth is reached; - is a layer without a mixer."""
    mixers: dict[str, MixerConfig]
    """The mixer each letter of the pattern stands for; letters may stay unused."""
    without_mlp: str = ""
    """Letters whose layers have no feed-forward part."""
    mlp: Literal["swiglu", "relu2"] = "swiglu"
    """Kind of the feed-forward layers."""
    mlp_hidden: int = 0
    """Hidden size of the feed-forward layers; 0 means 8/3 of width, rounded up to 32."""
    backend: Backend = "auto"
    """Who computes the cores of mixers: auto is Triton on a GPU and PyTorch on a CPU."""
    tied_head: bool = True
    """Use the embedding as the output head."""
    dropout: float = 0.0
    """Share of a layer's outputs that training leaves out."""
    init_std: float = 0.02
    """Standard deviation of initial weights; divided by sqrt(2 depth) on the way back to width."""
    base_width: int = 0
    """muP: the width at which learning rate and init_std were tuned, from where they are carried
    over to this width; 0 takes both as they are."""

    def __post_init__(self) -> None:
        for name in ("width", "depth"):
            if getattr(self, name) < 1:
                raise InputError(f"model.{name} = {getattr(self, name)}: must be at least 1")
        if self.base_width < 0:
            raise InputError(f"model.base_width = {self.base_width}: must be 0 or positive")
        if not self.pattern:
            raise InputError("model.pattern is empty: give one letter a layer, such as 'LLLS'")
        if MLP_ONLY in self.mixers:
            raise InputError(f"model.mixers.{MLP_ONLY}: stands for no mixer; choose another letter")
        for letter in self.without_mlp:
            if letter not in self.mixers:
                raise InputError(
                    f"model.without_mlp = {self.without_mlp!r}: {letter!r} is no letter of a mixer"
                )
        if not set(self.pattern) - {MLP_ONLY}:
            raise InputError(f"model.pattern = {self.pattern!r}: has no mixer at all")
        for letter in self.pattern:
            if letter not in (MLP_ONLY, *self.mixers):
                known = ", ".join(self.mixers) or "none"
                raise InputError(
                    f"model.pattern = {self.pattern!r}: letter {letter!r} has no table "
                    f"[model.mixers.{letter}] (there are: {known})"
                )
        for letter, mixer in self.mixers.items():
            mixer.check(self.width, f"model.mixers.{letter}")
        self._check_reuse()
        if not 0 <= self.dropout < 1:
            raise InputError(f"model.dropout = {self.dropout}: must be at least 0 and below 1")
        if self.mlp_hidden < 0:
            raise InputError(f"model.mlp_hidden = {self.mlp_hidden}: must be 0 or positive")

    def _check_reuse(self) -> None:
        """A layer that reuses keys or values follows one that has such."""
        left: tuple[int, int] | None = None
        for number, letter in enumerate(self.letters):
            outer = self.mixers.get(letter)
            mixer = getattr(outer, "inner", outer)
            field = "reuses" if mixer is outer else "inner.reuses"
            if not isinstance(mixer, AttentionConfig):
                continue
            sizes = mixer.key_heads, mixer.size_of_head(self.width)
            if mixer.reuses == "nothing":
                left = sizes
            elif left != sizes:
                found = "none before it has any" if left is None else "the last has {} x {}"
                raise InputError(
                    f"model.mixers.{letter}.{field} = {mixer.reuses!r}: layer {number} needs "
                    f"{sizes[0]} heads x {sizes[1]}, and of attention layers with their own "
                    f"{found.format(*(left or ()))}; change the pattern or the sizes"
                )

    @property
    def letters(self) -> str:
        """The letter of each layer."""
        return (self.pattern * -(-self.depth // len(self.pattern)))[: self.depth]

    @property
    def narrowing(self) -> float:
        """muP's base width as a share of the width; 1 without muP."""
        return self.base_width / self.width if self.base_width else 1.0

    @property
    def reuses_keys(self) -> bool:
        """Whether any layer takes keys or values of another."""
        return any(_reuses_keys(mixer) for mixer in self.layers)

    @property
    def layers(self) -> tuple[MixerConfig, ...]:
        """The mixer of each layer that has one."""
        return tuple(
            self.mixers[letter].on(self.backend) for letter in self.letters if letter != MLP_ONLY
        )


def _reuses_keys(mixer: MixerConfig) -> bool:
    inner = getattr(mixer, "inner", mixer)
    return isinstance(inner, AttentionConfig) and inner.reuses != "nothing"


def build_block(config: ModelConfig, layer: int, memory: MemoryConfig) -> Block:
    """One layer of the decoder."""
    letter, mixer, mlp = config.letters[layer], None, None
    if letter != MLP_ONLY:
        place = Place(config.width, layer, config.depth)
        built = config.mixers[letter].on(config.backend).build(place)
        mixer = RMSNorm(config.width), built
    if letter not in config.without_mlp:
        hidden = config.mlp_hidden or -(-config.width * 8 // 96) * 32
        mlp = RMSNorm(config.width), FEED_FORWARD[config.mlp](config.width, hidden)
    takes_keys = mixer is not None and _reuses_keys(config.mixers[letter])
    own = BlockMemory(memory.of_layer(letter), memory.mlp_tokens, takes_keys)
    return Block(mixer, mlp, config.dropout, own)


def outside_blocks(config: ModelConfig, vocab_size: int) -> tuple[nn.Embedding, RMSNorm, nn.Linear]:
    """Embedding, last norm and head."""
    embedding = nn.Embedding(vocab_size, config.width)
    head = nn.Linear(config.width, vocab_size, bias=False)
    if config.tied_head:
        head.weight = embedding.weight
    return embedding, RMSNorm(config.width), head


class LabelScores(NamedTuple):
    """How a model does at each label, rows end to end; 0 and False where it is -100."""

    loss_M: Tensor
    """Negative log probability in nats."""
    correct_M: Tensor
    """Whether it is the most likely token."""
    position_M: Tensor
    """Where in its document the token before it is."""


class Losses(NamedTuple):
    """Sum of the cross-entropy over valid labels, and the mixers' losses averaged over layers."""

    cross_entropy: Tensor
    mixers: dict[str, Tensor]
    statistics: dict[str, Tensor]
    """Sums over own tokens by `LAYER.NAME`, for `Decoder.adapt`; gathered only in training."""
    scores: LabelScores | None = None
    """Found where no gradient is."""


class Decoder(nn.Module):
    """Embedding, blocks, norm and head."""

    def __init__(self, config: ModelConfig, vocab_size: int, memory: MemoryConfig | None = None):
        super().__init__()
        self.config, self.memory = config, memory or MemoryConfig()
        self.memory.check(config.letters)
        self.blocks = nn.ModuleList(
            build_block(config, layer, self.memory) for layer in range(config.depth)
        )
        self.embedding, self.norm, self.head = outside_blocks(config, vocab_size)
        rows = self.memory.loss_tokens
        self.cross_entropy = partial(linear_cross_entropy, rows=rows)
        self.score_labels = partial(score_labels, rows=rows)
        self.copier: Copier | None = None

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor, view: SequenceView) -> Losses:
        """Losses of a batch whose labels are already shifted; label -100 is left out."""
        x_BTD = self.embedding(tokens_BT)
        if self.config.reuses_keys:
            view = view.with_shelf()
        room = None
        if self.memory.activations == "cpu" and torch.is_grad_enabled():
            room = waiting_room(x_BTD.device, self.copier)
        by_name: dict[str, list[Tensor]] = {}
        statistics: dict[str, Tensor] = {}
        for layer, block in enumerate(self.blocks):
            x_BTD, losses, sums = block(x_BTD, view.at(layer), room)
            for name, loss in losses.items():
                by_name.setdefault(name, []).append(loss)
            statistics |= {f"{layer}.{name}": value for name, value in sums.items()}
        if view.shelf:
            view.shelf.clear()  # graphs hold views: else the last keys and values would stay
        means = {name: torch.stack(losses).mean() for name, losses in by_name.items()}
        hidden_MD = self._before_head(x_BTD).flatten(0, 1)
        weight_VD = self.head.weight
        if torch.is_autocast_enabled(hidden_MD.device.type):
            dtype = torch.get_autocast_dtype(hidden_MD.device.type)
            hidden_MD, weight_VD = hidden_MD.to(dtype), weight_VD.to(dtype)
        operands = hidden_MD, weight_VD, labels_BT.flatten()
        if torch.is_grad_enabled():
            return Losses(self.cross_entropy(*operands), means, statistics)
        scores = LabelScores(*self.score_labels(*operands), view.positions_BT.flatten())
        return Losses(scores.loss_M.sum(), means, statistics, scores)

    @torch.no_grad()
    def adapt(self, sums: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """After a step of training, given `Losses.statistics` summed over its `tokens` tokens on
        all processes: adapts the mixers, and returns their figures by `router/LAYER/NAME`."""
        by_layer: dict[str, dict[str, Tensor]] = {}
        for key, value in sums.items():
            layer, _, name = key.partition(".")
            by_layer.setdefault(layer, {})[name] = value
        return {
            f"router/{layer}/{name}": figure
            for layer, own in by_layer.items()
            for name, figure in self.blocks[int(layer)].mixer.adapt(own, tokens).items()
        }

    @torch.no_grad()
    def step(self, tokens_BT: Tensor, start: int, memory: list[Any]) -> tuple[Tensor, list[Any]]:
        """Logits `[B, V]` after these tokens, which begin at position `start`."""
        view = LocalView.whole(*tokens_BT.shape, device=tokens_BT.device).with_shelf()
        view.positions_BT = view.positions_BT + start
        x_BTD = self.embedding(tokens_BT)
        after = []
        for block, layer_memory in zip(self.blocks, memory or [None] * len(self.blocks)):
            x_BTD, layer_memory = block.step(x_BTD, view, layer_memory)
            after.append(layer_memory)
        return self.head(self._before_head(x_BTD[:, -1])), after

    def _before_head(self, x: Tensor) -> Tensor:
        """What the head multiplies; muP scales it, and so the logits, also those of a head that is
        the embedding or is shared by processes."""
        scale, x = self.config.narrowing, self.norm(x)
        return x if scale == 1 else x * scale

    def num_parameters(self) -> int:
        """Weights, tied ones counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops(self, contexts_M: Tensor) -> dict[str, int]:
        """Forward FLOPs by kind of layer, for tokens with these numbers of tokens to see."""
        tokens = contexts_M.numel()
        flops = {"mlp": 0, "head": 2 * tokens * self.head.weight.numel()}
        for letter, block in zip(self.config.letters, self.blocks, strict=True):
            if block.mixer is not None:
                kind = self.config.mixers[letter].kind
                flops[kind] = flops.get(kind, 0) + block.mixer.flops(contexts_M)
            if block.mlp is not None:
                flops["mlp"] += 2 * tokens * sum(p.numel() for p in block.mlp.parameters())
        return flops


@torch.no_grad()
def initialise(model: Decoder, seed: int) -> None:
    """Gives a whole model its first weights."""
    draw(model, model.config, seed, "")


@torch.no_grad()
def draw(module: nn.Module, config: ModelConfig, seed: int, prefix: str) -> None:
    """Draws every matrix, and what modules draw in their own way by a method `initial`.

    From a generator keyed by seed and name, which begins with `prefix`, so order cannot matter.
    """
    modules, growing = dict(module.named_modules()), growing_matrices(module)
    for name, parameter in module.named_parameters():
        key = hashlib.sha256(f"{seed}/{prefix}{name}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(key, "big") >> 1)
        owner, _, own_name = name.rpartition(".")
        own_way = getattr(modules[owner], "initial", None)
        drawn = own_way(own_name, generator) if own_way else None
        if drawn is None and parameter.dim() >= 2:
            std = config.init_std
            if name.endswith("project_out.weight"):
                std /= (2 * config.depth) ** 0.5
            if name in growing:
                std *= config.narrowing**0.5
            drawn = std * torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        if drawn is not None:
            parameter.copy_(drawn)
