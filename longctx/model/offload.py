"""Inputs of checkpointed layers wait in host memory until their backward pass."""

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

IN_FLIGHT = 2
"""Copies to the host that may be under way; older ones are waited for."""


class Copier(Protocol):
    """Starts copies between a device and its host; each call that they return waits for one."""

    def to_host(self, x: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """A copy on the host."""
        ...

    def to_device(self, x: Tensor, like: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """A copy where `like`, which has no elements, lies."""
        ...


class CudaCopier:
    """Copies by pinned memory on a stream of their own."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)

    def to_host(self, x: Tensor) -> tuple[Tensor, Callable[[], None]]:
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        return host, self._copy(host, x)

    def to_device(self, x: Tensor, like: Tensor) -> tuple[Tensor, Callable[[], None]]:
        # Made on the stream that will use it, so that its memory may be given out again there.
        device = torch.empty(x.shape, dtype=x.dtype, device=like.device)
        return device, self._copy(device, x)

    def _copy(self, to: Tensor, source: Tensor) -> Callable[[], None]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
            done = self._stream.record_event()
        return lambda: torch.cuda.current_stream().wait_event(done)


class _Leaving(NamedTuple):
    """Holds a tensor until its copy is made."""

    tensor: Tensor
    wait: Callable[[], None]


class _Waiting:
    """One input on the host."""

    def __init__(self, host: Tensor, like: Tensor):
        self.host, self.like = host, like
        self.under_way: tuple[Tensor, Callable[[], None]] | None = None

    def fetch(self, copier: Copier) -> None:
        """Starts the way back, once."""
        if self.under_way is None:
            self.under_way = copier.to_device(self.host, self.like)


class WaitingRoom:
    """The inputs of one forward pass, in order of layers."""

    def __init__(self, copier: Copier):
        self._copier = copier
        self._waiting: list[_Waiting | None] = []
        self._leaving: deque[_Leaving] = deque()

    def hooks(self, x: Tensor) -> saved_tensors_hooks:
        """While these are in force, what is saved of `x` goes to the host; the rest stays."""

        def pack(saved: Tensor) -> Any:
            return self._leave(saved) if saved.data_ptr() == x.data_ptr() else saved

        def unpack(kept: Any) -> Tensor:
            return kept if isinstance(kept, Tensor) else self._returned(kept)

        return saved_tensors_hooks(pack, unpack)

    def _leave(self, x: Tensor) -> int:
        host, wait = self._copier.to_host(x)
        self._leaving.append(_Leaving(x, wait))
        while len(self._leaving) > IN_FLIGHT:
            self._leaving.popleft().wait()
        self._waiting.append(_Waiting(host, x.new_empty(0)))
        return len(self._waiting) - 1

    def _returned(self, place: int) -> Tensor:
        """The input of a layer; that of the layer before it starts on its way back."""
        while self._leaving:
            self._leaving.popleft().wait()
        found = self._waiting[place]
        assert found is not None
        found.fetch(self._copier)
        before = self._waiting[place - 1] if place else None
        if before is not None:
            before.fetch(self._copier)
        assert found.under_way is not None
        tensor, wait = found.under_way
        found.under_way = None
        wait()
        return tensor


def waiting_room(device: torch.device, copier: Copier | None = None) -> WaitingRoom | None:
    """A room for a forward pass on this device; None where the host is the device."""
    if copier is None and device.type != "cuda":
        return None
    return WaitingRoom(copier or CudaCopier(device))
