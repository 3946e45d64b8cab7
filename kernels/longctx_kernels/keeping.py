"""Results that a pass through a block leaves for the passes that repeat it.

Activation checkpointing runs a block once more before its gradients. What cost much, or was
exchanged, is asked for here: the first pass computes and keeps it, those that repeat it get it
back in the same order and compute nothing. Of two that are nested the outer one counts.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
_here = threading.local()


class Keeper:
    """What one pass through a block leaves; one that `keeps` nothing tells what repeats what."""

    def __init__(self, keeps: bool):
        self.keeps, self.is_repeating = keeps, False
        self._kept: list[Any] = []
        self._next = 0

    def passes(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """What the first pass runs in, and what every other one does."""
        return _Pass(self, False), _Pass(self, True)

    def recall(self, start: Callable[[], Callable[[], Result]]) -> Callable[[], Result]:
        """See `recalled_later`."""
        if not self.keeps:
            return start()
        place, self._next = self._next, self._next + 1
        if self.is_repeating:
            return lambda: _apart(self._kept[place])
        self._kept.append(None)
        with _inside(None):
            finish = start()

        def keep() -> Result:
            with _inside(None):
                result = finish()
            self._kept[place] = _apart(result)
            return result

        return keep


class _Pass:
    """A context that can be entered again."""

    def __init__(self, keeper: Keeper, is_repeating: bool):
        self._keeper, self._is_repeating = keeper, is_repeating
        self._before: list[Keeper | None] = []

    def __enter__(self) -> None:
        self._before.append(_current())
        self._keeper.is_repeating, self._keeper._next = self._is_repeating, 0
        _here.keeper = self._keeper

    def __exit__(self, *_error: Any) -> None:
        _here.keeper = self._before.pop()


def recalled(compute: Callable[[], Result]) -> Result:
    """What `compute` gives, without gradients; a pass that repeats another does not compute it."""
    return recalled_later(lambda: compute)()


def recalled_later(start: Callable[[], Callable[[], Result]]) -> Callable[[], Result]:
    """The same in two steps: `start` begins, and the call that it returns ends."""
    keeper = _current()
    return start() if keeper is None else keeper.recall(start)


def is_repeated() -> bool:
    """Whether this pass repeats another, whose output nobody will read."""
    keeper = None if torch.compiler.is_compiling() else _current()
    return keeper is not None and keeper.is_repeating


def _current() -> Keeper | None:
    return getattr(_here, "keeper", None)


@contextmanager
def _inside(keeper: Keeper | None) -> Iterator[None]:
    before, _here.keeper = _current(), keeper
    try:
        yield
    finally:
        _here.keeper = before


def _apart(result: Any) -> Any:
    """The same values in tensors that take part in no graph."""
    if isinstance(result, Tensor):
        return result.detach()
    if isinstance(result, tuple):
        parts = map(_apart, result)
        return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)
    if isinstance(result, list):
        return [_apart(part) for part in result]
    return result
