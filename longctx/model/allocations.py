"""Counts the memory that tensors take, whoever holds them."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class Allocations(TorchDispatchMode):
    """Sees every tensor that is made while it is in force, on whichever device, also on meta."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        """Bytes of the largest of them."""
        self._known: set[int] = set()
        self._made: list[tuple[StorageWeakRef, int]] = []
        # What was there before is held, so that no other memory gets its number.
        self._foreign: list[StorageWeakRef] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        for storage in _storages((args, tuple((kwargs or {}).values()))):
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self._foreign.append(StorageWeakRef(storage))
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self._made.append((StorageWeakRef(storage), storage.nbytes()))
                self.largest = max(self.largest, storage.nbytes())
        return result

    def alive(self) -> int:
        """Bytes of those that somebody still holds."""
        return sum(size for reference, size in self._made if not reference.expired())


def _storages(values: Any) -> Iterator[Any]:
    """Of tensors in what an operator takes or gives."""
    if isinstance(values, Tensor):
        yield values.untyped_storage()
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _storages(value)
