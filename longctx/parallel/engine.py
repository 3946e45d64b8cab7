"""Engines: who holds weights and optimizer state, adds up gradients, and makes the update."""

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longctx.errors import InputError
from longctx.parallel.box import Box, model_tensors
from longctx.parallel.mesh import Mesh
from longctx.parallel.shares import Cut
from longctx.parallel.tensor_parallel import TensorSplit
from longctx.parallel.update_norm import UpdateNorm

Read = Callable[[str, tuple[int, ...], tuple[int, ...]], Tensor]
"""The block of a saved tensor, by name, offsets and shape."""
CLIP_EPS = 1e-6


@dataclass(frozen=True)
class Part:
    """What this process holds of a tensor, and how many processes hold the same."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    local: Tensor
    blocks: Sequence[tuple[tuple[int, ...], Tensor]]
    """Offsets in the whole, and views of `local`."""
    copies: int
    copy: int
    """Which of them this process is."""

    def boxes(self, name: str) -> list[Box]:
        """What this process writes of it; the copies take turns by name."""
        if zlib.crc32(name.encode()) % self.copies != self.copy:
            return []
        return [Box(name, self.shape, where, x) for where, x in self.blocks if x.numel()]

    @torch.no_grad()
    def load(self, read: Read, name: str) -> None:
        """Takes what a checkpoint has of it."""
        for offsets, block in self.blocks:
            if block.numel():
                block.copy_(read(name, offsets, tuple(block.shape)))


class Engine(ABC):
    """A model and its optimizer on one of the processes of a run."""

    model: nn.Module
    """What computes losses; its parameters may be spread over processes."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of this process's share of the loss of a micro-batch."""

    @abstractmethod
    def gradient_norm(self) -> Tensor:
        """Sums gradients over processes; the norm of the result, equal on all of them."""

    @abstractmethod
    def update(self, lr: float) -> Tensor:
        """Changes the weights and forgets the gradients; an estimate of the change's norm."""

    @abstractmethod
    def discard(self) -> None:
        """Forgets the gradients."""

    @abstractmethod
    def weights(self) -> dict[str, Part]:
        """Parameters and persistent buffers under the first of their names."""

    @abstractmethod
    def boxes(self) -> list[Box]:
        """Weights and optimizer state that this process writes into a checkpoint."""

    @abstractmethod
    def load(self, read: Read, names: Iterable[str], weights_only: bool) -> None:
        """Takes weights, and unless told otherwise optimizer state, from a checkpoint."""

    @abstractmethod
    def replicas(self) -> list[list[int]]:
        """Groups of ranks whose weights must be equal, bit for bit."""


class TorchEngine(Engine):
    """A model whose parameters have gradients, and a PyTorch optimizer."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        clip_norm: float,
        mesh: Mesh,
        split: TensorSplit | None = None,
    ):
        self.model, self.optimizer, self.mesh, self.split = model, optimizer, mesh, split
        self._clip_norm = clip_norm or math.inf
        self._norm = torch.zeros(())
        parts = {name: self.part(name, p.detach()) for name, p in model.named_parameters()}
        self._shares = {name: 1 / part.copies for name, part in parts.items()}
        own = [part.local for part in parts.values()]
        self._update_norm = UpdateNorm(own, list(self._shares.values()))

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def gradient_norm(self) -> Tensor:
        if self.split:
            self.split.sum_partial(self.model.named_parameters())
        self._sum_gradients()
        self._norm = self._measure()
        return self._norm

    def update(self, lr: float) -> Tensor:
        scale = (self._clip_norm / (self._norm + CLIP_EPS)).clamp(max=1.0)
        gradients = [self._local(g) for _, g in self._gradients()]
        torch._foreach_mul_(gradients, scale.to(gradients[0].device))
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_share"]
        self._update_norm.before()
        self.optimizer.step()
        self.discard()
        return self._total(self._update_norm.squared(), "update norm").sqrt()

    def discard(self) -> None:
        self.optimizer.zero_grad()

    @abstractmethod
    def _sum_gradients(self) -> None: ...

    @abstractmethod
    def _local(self, tensor: Tensor) -> Tensor:
        """What lies here of a tensor that is spread like a parameter."""

    @abstractmethod
    def _offset(self, tensor: Tensor) -> int:
        """Where along its first dimension that starts, among processes with other tokens."""

    @abstractmethod
    def _copies(self, tensor: Tensor) -> tuple[int, int]:
        """How many of those hold the same, and which of them this process is."""

    def _measure(self) -> Tensor:
        named = [(name, self._local(gradient)) for name, gradient in self._gradients()]
        norms = torch.stack(torch._foreach_norm([x for _, x in named]))
        shares = norms.new_tensor([self._shares[name] for name, _ in named])
        return self._total((norms.square() * shares).sum(), "gradient norm").sqrt()

    def _total(self, square: Tensor, name: str) -> Tensor:
        """Sum over processes, of which the copies of a part have counted a share each."""
        return self.mesh.sum_over_all(square.to(self.mesh.device), name)

    def _gradients(self) -> Iterator[tuple[str, Tensor]]:
        return ((n, p.grad) for n, p in self.model.named_parameters() if p.grad is not None)

    def part(self, name: str, tensor: Tensor) -> Part:
        """What is here of a parameter, its gradient or its optimizer state."""
        cut = self.split.cuts[name] if self.split else Cut(tuple(tensor.shape))
        local, (copies, copy) = self._local(tensor), self._copies(tensor)
        offsets = (self._offset(tensor),) * bool(tensor.dim()) + (0,) * (tensor.dim() - 1)
        if self.split:
            same = self.split.copies(name)
            copies, copy = copies * same, copy * same + (self.mesh.tp_rank if same > 1 else 0)
        return Part(cut.shape, local, cut.blocks(offsets, local), copies, copy)

    def weights(self) -> dict[str, Part]:
        return {name: self.part(name, tensor) for name, tensor in model_tensors(self.model).items()}

    def boxes(self) -> list[Box]:
        parts = {f"model/{name}": part for name, part in self.weights().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                parts[f"optimizer/{name}/{key}"] = self._state_part(name, value, parameter)
        return [box for name, part in parts.items() for box in part.boxes(name)]

    def load(self, read: Read, names: Iterable[str], weights_only: bool) -> None:
        for name, part in self.weights().items():
            part.load(read, f"model/{name}")
        if weights_only:
            return
        parameters, keys = dict(self.model.named_parameters()), state_keys(names)
        if strange := keys.keys() - parameters.keys():
            raise InputError(
                f"the checkpoint has optimizer state of {min(strange)}, which the model lacks; "
                "use the [model] and [optim] tables it was trained with"
            )
        self.optimizer.state.clear()
        for name, parameter in parameters.items():
            for key in keys.get(name, ()):
                value = self._empty_state(key, parameter)
                part = self._state_part(name, value, parameter)
                part.load(read, f"optimizer/{name}/{key}")
                self.optimizer.state[parameter][key] = value

    def _state_part(self, name: str, value: Tensor, parameter: nn.Parameter) -> Part:
        if value.shape == parameter.shape and parameter.dim():
            return self.part(name, value)
        none = (0,) * value.dim()
        mesh = self.mesh
        return Part(tuple(value.shape), value, [(none, value)], mesh.size, mesh.rank)

    def _empty_state(self, key: str, parameter: nn.Parameter) -> Tensor:
        if key == "step":
            return torch.zeros((), device=parameter.device)
        return torch.zeros_like(parameter.detach())


def state_keys(names: Iterable[str]) -> dict[str, list[str]]:
    """Keys of the optimizer's state, by parameter."""
    keys: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.startswith("optimizer/"):
            parameter, _, key = name.removeprefix("optimizer/").rpartition("/")
            keys.setdefault(parameter, []).append(key)
    return keys


class Replicated(TorchEngine):
    """All processes with different tokens hold the same."""

    def _sum_gradients(self) -> None:
        self.mesh.sum_gradients([gradient for _, gradient in self._gradients()])

    def _measure(self) -> Tensor:
        if self.split:
            return super()._measure()
        return nn.utils.get_total_norm([gradient for _, gradient in self._gradients()])

    def _total(self, square: Tensor, name: str) -> Tensor:
        return super()._total(square, name) if self.split else square * self.mesh.size

    def _local(self, tensor: Tensor) -> Tensor:
        return tensor

    def _offset(self, tensor: Tensor) -> int:
        return 0

    def _copies(self, tensor: Tensor) -> tuple[int, int]:
        return self.mesh.data_size, self.mesh.data_rank

    def replicas(self) -> list[list[int]]:
        size, tp = self.mesh.size, self.mesh.split.tp
        return [list(range(t, size, tp)) for t in range(tp)]
