"""The sum of several mixers of the same input: dense heads beside routed ones, say.

Gates, if there are any, are a softmax over the parts times their number, so that untrained ones
keep the plain sum.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longctx.errors import InputError
from longctx.mixers.base import Backend, Mixer, MixerConfig, Place
from longctx.sequence.expected import Expected, Share, combined
from longctx.sequence.local import LocalView
from longctx.sequence.sharded import Transports
from longctx.sequence.view import SequenceView


@dataclass(frozen=True, kw_only=True)
class SumConfig(MixerConfig, kind="sum"):
    """Adds the outputs of mixers."""

    parts: dict[str, MixerConfig]
    """The mixers by names of your choice."""
    gated: bool = False
    """Each token weighs the parts."""

    def build(self, place: Place) -> "Sum":
        return Sum(self, place)

    def check(self, width: int, where: str) -> None:
        if len(self.parts) < 2:
            raise InputError(f"{where}.parts has {len(self.parts)}: give two mixers or more")
        for name, part in self.parts.items():
            if hasattr(nn.ModuleDict, name):
                raise InputError(f"{where}.parts.{name}: is a name of PyTorch's; choose another")
            part.check(width, f"{where}.parts.{name}")

    def check_length(self, seq_len: int, where: str) -> None:
        for name, part in self.parts.items():
            part.check_length(seq_len, f"{where}.parts.{name}")

    def check_device(self, device: torch.device) -> None:
        for part in self.parts.values():
            part.check_device(device)

    def on(self, backend: Backend) -> "SumConfig":
        return replace(self, parts={name: part.on(backend) for name, part in self.parts.items()})

    def over_tp(self, width: int, tp: int) -> "SumConfig":
        parts = {name: part.over_tp(width, tp) for name, part in self.parts.items()}
        return replace(self, parts=parts)

    def tp_refusal(self, tp: int) -> str:
        return _first((name, part.tp_refusal(tp)) for name, part in self.parts.items())

    def refusal(self, transports: Transports) -> str:
        return _first((name, part.refusal(transports)) for name, part in self.parts.items())

    def verbs(self) -> frozenset[str]:
        return frozenset().union(*(part.verbs() for part in self.parts.values()))


def _first(reasons: Iterable[tuple[str, str]]) -> str:
    """The first reason of a part, with its name."""
    return next((f"parts.{name}.{reason}" for name, reason in reasons if reason), "")


class Summands(NamedTuple):
    """What each part needs, in order, and the gates."""

    parts: tuple[Any, ...]
    gate_BTE: Tensor | None


class Sum(Mixer):
    """See the module's docstring. Its core gives what those of the parts do, as a tuple."""

    has_heads = False

    def __init__(self, config: SumConfig, place: Place):
        super().__init__()
        self.parts = nn.ModuleDict({n: part.build(place) for n, part in config.parts.items()})
        self.num_heads = sum(part.num_heads for _, part in self._named())
        self.causal_selection = all(part.causal_selection for _, part in self._named())
        self.gate = nn.Linear(place.width, len(self.parts), bias=False) if config.gated else None

    def _named(self) -> Iterator[tuple[str, Mixer]]:
        for name, part in self.parts.items():
            assert isinstance(part, Mixer)
            yield name, part

    def _each(self, projected: Summands) -> Iterator[tuple[str, Mixer, Any]]:
        for (name, part), own in zip(self._named(), projected.parts):
            yield name, part, own

    def project(self, x_BTD: Tensor, view: SequenceView) -> Summands:
        # A copy each, whose gradients are added in one go: in the same order by a compiler.
        copies = len(self.parts) + (self.gate is not None)
        x_EBTD = x_BTD.expand(copies, *x_BTD.shape).unbind()
        parts = tuple(part.project(x, view) for (_, part), x in zip(self._named(), x_EBTD))
        return Summands(parts, self._gates(x_EBTD[-1]))

    def core(self, projected: Summands, view: SequenceView) -> Any:
        return tuple(part.core(own, view) for _, part, own in self._each(projected))

    def core_reference(self, projected: Summands, view: LocalView) -> Any:
        return tuple(part.core_reference(own, view) for _, part, own in self._each(projected))

    def step(self, x_BTD: Tensor, view: LocalView, memory: Any) -> tuple[Tensor, Any]:
        memories = memory or (None,) * len(self.parts)
        pairs = zip(self._named(), memories)
        outs, after = zip(*(part.step(x_BTD, view, before) for (_, part), before in pairs))
        return self._total(outs, self._gates(x_BTD)), after

    def advance(self, projected: Summands, memory: Any) -> tuple[Any, Any]:
        raise TypeError("each part takes a step by itself")

    def read(self, y_parts: Any, projected: Summands) -> Tensor:
        """`[B, T, D]`."""
        named = zip(y_parts, self._each(projected))
        outs = [part.output(part.read(y, own)) for y, (_, part, own) in named]
        return self._total(outs, projected.gate_BTE)

    def _gates(self, x_BTD: Tensor) -> Tensor | None:
        return None if self.gate is None else len(self.parts) * self.gate(x_BTD).softmax(-1)

    def _total(self, outs: Sequence[Tensor], gate_BTE: Tensor | None) -> Tensor:
        if gate_BTE is not None:
            gates = gate_BTE.unbind(-1)
            outs = [out * gate[..., None].to(out.dtype) for out, gate in zip(outs, gates)]
        return torch.stack(tuple(outs)).sum(0)

    def output(self, y_BTD: Tensor) -> Tensor:
        return y_BTD

    def losses(self, projected: Summands, view: SequenceView) -> dict[str, Tensor]:
        """Those of parts; of the same name, added."""
        total: dict[str, Tensor] = {}
        for _, part, own in self._each(projected):
            for name, loss in part.losses(own, view).items():
                total[name] = total[name] + loss if name in total else loss
        return total

    def statistics(self, projected: Summands, view: SequenceView) -> dict[str, Tensor]:
        sums = {
            f"{name}/{key}": value
            for name, part, own in self._each(projected)
            for key, value in part.statistics(own, view).items()
        }
        if projected.gate_BTE is not None:
            wide = torch.promote_types(projected.gate_BTE.dtype, torch.float32)
            sums["gate"] = projected.gate_BTE.to(wide).sum((0, 1))
        return sums

    def adapt(self, sums: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """What parts tell, by `NAME/FIGURE`, and the mean gate of each."""
        figures = {"gate": sums["gate"] / tokens} if "gate" in sums else {}
        for name, part in self._named():
            prefix = f"{name}/"
            own = {key.removeprefix(prefix): x for key, x in sums.items() if key.startswith(prefix)}
            found = part.adapt(own, tokens) if own else {}
            figures |= {prefix + key: figure for key, figure in found.items()}
        return figures

    def core_flops(self, contexts_M: Tensor) -> int:
        return sum(part.core_flops(contexts_M) for _, part in self._named())

    def flops(self, contexts_M: Tensor) -> int:
        gates = 0 if self.gate is None else 2 * self.gate.weight.numel() * contexts_M.numel()
        return gates + sum(part.flops(contexts_M) for _, part in self._named())

    def expected_traffic(self, share: Share) -> Expected:
        return combined(part.expected_traffic(share) for _, part in self._named())
