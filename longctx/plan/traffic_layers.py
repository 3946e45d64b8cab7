"""What one process has of a layer, built without memory, and what a layer reports in every step."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn

from longctx.mixers import Mixer, Place
from longctx.mixers.base import RMSNorm
from longctx.mixers.compact_parts import BINS
from longctx.mixers.lte import LTE
from longctx.mixers.moh import MoH
from longctx.mixers.mosa import Mosa
from longctx.mixers.nats import NATS
from longctx.mixers.routing import Routing
from longctx.mixers.sum import Sum
from longctx.model.block import Block
from longctx.model.decoder import ModelConfig, build_block
from longctx.model.matrices import HiddenMatrix, hidden_matrices
from longctx.model.memory import MemoryConfig
from longctx.parallel.shares import share
from longctx.sequence.compact import DISTANCES
from longctx.sequence.expected import Expected, Share

Shapes = tuple[tuple[int, ...], ...]


class Seat(NamedTuple):
    """Which of the processes that share heads."""

    part: int
    parts: int


class Reported(NamedTuple):
    """What mixers add to the metrics of a step."""

    losses: frozenset[str] = frozenset()
    statistics: int = 0
    """Numbers, not tensors."""

    def and_those(self, other: "Reported") -> "Reported":
        """Of both."""
        return Reported(self.losses | other.losses, self.statistics + other.statistics)


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer of which this process has some heads and hidden columns, or all."""

    mixer: Mixer | None
    has_mlp: bool
    shapes: Shapes
    """Of the parameters here."""
    partial: Shapes
    """Of those that are whole, of whose gradients each process finds a part."""
    shared_norms: int
    """Norms over the heads of all processes."""
    reported: Reported
    matrices: tuple[tuple[HiddenMatrix, int | None], ...]
    """Those that Muon changes, whole, and the dimension that they are cut along."""

    def expected(self, share: Share) -> Expected:
        """What its mixer exchanges in a forward and a backward pass; {} where nobody shares."""
        if self.mixer is None or share.placement.ranks == 1:
            return {}
        return expected_of(self.mixer, share)


@lru_cache(maxsize=1024)
def expected_of(mixer: Mixer, share: Share) -> Expected:
    """What a mixer exchanges with others in a forward and a backward pass."""
    return mixer.expected_traffic(share)


def layers_of(model: ModelConfig, seat: Seat) -> dict[str, Layer]:
    """By letter of the pattern."""
    return {letter: _known(model, letter, seat) for letter in dict.fromkeys(model.letters)}


_KNOWN: dict[str, Layer] = {}
MOST_KNOWN = 256


def _known(model: ModelConfig, letter: str, seat: Seat) -> Layer:
    """Layers are built once, as far as configs can be told apart by what they print."""
    sizes = model.width, model.mlp, model.mlp_hidden, letter in model.without_mlp, model.backend
    key = repr((model.mixers.get(letter), model.depth, sizes, seat))
    if key not in _KNOWN:
        if len(_KNOWN) >= MOST_KNOWN:
            _KNOWN.clear()
        _KNOWN[key] = _built(model, letter, seat)
    return _KNOWN[key]


def _built(model: ModelConfig, letter: str, seat: Seat) -> Layer:
    place = Place(model.width, model.letters.index(letter), model.depth, *seat)
    with torch.device("meta"):
        block = build_block(model, place.layer, MemoryConfig())
        mixer = block.mixer
        if mixer is not None and seat.parts > 1:
            config: Any = model.mixers[letter].on(model.backend)
            mixer = config.over_tp(model.width, seat.parts).build(place)
    mlp = _shared_mlp(block, seat)
    shapes = [*_norms(block), *mlp.values()]
    if mixer is None:
        return Layer(None, True, tuple(shapes), (), 0, Reported(), _matrices(block, mlp))
    assert block.mixer is not None
    whole = {name: p.shape for name, p in block.mixer.named_parameters()}
    own = {name: tuple(p.shape) for name, p in mixer.named_parameters()}
    same = tuple(shape for name, shape in own.items() if shape == whole[name])
    norms = [name for name, m in mixer.named_modules() if isinstance(m, RMSNorm)]
    return Layer(
        mixer,
        block.mlp is not None,
        (*shapes, *own.values()),
        same if seat.parts > 1 else (),
        sum(own[f"{name}.weight"] != whole[f"{name}.weight"] for name in norms),
        reported(mixer),
        _matrices(block, mlp | {f"mixer.{name}": shape for name, shape in own.items()}),
    )


def _matrices(
    block: Block, own: dict[str, tuple[int, ...]]
) -> tuple[tuple[HiddenMatrix, int | None], ...]:
    """Given the shapes that this process has of them."""
    found = []
    for name, matrix in hidden_matrices(block).items():
        cut = [d for d, (a, b) in enumerate(zip(matrix.shape, own[name], strict=True)) if a != b]
        found.append((matrix, cut[0] if cut else None))
    return tuple(found)


def _norms(block: Block) -> list[tuple[int, ...]]:
    """Of a block's own norms, which all processes have whole."""
    found = (getattr(block, name, None) for name in ("mixer_norm", "mlp_norm"))
    return [tuple(norm.weight.shape) for norm in found if norm is not None]


def _shared_mlp(block: Block, seat: Seat) -> dict[str, tuple[int, ...]]:
    """Of a feed-forward layer, of which each process has some hidden columns, by name."""
    shapes = {}
    for name, parameter in block.mlp.named_parameters() if block.mlp is not None else ():
        shape = list(parameter.shape)
        dim = 1 if name == "project_out.weight" else 0
        shape[dim] = share(shape[dim], *seat)[1]
        shapes[f"mlp.{name}"] = tuple(shape)
    return shapes


def reported(mixer: nn.Module) -> Reported:
    """Names of a mixer's losses, and how many numbers its statistics are."""
    match mixer:
        case MoH():
            own = Reported(frozenset({"balance"}), mixer.routed_heads + 1)
            return own.and_those(reported(mixer.inner))
        case Sum():
            total = Reported(statistics=len(mixer.parts) if mixer.gate is not None else 0)
            for part in mixer.parts.values():
                total = total.and_those(reported(part))
            return total
        case Routing():
            lanes = mixer.num_heads * mixer.config.clusters
            return Reported(frozenset({"commitment"}), lanes * (mixer.size + 1) + 1)
        case NATS():
            return Reported(frozenset({"roles"}), 3 * mixer.num_kv_heads)
        case LTE():
            return Reported(frozenset({"eviction"}), mixer.num_kv_heads + 1)
        case Mosa():
            return _of_mosa(mixer)
    kind = type(mixer)
    overrides = [
        getattr(kind, name) is not getattr(Mixer, name) for name in ("losses", "statistics")
    ]
    if any(overrides):
        raise TypeError(f"{kind.__name__} reports what longctx.plan.traffic_layers does not know")
    return Reported()


def _of_mosa(mixer: Mosa) -> Reported:
    H, selection = mixer.num_heads, mixer.config.selection
    losses = frozenset({"balance"} if selection == "token_choice" else ())
    wanted = H * mixer.causal_selection
    histogram = H * BINS if selection == "threshold" else 0
    return Reported(losses, H + 1 + DISTANCES + wanted + histogram)
