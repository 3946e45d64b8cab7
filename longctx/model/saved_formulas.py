"""What mixers keep for their backward pass, each by a formula of its own."""

from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from longctx.mixers.delta import Delta
from longctx.mixers.gla import GLA
from longctx.mixers.linear import Linear
from longctx.mixers.lte import LTE
from longctx.mixers.mamba2 import Mamba2
from longctx.mixers.moh import MoH
from longctx.mixers.nsa import NSA
from longctx.mixers.parts import GatedNorm, LowRank
from longctx.mixers.softmax import Softmax
from longctx.mixers.titans import Titans
from longctx.model.in_flight import Batch
from longctx.model.saved_cores import (
    Heads,
    Saved,
    attending,
    convolved,
    correcting,
    decaying,
    is_traded,
    recurrent_heads,
)
from longctx.model.saved_sparse import selecting, surviving

Formula = Callable[[Any, int, Batch], Saved]
"""Of a mixer, the model's width and a batch; the input of the layer is not counted."""


def formula_of(mixer: nn.Module) -> Formula | None:
    """The formula that knows all of a mixer's settings, if one does."""
    config: Any = getattr(mixer, "config", None)
    if isinstance(mixer, Linear):
        is_known = config.feature_map == "silu" and config.norm != "simple"
        is_known = is_known and not mixer.has_sum and mixer.lrpe is None
    elif isinstance(mixer, Delta):
        is_known = mixer.convolve is not None and not getattr(mixer.decay, "lowest", 0)
    elif isinstance(mixer, Titans):
        is_known = mixer.convolve is not None
    elif isinstance(mixer, (LTE, NSA)):
        is_known = config.reuses == "nothing"
    elif isinstance(mixer, MoH):
        is_known = isinstance(mixer.inner, Softmax) and config.compute == "dense"
        is_known = is_known and config.router == "learned"
    else:
        is_known = not (isinstance(mixer, GLA) and mixer.shift is not None)
    return _FORMULAS.get(type(mixer)) if is_known else None


def _softmax(mixer: Softmax, width: int, batch: Batch, is_weighed: bool = False) -> Saved:
    config, M, a, w = mixer.config, batch.total, batch.narrow, batch.wide
    H, J, K = mixer.num_heads, mixer.num_kv_heads, mixer.size
    own_keys = 0 if config.reuses == "keys and values" else 1
    own_values = 1 if config.reuses == "nothing" else 0
    maps = 1 + own_keys + own_values + (config.gate != "none")
    total = batch.normed(width, maps)
    # Before the norms of queries and keys; sines and cosines of either.
    total += M * a * (H * K + own_keys * J * K if config.qk_norm else 0)
    turned = int(config.rope_fraction * K) // 2
    total += M * w * 2 * turned * (1 + own_keys)
    total += 2 * M * H * K * a if config.gate != "none" else 0
    if batch.split is None:
        # Keys and values of another layer, which several lay out for themselves.
        total -= M * J * K * a * (2 - own_keys - own_values)
    is_read = config.gate == "none" and not is_weighed
    reader: Literal["map", "gate"] = "map" if is_read else "gate"
    core = attending(batch, Heads(H, J, K, K), config.window, reader)
    return core.plus(Saved(none=total))


def _moh(mixer: MoH, width: int, batch: Batch) -> Saved:
    config, M, a, w = mixer.config, batch.total, batch.narrow, batch.wide
    E, S, inner = mixer.routed_heads, config.shared_heads, mixer.inner
    maps = 1 + (S > 0) + (S > 1)
    total = M * width * a * maps if a < w else 0
    # Probabilities, which are chosen, their weights before the division; its divisor; weights after
    # it, which without shared heads are rounded.
    weights = w if config.router_noise else a
    total += M * (weights * (3 * E + 1) + (weights if S else a) * E)
    if S:
        # How the groups are weighed, before and after the 2; shared gates alike; all gates.
        total += M * a * (2 * 2 + (2 * S if S > 1 else 1) + S + E)
    # What the last map takes; means.
    total += M * mixer.num_heads * inner.sizes.value_dim * a + 2 * E * w
    means = 2 * E * w if batch.split else 0
    return _softmax(inner, width, batch, is_weighed=True).plus(Saved(0, means, total))


def _linear(mixer: Linear, width: int, batch: Batch) -> Saved:
    M, a, w, H = batch.total, batch.narrow, batch.wide, mixer.num_heads
    keys, values = H * mixer.features, H * mixer.value_size
    total = batch.normed(width, 3 + (mixer.gate is not None))
    # Queries and keys, and maybe values, before and after silu; what the last map takes.
    total += M * a * (4 * keys + 2 * values + values * (mixer.config.value_map == "silu"))
    # The core's output and the gate, which the norm of a head reads together. Otherwise a sigmoid
    # needs its result alone, silu what it took.
    steps = {"none": 0, "sigmoid": 2, "swish": 3}[mixer.config.gate]
    if isinstance(mixer.norm, GatedNorm):
        steps = 1 + (mixer.gate is not None)
    elif mixer.norm is not None:
        steps += 1
    total += M * a * values * steps
    total += recurrent_heads(batch, H) * w if mixer.log_decay_H is None else 0
    core = decaying(batch, Heads(H, H, mixer.features, mixer.value_size), 0)
    return core.plus(Saved(none=total))


def _gla(mixer: GLA, width: int, batch: Batch) -> Saved:
    M, a, w, H = batch.total, batch.narrow, batch.wide, mixer.num_heads
    keys, values = H * mixer.key_dim, H * mixer.value_dim
    total = batch.normed(width, 5) + M * a * (2 * keys + 4 * values)
    # The narrow middle of the map to decays; before and within the log-sigmoid; log decays.
    total += M * (a * mixer.decay.down.out_features + 3 * w * keys)
    core = decaying(batch, Heads(H, H, mixer.key_dim, mixer.value_dim), mixer.gate_size)
    return core.plus(Saved(none=total))


def _delta(mixer: Delta, width: int, batch: Batch) -> Saved:
    M, a, w, H = batch.total, batch.narrow, batch.wide, mixer.num_heads
    J, K, V, config = mixer.num_key_heads, mixer.key_dim, mixer.value_dim, mixer.config
    rounded = a < w
    maps = 4 + (mixer.decay is not None) + (mixer.gate is not None)
    total = batch.normed(width, maps)
    # Unit queries and keys: their widened operands and lengths, and what the core takes.
    total += M * (2 * J * K * w * rounded + 2 * J * w + 2 * H * K * a)
    total += 2 * M * H * w
    # The output with its gate, and both together.
    total += M * H * V * a * (3 if mixer.gate is not None else 2)
    total += sum(M * m.down.out_features * a for m in mixer.modules() if isinstance(m, LowRank))
    decays = H if mixer.decay is None else mixer.decay.rate.bias.numel()
    no_decay = recurrent_heads(batch, H) * w
    total += no_decay if mixer.decay is None else 3 * M * decays * w + 2 * H * w
    core = correcting(batch, Heads(H, H, K, V), K).plus(Saved(none=total))
    is_held = not (rounded and is_traded(batch))
    return core.plus(convolved(batch, 2 * J * K + H * V, config.convolution, is_held))


def _titans(mixer: Titans, width: int, batch: Batch) -> Saved:
    M, a, w, H, K = batch.total, batch.narrow, batch.wide, mixer.num_heads, mixer.key_dim
    rounded, window = a < w, mixer.attention is not None
    total = batch.normed(width, 7 if window else 5)
    # Unit queries and keys: their widened operands and lengths, and what the core takes.
    total += M * (2 * H * K * w * rounded + 2 * H * w + 2 * H * K * a)
    # Three gates; the step; of keeping the sum with its bias, and of both logarithms a table and
    # the result. A traded step is another.
    total += M * H * w * (3 + 1 + 3 + 2 + is_traded(batch))
    # What the last map takes; the memory's answer, with its gate or with what attention reads.
    total += M * H * K * a * (1 + 2)
    core = correcting(batch, Heads(H, H, K, K), 2 * K)
    if window:
        # Before the norms of queries and keys, and after rotation; the memory's answer, normed.
        total += M * H * K * a * (2 + 1) + M * w * 2 * 2 * (K // 2)
        config = mixer.config
        size = Heads(H, H, K, K)
        core = core.plus(attending(batch, size, config.window, "copy", config.persistent))
    is_held = not (rounded and is_traded(batch))
    convolution = convolved(batch, 3 * H * K, mixer.config.convolution, is_held)
    return core.plus(convolution).plus(Saved(none=total))


def _mamba2(mixer: Mamba2, width: int, batch: Batch) -> Saved:
    M, a, w, H = batch.total, batch.narrow, batch.wide, mixer.num_heads
    channels, values, rounded = sum(mixer.sizes), mixer.sizes[0], a < w
    total = batch.normed(width, 1)
    # Steps, for values and for decays, before and after their softplus; log decays, rates.
    total += 5 * M * H * w + 2 * H * w
    total += M * a * (2 * H * mixer.key_dim + values)
    # The raw gate: all that the first map gives, or its widened part.
    total += M * (values * w if rounded else (values + channels + H) * w)
    # Sum with the skip, gate, product, normed, and what the last map takes.
    total += 4 * M * values * w + M * values * a
    core = decaying(batch, Heads(H, H, mixer.key_dim, mixer.value_dim), mixer.gate_size)
    taps = mixer.convolve.weight.shape[-1]
    return core.plus(convolved(batch, channels, taps, True)).plus(Saved(none=total))


_FORMULAS: dict[type, Formula] = {
    Softmax: _softmax,
    Linear: _linear,
    GLA: _gla,
    Delta: _delta,
    Mamba2: _mamba2,
    Titans: _titans,
    LTE: surviving,
    MoH: _moh,
    NSA: selecting,
}
