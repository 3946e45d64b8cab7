"""Bytes that a model keeps between its forward and its backward pass, by formula.

The residual stream is counted by the layer that reads it, also where that is its only tensor;
weights, gradients and what a view has of a batch are not counted, weights that autocast has
rounded are. M tokens are in flight on a process, N documents. Formulas say what PyTorch's kernels
keep, as LocalView calls them. Layers of other kinds are run at two small lengths: what they keep
grows by the same with every token once their windows are full, but for slots of selecting heads,
which are padded to whole tiles.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from longctx_kernels.decay_torch import saved_rows
from torch import nn

from longctx.mixers.delta import Delta
from longctx.mixers.gla import GLA
from longctx.mixers.linear import Linear
from longctx.mixers.mamba2 import Mamba2
from longctx.mixers.softmax import Softmax
from longctx.model.allocations import Allocations
from longctx.model.block import Block
from longctx.model.decoder import ModelConfig, build_block
from longctx.model.layers import SwiGLU
from longctx.model.memory import MemoryConfig
from longctx.sequence.local import LocalView

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.float32}
LENGTHS = (512, 1024)
"""At which layers without a formula are run."""


@dataclass(frozen=True)
class Batch:
    """What is in flight."""

    rows: int
    tokens: int
    """Of each row."""
    precision: str = "fp32"
    """fp64, fp32, or bf16 by autocast."""
    documents: int = 0
    """Of all rows; 0 is one in each."""

    @property
    def pieces(self) -> int:
        """Documents of all rows."""
        return self.documents or self.rows

    @property
    def total(self) -> int:
        """Tokens of all rows."""
        return self.rows * self.tokens

    @property
    def wide(self) -> int:
        """Bytes of a number in the residual stream and in states."""
        return DTYPES[self.precision].itemsize

    @property
    def narrow(self) -> int:
        """Bytes of a number that linear maps take and give."""
        return 2 if self.precision == "bf16" else self.wide

    def normed(self, width: int, maps: int) -> int:
        """The output of a norm that so many linear maps read: one tensor, or each its rounded."""
        rounded = self.narrow < self.wide
        return self.total * width * (maps * self.narrow if rounded else self.wide)

    def rounded(self, module: nn.Module) -> int:
        """Rounded weights of the linear maps in a module."""
        maps = (m for m in module.modules() if isinstance(m, nn.Linear))
        return sum(m.weight.numel() for m in maps) * (2 if self.narrow < self.wide else 0)

    def states(self, heads: int, key_dim: int, value_dim: int) -> int:
        """Those that a decaying core keeps between slabs of tokens."""
        rows = saved_rows(self.total, self.pieces, heads * max(key_dim, value_dim))
        return rows * heads * key_dim * value_dim * self.wide


def of_block(config: ModelConfig, letter: str, memory: MemoryConfig, batch: Batch) -> int:
    """Of one layer; inputs that wait on the host are not counted on a device that is none."""
    with torch.device("meta"):
        block = build_block(config, config.letters.index(letter), memory)
    stream = batch.total * config.width * batch.wide
    if block.memory.checkpointing == "full":
        return stream
    formula = _FORMULAS.get(type(block.mixer)) if _is_plain(block.mixer) else None
    if block.mixer is not None and formula is None:
        return _extrapolated(config, letter, memory, batch)
    if block.memory.checkpointing == "keep":
        return stream + (_kept_results(block.mixer, batch) if block.mixer is not None else 0)
    total, dropped = 0, batch.total * config.width if config.dropout else 0
    if block.mixer is not None and formula is not None:
        total += stream + formula(block.mixer, config.width, batch) + dropped
        total += batch.rounded(block.mixer)
    if block.mlp is not None:
        total += stream + dropped
        if not block.memory.mlp_tokens:
            total += _feed_forward(block.mlp, config.width, batch) + batch.rounded(block.mlp)
    return total


def of_ends(config: ModelConfig, vocab_size: int, batch: Batch) -> int:
    """Of the last norm and the loss, which keeps its gradients."""
    hidden = batch.total * config.width
    return hidden * batch.wide + (hidden + vocab_size * config.width) * batch.narrow


def of_model(config: ModelConfig, vocab_size: int, memory: MemoryConfig, batch: Batch) -> int:
    """Of all layers, embedding and head."""
    by_letter = {a: of_block(config, a, memory, batch) for a in set(config.letters)}
    return sum(by_letter[a] for a in config.letters) + of_ends(config, vocab_size, batch)


def counted(block: Block, view: LocalView, width: int, precision: str) -> int:
    """What a layer keeps of a batch on a CPU, by running it forward."""
    dtype = DTYPES[precision]
    leaf = torch.randn(*view.token_ids_BT.shape, width, dtype=dtype, requires_grad=True)
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
    with Allocations() as allocations:
        x_BTD = leaf.clone()
        with autocast:
            mixed = block(x_BTD, view)
        del x_BTD
        results = (mixed.out, *mixed.losses.values(), *mixed.statistics.values())
        own = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in results}
        return allocations.alive() - sum(own.values())


def _extrapolated(config: ModelConfig, letter: str, memory: MemoryConfig, batch: Batch) -> int:
    block = build_block(config, config.letters.index(letter), memory).to(DTYPES[batch.precision])
    found = []
    for tokens in LENGTHS:
        view = LocalView.whole(batch.rows, tokens).keyed(0, 0, tuple(range(batch.rows)))
        # Once before, for what a view finds out of a batch and keeps.
        found.append([counted(block, view, config.width, batch.precision) for _ in range(2)][1])
    each = (found[1] - found[0]) / (LENGTHS[1] - LENGTHS[0])
    return round(found[1] + each * (batch.tokens - LENGTHS[1]))


def _is_plain(mixer: nn.Module | None) -> bool:
    """Whether formulas know all of a layer's settings."""
    config: Any = getattr(mixer, "config", None)
    if isinstance(mixer, Linear):
        is_known = config.feature_map == "silu" and config.value_map == "identity"
        return is_known and not mixer.has_sum and mixer.lrpe is None and config.norm == "rms"
    if isinstance(mixer, Delta):
        return mixer.convolve is not None and not getattr(mixer.decay, "lowest", 0)
    return not (isinstance(mixer, GLA) and mixer.shift is not None)


def _kept_results(mixer: nn.Module, batch: Batch) -> int:
    """What is not computed again: (out, log-sum-exp) of softmax; of others nothing on one process,
    whose incoming states are zeros."""
    if not isinstance(mixer, Softmax):
        return 0
    return batch.total * mixer.num_heads * (mixer.size * batch.narrow + batch.wide)


def _softmax(mixer: Softmax, width: int, batch: Batch) -> int:
    config, M, a, w = mixer.config, batch.total, batch.narrow, batch.wide
    queries, keys = mixer.num_heads * mixer.size, mixer.num_kv_heads * mixer.size
    own_keys = 0 if config.reuses == "keys and values" else 1
    own_values = 1 if config.reuses == "nothing" else 0
    maps = 1 + own_keys + own_values + (config.gate != "none")
    total = batch.normed(width, maps) + _kept_results(mixer, batch)
    # Before the norms of queries and keys, and after rotation; sines and cosines of either.
    before = queries + own_keys * keys if config.qk_norm else 0
    total += M * a * (before + queries + own_keys * keys + own_values * keys)
    turned = int(config.rope_fraction * mixer.size) // 2
    total += M * w * 2 * turned * (1 + own_keys)
    return total + (2 * M * queries * a if config.gate != "none" else 0)


def _linear(mixer: Linear, width: int, batch: Batch) -> int:
    M, a, w, H = batch.total, batch.narrow, batch.wide, mixer.num_heads
    keys, values = H * mixer.features, H * mixer.value_size
    total = batch.normed(width, 3 + (mixer.gate is not None))
    # Queries and keys before and after silu; values, and what the last map takes.
    total += M * a * (4 * keys + 2 * values)
    # The core's output and the gate, which the norm reads together. Without a norm a sigmoid
    # needs its result alone, silu what it took.
    steps = {"none": 0, "sigmoid": 2, "swish": 3}[mixer.config.gate]
    total += M * a * values * (steps if mixer.norm is None else 1 + (mixer.gate is not None))
    total += H * w if mixer.log_decay_H is None else 0
    return total + batch.states(H, mixer.features, mixer.value_size)


def _gla(mixer: GLA, width: int, batch: Batch) -> int:
    M, a, w, H = batch.total, batch.narrow, batch.wide, mixer.num_heads
    keys, values = H * mixer.key_dim, H * mixer.value_dim
    total = batch.normed(width, 5) + M * a * (2 * keys + 4 * values)
    # The narrow middle of the map to decays; before and within the log-sigmoid; log decays.
    total += M * (a * mixer.decay.down.out_features + 3 * w * keys)
    return total + batch.states(H, mixer.key_dim, mixer.value_dim)


def _delta(mixer: Delta, width: int, batch: Batch) -> int:
    M, a, w, H = batch.total, batch.narrow, batch.wide, mixer.num_heads
    J, K, V, config = mixer.num_key_heads, mixer.key_dim, mixer.value_dim, mixer.config
    channels, rounded = 2 * J * K + H * V, a < w
    maps = 4 + (mixer.decay is not None) + (mixer.gate is not None)
    total = batch.normed(width, maps)
    # Before the convolution, with its halo, and after; the age of each token in its document.
    total += (M + batch.rows * (config.convolution - 1)) * channels * a + M * channels * a + 4 * M
    # Unit queries and keys: their widened operands and lengths, and what the core takes.
    total += M * (2 * J * K * w * rounded + 2 * J * w + 2 * H * K * a)
    total += 2 * M * H * w
    # The output with its gate, and both together.
    total += M * H * V * a * (3 if mixer.gate is not None else 2)
    for low_rank in (m for m in mixer.modules() if hasattr(m, "down")):
        total += M * low_rank.down.out_features * a
    decays = H if mixer.decay is None else mixer.decay.rate.bias.numel()
    total += H * w if mixer.decay is None else 3 * M * decays * w + 2 * H * w
    return total + batch.states(H, K, V)


def _mamba2(mixer: Mamba2, width: int, batch: Batch) -> int:
    M, a, w, H = batch.total, batch.narrow, batch.wide, mixer.num_heads
    channels, values, rounded = sum(mixer.sizes), mixer.sizes[0], a < w
    taps = mixer.convolve.weight.shape[-1]
    total = batch.normed(width, 1)
    total += (M + batch.rows * (taps - 1)) * channels * a + M * channels * a + 4 * M
    # Steps, for values and for decays, before and after their softplus; log decays, rates.
    total += 5 * M * H * w + 2 * H * w
    total += M * a * (2 * H * mixer.key_dim + values)
    # The raw gate: all that the first map gives, or its widened part.
    total += M * (values * w if rounded else (values + channels + H) * w)
    # Sum with the skip, gate, product, normed, and what the last map takes.
    total += 4 * M * values * w + M * values * a
    return total + batch.states(H, mixer.key_dim, mixer.value_dim)


def _feed_forward(mlp: nn.Module, width: int, batch: Batch) -> int:
    """Before and after the activation, the gated product; without a gate it takes fewer."""
    gated = isinstance(mlp, SwiGLU)
    hidden = mlp.up.out_features
    return batch.normed(width, 1 + gated) + batch.total * hidden * batch.narrow * (
        4 if gated else 2
    )


_FORMULAS: dict[type, Callable[[Any, int, Batch], int]] = {
    Softmax: _softmax,
    Linear: _linear,
    GLA: _gla,
    Delta: _delta,
    Mamba2: _mamba2,
}
