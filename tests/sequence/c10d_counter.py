"""Counts calls and received bytes at torch.distributed's process groups, without our ledger.

Whoever exchanges from Python, on whatever thread, calls a method of a ProcessGroup: these are
watched, and what is not known here is refused. What C++ starts by itself shows in a profile only.
"""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

from longctx.sequence.ledger import Traffic

Group = dist.ProcessGroup


def bytes_in(x: Tensor) -> int:
    return x.numel() * x.element_size()


class C10dCounter:
    """While it is entered, every exchange through c10d is counted from the sizes of its tensors.

    Sends and receives of a batch are one call.
    """

    def __init__(self) -> None:
        self._calls = self._received = self._messages = 0
        self._lock = threading.Lock()
        self._here = threading.local()
        self._patches: list[Any] = []

    def total(self) -> Traffic:
        """Calls, and bytes that came from other ranks."""
        return Traffic(self._calls, self._received)

    @property
    def messages(self) -> int:
        """Calls, of a batch every one."""
        return self._messages

    def __enter__(self) -> "C10dCounter":
        for name, bytes_of in KNOWN.items():
            if hasattr(Group, name):
                self._patch(Group, name, self._counting(getattr(Group, name), bytes_of))
        for name in UNKNOWN:
            if hasattr(Group, name):
                self._patch(Group, name, refused(name))
        self._patch(dist, "batch_isend_irecv", self._as_one(dist.batch_isend_irecv))
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self._patches:
            patch.stop()

    def _patch(self, owner: Any, name: str, new: Callable[..., Any]) -> None:
        self._patches.append(mock.patch.object(owner, name, new))
        self._patches[-1].start()

    def _add(self, calls: int, messages: int, received: int) -> None:
        with self._lock:  # chains run on threads of their own
            self._calls += calls
            self._messages += messages
            self._received += received

    def _counting(self, function: Callable[..., Any], bytes_of: Callable[..., int]) -> Any:
        def call(group: Group, *arguments: Any, **options: Any) -> Any:
            is_apart = not getattr(self._here, "is_in_batch", False)
            self._add(int(is_apart), 1, bytes_of(group, *arguments))
            return function(group, *arguments, **options)

        return call

    def _as_one(self, function: Callable[..., Any]) -> Any:
        def call(operations: list[Any]) -> Any:
            self._add(1, 0, 0)
            self._here.is_in_batch = True
            try:
                return function(operations)
            finally:
                self._here.is_in_batch = False

        return call


@contextmanager
def profiled_messages() -> Iterator[list[int]]:
    """Fills in how many exchanges PyTorch's profiler has seen, on all threads, C++'s own too."""
    found: list[int] = []
    everywhere = _ExperimentalConfig(profile_all_threads=True)
    with profile(activities=[ProfilerActivity.CPU], experimental_config=everywhere) as seen:
        yield found
    # What `seen.events()` makes of them takes seconds.
    assert seen.profiler is not None
    events = seen.profiler.kineto_results.events()
    found.append(sum(event.name().startswith("c10d::") for event in events))


def refused(name: str) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise AssertionError(f"ProcessGroup.{name} is not counted")

    return call


def gathered(_: Group, out: Tensor, own: Tensor, *__: Any) -> int:
    """Everything but the own part."""
    return bytes_in(out) - bytes_in(own)


def scattered(_: Group, out: Tensor, whole: Tensor, *__: Any) -> int:
    """One part of each other rank."""
    return bytes_in(whole) - bytes_in(out)


def traded(group: Group, out: Tensor, _: Tensor, arriving: list[int], *__: Any) -> int:
    """All parts that arrive but the own one."""
    return bytes_in(out) - arriving[group.rank()] * out.element_size()


def reduced(group: Group, tensors: list[Tensor], *_: Any) -> int:
    """A reduce-scatter and an all-gather of equal shares."""
    (x,) = tensors
    return 2 * (group.size() - 1) * math.ceil(x.numel() / group.size()) * x.element_size()


def received(_: Group, tensors: list[Tensor], *__: Any) -> int:
    """What is received point to point."""
    return sum(map(bytes_in, tensors))


def sent(*_: Any) -> int:
    """Nothing arrives."""
    return 0


KNOWN = {
    "all_gather_single": gathered,
    "_allgather_base": gathered,
    "reduce_scatter_single": scattered,
    "_reduce_scatter_base": scattered,
    "all_to_all_single": traded,
    "alltoall_base": traded,
    "allreduce": reduced,
    "recv": received,
    "send": sent,
}
"""Methods by name, with the bytes that each brings in; torch 2.13 renamed some."""
UNKNOWN = (
    "all_gather_single_coalesced",
    "allgather",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce_coalesced",
    "alltoall",
    "barrier",
    "broadcast",
    "gather",
    "monitored_barrier",
    "recv_anysource",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced",
    "scatter",
)
"""What training does not use."""
SILENT = {"abort", "bound_device_id", "boxed", "unbox"}
