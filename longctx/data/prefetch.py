"""Batches that a thread reads while the model computes."""

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from longctx.data.loader import Batch

Segments = Sequence[tuple[int, int]]
PATIENCE = 1.0
"""Seconds to wait for a thread to end."""


class Reader(Protocol):
    """What a `Loader` is to a prefetcher."""

    def read(self, ids: Sequence[int], segments: Segments) -> Batch:
        """These segments of these sequences."""
        ...


class Prefetch:
    """Reads the micro-batches of a schedule in its order, `ahead` of them before they are asked
    for; with 0 each when it is asked for, without a thread.

    The thread sleeps while it is ahead. It is a daemon and holds nothing that must be closed, so a
    process may end at any moment.
    """

    def __init__(
        self,
        loader: Reader,
        schedule: Iterable[Sequence[int]],
        segments: Segments,
        ahead: int,
        pin: bool = False,
    ) -> None:
        """`pin` puts tensors into memory that a GPU copies from while it computes."""
        self._loader, self._schedule = loader, iter(schedule)
        self._segments, self._ahead, self._pin = segments, ahead, pin
        self._ready: deque[Batch | BaseException] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._waited = 0.0
        self._thread = threading.Thread(target=self._work, name="read ahead", daemon=True)
        if ahead:
            self._thread.start()

    def next(self) -> Batch:
        """The next micro-batch; an error of the thread comes here, again and again, after the
        batches that it had read. StopIteration at the end of the schedule."""
        started = time.perf_counter()
        try:
            found = self._take() if self._ahead else self._read()
        finally:
            self._waited += time.perf_counter() - started
        if isinstance(found, BaseException):
            raise found
        return found

    def __iter__(self) -> Iterator[Batch]:
        while True:
            try:
                yield self.next()
            except StopIteration:
                return

    def take_waited(self) -> float:
        """Seconds that `next` has taken since this was last asked."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        """Ends the thread, which at most finishes the micro-batch it is reading. Waits for it, but
        not long: a process aborts if a thread wakes up while Python ends."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(PATIENCE)

    def _take(self) -> Batch | BaseException:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._closed)
            if self._closed:
                raise ValueError("the prefetcher is closed")
            if isinstance(self._ready[0], BaseException):
                return self._ready[0]
            found = self._ready.popleft()
            self._changed.notify_all()
            return found

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._ready) < self._ahead or self._closed)
                if self._closed:
                    return
            try:
                found: Batch | BaseException = self._read()
            except BaseException as error:
                found = error
            with self._changed:
                if not self._closed:
                    self._ready.append(found)
                    self._changed.notify_all()
            if isinstance(found, BaseException):
                return

    def _read(self) -> Batch:
        batch = self._loader.read(next(self._schedule), self._segments)
        if not self._pin:
            return batch
        tokens, labels = batch.tokens_BT.pin_memory(), batch.labels_BT.pin_memory()
        return replace(batch, tokens_BT=tokens, labels_BT=labels)
