"""The contract of a mixer, and the legend of shape letters used in the whole repository.

B batch, T local tokens, G global tokens, S segments, C chunk, H heads, J key heads, K key dim,
V value dim, D model width, E routed items, P ranks.

A mixer is `project -> core -> read -> output`. Only `core` mixes tokens, and it does so through
the view. `core_reference` is the same map written token by token: the definition.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self

import torch
from longctx_kernels.keeping import is_repeated
from longctx_kernels.launch import backend_of
from longctx_kernels.norm_gate import norm_gate
from torch import Tensor, nn

from longctx.config import Registered
from longctx.errors import InputError
from longctx.sequence.expected import Expected, Share
from longctx.sequence.local import ContinuedView, LocalView
from longctx.sequence.sharded import Transports
from longctx.sequence.view import SequenceView

Backend = Literal["auto", "torch", "triton", "fla"]
MOST_STATE_MIB = 32


@dataclass(frozen=True)
class Place:
    """Where in the model a mixer stands."""

    width: int
    layer: int
    depth: int
    part: int = 0
    """Which share of the heads it has, of `parts` equal ones; its config is of one share."""
    parts: int = 1


class Mixed(NamedTuple):
    """What a mixer returns: its output, weighted losses to add to the model's, and sums over own
    tokens that its routers are adapted and watched by."""

    out: Tensor
    losses: dict[str, Tensor]
    statistics: dict[str, Tensor]


@dataclass(frozen=True)
class MixerConfig(Registered):
    """Base of all `[model.mixers.X]` tables; a subclass registers with `kind=`."""

    def build(self, place: Place) -> "Mixer":
        """The module this table describes, for one layer."""
        raise NotImplementedError

    def check(self, width: int, where: str) -> None:
        """Raises InputError, naming fields below `where`, if this cannot be built."""
        raise NotImplementedError

    def refusal(self, transports: Transports) -> str:
        """Why this cannot use `transports`, beginning with a field's name; empty if it can."""
        return ""

    def over_tp(self, width: int, tp: int) -> Self:
        """One of `tp` equal shares of this layer's heads, whose outputs add up to the layer's."""
        raise NotImplementedError

    def tp_refusal(self, tp: int) -> str:
        """Why `tp` processes cannot share its heads, beginning with a field's name; empty if they
        can."""
        return f"kind = {self.kind!r} does not say how: set parallel.tp to 1"

    def on(self, backend: Backend) -> Self:
        """The same table; what leaves the choice to the model computes with `backend`."""
        return self

    def check_device(self, device: torch.device) -> None:
        """Raises ValueError, naming what computes, if that cannot be done on `device`."""

    def check_length(self, seq_len: int, where: str) -> None:
        """Raises InputError if sequences are too short for this."""

    def verbs(self) -> frozenset[str]:
        """What its core asks of the view: prefix, stream, halo, reduce."""
        raise NotImplementedError


@dataclass(frozen=True)
class HeadsConfig(MixerConfig):
    """Base of mixers that are made of equal heads."""

    num_heads: int = 8
    """Query heads."""
    head_dim: int = 0
    """Key and query size of a head; 0 means model.width / num_heads."""
    backend: Literal["model", "auto", "torch", "triton", "fla"] = "model"
    """Who computes the core; model takes model.backend."""

    def on(self, backend: Backend) -> Self:
        return replace(self, backend=backend) if self.backend == "model" else self

    @property
    def computes_with(self) -> str:
        """The backend, also of a mixer that stands in no model."""
        return "auto" if self.backend == "model" else self.backend

    def check_device(self, device: torch.device) -> None:
        backend_of(torch.empty(0, device=device), self.computes_with)

    def check(self, width: int, where: str) -> None:
        if self.num_heads < 1:
            raise InputError(f"{where}.num_heads = {self.num_heads}: must be at least 1")
        if self.head_dim < 0:
            raise InputError(f"{where}.head_dim = {self.head_dim}: must be 0 or positive")
        if self.head_dim == 0 and width % self.num_heads:
            raise InputError(
                f"{where}.num_heads = {self.num_heads} does not divide model.width = {width}; "
                "change one of them or set head_dim"
            )

    def check_positive(self, where: str, *names: str) -> None:
        """Raises InputError unless these fields are at least 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise InputError(f"{where}.{name} = {getattr(self, name)}: must be at least 1")

    def check_window(self, window: int, seq_len: int, where: str) -> None:
        """Raises InputError if the field `window` is longer than sequences are."""
        if window > seq_len:
            raise InputError(
                f"{where}.window = {window} is longer than train.seq_len = {seq_len}: shorten it"
            )

    def size_of_head(self, width: int) -> int:
        """Key and query size of a head."""
        return self.head_dim or width // self.num_heads

    def refusal(self, transports: Transports) -> str:
        return indivisible("num_heads", self.num_heads, "heads", transports.heads)

    def over_tp(self, width: int, tp: int) -> Self:
        return replace(self, num_heads=self.num_heads // tp, head_dim=self.size_of_head(width))

    def tp_refusal(self, tp: int) -> str:
        return indivisible("num_heads", self.num_heads, "tp", tp)


def indivisible(name: str, count: int, field: str, group: int) -> str:
    """Why `count` heads cannot be dealt out by parallel.`field` = `group`; empty if they can."""
    if count % group == 0:
        return ""
    possible = [str(n) for n in range(1, count + 1) if count % n == 0]
    choice = f"{', '.join(possible[:-1])} or {possible[-1]}" if len(possible) > 1 else "1"
    return (
        f"{name} = {count} is no multiple of parallel.{field} = {group}: "
        f"set parallel.{field} to {choice}"
    )


@dataclass(frozen=True)
class StateConfig(HeadsConfig):
    """Base of mixers that remember what came before in a state of each head."""

    def verbs(self) -> frozenset[str]:
        return frozenset({"prefix"})

    def refusal(self, transports: Transports) -> str:
        if transports.prefix == "ulysses":
            return super().refusal(transports)
        if self.backend == "fla":
            return "backend = 'fla' cannot split a sequence: choose auto, or prefix 'ulysses'"
        return ""

    def check_state(self, key_dim: int, value_dim: int, field: str) -> None:
        """Raises InputError, naming `field`, if a state is too large to be sent around."""
        mib = self.num_heads * key_dim * value_dim * 4 / 2**20
        if mib > MOST_STATE_MIB:
            raise InputError(
                f"{field} = {key_dim}: states of {self.num_heads} heads x {key_dim} x {value_dim} "
                f"take {mib:.0f} MiB for each layer and sequence, more than {MOST_STATE_MIB}; "
                "make heads smaller, or take fewer"
            )


@dataclass(frozen=True)
class ValueConfig(StateConfig):
    """Base of those whose values have a size of their own."""

    value_dim: int = 0
    """Value size of a head; 0 means model.width / num_heads, or head_dim if that is set."""

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        if self.value_dim < 0:
            raise InputError(f"{where}.value_dim = {self.value_dim}: must be 0 or positive")

    def over_tp(self, width: int, tp: int) -> Self:
        size = self.value_dim or self.size_of_head(width)
        return replace(super().over_tp(width, tp), value_dim=size)


class Mixer(nn.Module, ABC):
    """A token mixer with heads; forward returns Mixed.

    A model draws its matrices. A module whose parameters start otherwise has a method
    `initial(name, generator)` that returns a parameter's first value, or None.
    """

    num_heads: int
    causal_selection: bool = True
    """False if which tokens take part at i can depend on tokens after i."""
    has_heads: bool = True
    """Whether core gives an output of each head for each token."""

    @abstractmethod
    def project(self, x_BTD: Tensor, view: SequenceView) -> Any:
        """Per-token tensors that core and read need, as a NamedTuple."""

    @abstractmethod
    def core(self, projected: Any, view: SequenceView) -> Tensor:
        """Mixes tokens: `[B, T, H, V]`, or what `read` makes `[B, T, D]` of by itself."""

    @abstractmethod
    def core_reference(self, projected: Any, view: LocalView) -> Tensor:
        """The same, token by token and in plain operations."""

    @abstractmethod
    def advance(self, projected: Any, memory: Any) -> tuple[Tensor, Any]:
        """Core for tokens that follow a `memory` (None at first), for generation."""

    @abstractmethod
    def output(self, y_BTHV: Tensor) -> Tensor:
        """Heads back to width."""

    @abstractmethod
    def core_flops(self, contexts_M: Tensor) -> int:
        """Forward FLOPs of core_reference over tokens that have `contexts_M` tokens of their
        document up to and with themselves."""

    @abstractmethod
    def expected_traffic(self, share: Share) -> Expected:
        """What core and losses exchange on one rank, in one forward and one backward pass."""

    def read(self, y_BTHV: Tensor, projected: Any) -> Tensor:
        """Per-head norm and gate after the core."""
        return y_BTHV

    def losses(self, projected: Any, view: SequenceView) -> dict[str, Tensor]:
        """Weighted losses by name, each over all tokens of the view; of a share of the heads, what
        has the layer's as its mean over shares."""
        return {}

    def stretches(self) -> dict[str, tuple[int, ...]]:
        """Of parameters that are several side by side, by name, the sizes of these in the first
        dimension: shares of heads have a share of each."""
        return {}

    def statistics(self, projected: Any, view: SequenceView) -> dict[str, Tensor]:
        """Sums over own tokens, by name and without gradients, of what `adapt` needs to know."""
        return {}

    def adapt(self, sums: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """After a step of training, given `statistics` summed over its `tokens` tokens on all
        ranks: may change buffers; returns figures for the log."""
        return {}

    def forward(self, x_BTD: Tensor, view: SequenceView | None = None) -> Mixed:
        """Mixes `x`; without a view every row is one document."""
        view = view or LocalView.whole(x_BTD.shape[0], x_BTD.shape[1], x_BTD.device)
        projected = self.project(x_BTD, view)
        return self._finished(self.core(projected, view), projected, view)

    def reference(self, x_BTD: Tensor, view: LocalView | None = None) -> Mixed:
        """The same through core_reference."""
        view = view or LocalView.whole(x_BTD.shape[0], x_BTD.shape[1], x_BTD.device)
        projected = self.project(x_BTD, view)
        return self._finished(self.core_reference(projected, view), projected, view)

    def _finished(self, y_BTHV: Tensor, projected: Any, view: SequenceView) -> Mixed:
        """What is made of the core's result; statistics only in training."""
        out_BTD, losses = self.output(self.read(y_BTHV, projected)), self.losses(projected, view)
        if not self.training or is_repeated():
            return Mixed(out_BTD, losses, {})
        with torch.no_grad():
            return Mixed(out_BTD, losses, self.statistics(projected, view))

    def step(self, x_BTD: Tensor, view: LocalView, memory: Any) -> tuple[Tensor, Any]:
        """Continues a sequence: output for its next tokens, and the memory after them.

        The memory is what tokens to come see of their neighbours, and that of the core.
        """
        neighbours, core_memory = memory or ((), None)
        view = ContinuedView(view, neighbours)
        projected = self.project(x_BTD, view)
        y_BTHV, core_memory = self.advance(projected, core_memory)
        return self.output(self.read(y_BTHV, projected)), (view.kept, core_memory)

    def flops(self, contexts_M: Tensor) -> int:
        """Forward FLOPs of projections and core; what a kernel does beyond that does not count."""
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 2 * weights * contexts_M.numel() + self.core_flops(contexts_M)


def split_heads(x_BTM: Tensor, num_heads: int) -> Tensor:
    """`[B, T, H * D]` to `[B, T, H, D]`."""
    return x_BTM.unflatten(-1, (num_heads, -1))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in at least fp32."""

    mean_over_parts: Callable[[Tensor], Tensor] | None = None
    """Set where `x` is one of several equal parts of what is normalised together."""

    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalised `x` in the dtype of `x`."""
        if self.mean_over_parts is None:
            return norm_gate(x, weight_V=self.weight, eps=self.eps, activation="none")
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = self.mean_over_parts(wide.square().mean(-1, keepdim=True))
        return (wide * torch.rsqrt(mean + self.eps) * self.weight).to(x.dtype)
