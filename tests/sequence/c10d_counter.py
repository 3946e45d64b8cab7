"""Counts calls and received bytes at torch.distributed's own functions, without our ledger."""

import math
import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from longctx.sequence import c10d
from longctx.sequence.ledger import Traffic


def bytes_in(x: Tensor) -> int:
    return x.numel() * x.element_size()


class C10dCounter:
    """While it is entered, every exchange through c10d is counted from the sizes of its tensors."""

    def __init__(self) -> None:
        self._calls = self._received = 0
        self._lock = threading.Lock()
        self._patches: list[Any] = []

    def total(self) -> Traffic:
        """Calls, and bytes that came from other ranks."""
        return Traffic(self._calls, self._received)

    def __enter__(self) -> "C10dCounter":
        watched = [
            (c10d, "all_gather_flat", gathered),
            (c10d, "reduce_scatter_flat", scattered),
            (dist, "all_to_all_single", traded),
            (dist, "all_reduce", reduced),
            (dist, "batch_isend_irecv", received),
        ]
        for owner, name, bytes_of in watched:
            counting = self._counting(getattr(owner, name), bytes_of)
            self._patches.append(mock.patch.object(owner, name, counting))
            self._patches[-1].start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self._patches:
            patch.stop()

    def _counting(self, function: Callable[..., Any], bytes_of: Callable[..., int]) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            ranks = dist.get_world_size(options.get("group"))
            me = dist.get_rank(options.get("group"))
            with self._lock:  # chains run on threads of their own
                self._calls += 1
                self._received += bytes_of(arguments, ranks, me)
            return function(*arguments, **options)

        return call


def gathered(arguments: tuple, ranks: int, _: int) -> int:
    """Everything but the own part."""
    out, own = arguments
    assert out.numel() == ranks * own.numel()
    return bytes_in(out) - bytes_in(own)


def scattered(arguments: tuple, ranks: int, _: int) -> int:
    """One part of each other rank."""
    out, whole = arguments
    assert whole.numel() == ranks * out.numel()
    return bytes_in(whole) - bytes_in(out)


def traded(arguments: tuple, _: int, me: int) -> int:
    """All parts that arrive but the own one."""
    out, _, arriving, _ = arguments
    return bytes_in(out) - arriving[me] * out.element_size()


def reduced(arguments: tuple, ranks: int, _: int) -> int:
    """A reduce-scatter and an all-gather of equal shares."""
    (x,) = arguments
    return 2 * (ranks - 1) * math.ceil(x.numel() / ranks) * x.element_size()


def received(arguments: tuple, *_: int) -> int:
    """What is received point to point."""
    (operations,) = arguments
    return sum(bytes_in(o.tensor) for o in operations if o.op is dist.irecv)
