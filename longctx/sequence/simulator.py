"""Ranks as threads of one process, for tests: messages pass through queues in memory."""

import queue
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from longctx.sequence.communicator import Communicator, Pending, Shape
from longctx.sequence.ledger import Label, Ledger

SECONDS_TO_WAIT = 60.0


class Hub:
    """The wires between the ranks of one simulation."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wires: dict[Any, queue.SimpleQueue[Tensor]] = defaultdict(queue.SimpleQueue)

    def wire(self, *key: Any) -> "queue.SimpleQueue[Tensor]":
        """The queue of one channel from one rank to another."""
        with self._lock:
            return self._wires[key]


class SimulatedCommunicator(Communicator):
    """A member of a group of threads; `ranks` are the members' numbers in the hub."""

    def __init__(self, hub: Hub, channel: str, ranks: Sequence[int], me: int, ledger: Ledger):
        super().__init__(list(ranks).index(me), len(ranks), ledger)
        self._hub, self._channel, self._ranks = hub, channel, tuple(ranks)
        self._count: Counter[tuple[str, int, int]] = Counter()

    def _post(self, rank: int, x: Tensor) -> None:
        self._wire("sent", self.rank, rank).put(
            x.detach().clone(memory_format=torch.contiguous_format)
        )

    def _expect(self, rank: int, label: Label) -> Callable[[], Tensor]:
        """Messages match by the order of calls on both sides, not by that of waiting."""
        wire = self._wire("received", rank, self.rank)

        def take() -> Tensor:
            try:
                return wire.get(timeout=SECONDS_TO_WAIT)
            except queue.Empty:
                raise RuntimeError(f"rank {self.rank} waits for rank {rank} in {label}") from None

        return take

    def _wire(self, side: str, source: int, to: int) -> "queue.SimpleQueue[Tensor]":
        self._count[side, source, to] += 1
        number = self._count[side, source, to]
        return self._hub.wire(self._channel, self._ranks, source, to, number)

    def _from_all(self, label: Label) -> Callable[[], list[Tensor]]:
        expected = [self._expect(rank, label) for rank in range(self.size)]
        return lambda: [take() for take in expected]

    def _all_gather(self, flat: Tensor, label: Label) -> Pending:
        for rank in range(self.size):
            self._post(rank, flat)
        return Pending(self._from_all(label))

    def _reduce_scatter(self, flat_PN: Tensor, label: Label) -> Pending:
        for rank in range(self.size):
            self._post(rank, flat_PN[rank])
        arriving = self._from_all(label)
        return Pending(lambda: [torch.stack(arriving()).sum(0)])

    def _all_to_all(self, parts: Sequence[Tensor], sizes: list[int], label: Label) -> Pending:
        for rank, part in enumerate(parts):
            self._post(rank, part)
        return Pending(self._from_all(label))

    def _all_reduce(self, x: Tensor, label: Label) -> Tensor:
        for rank in range(self.size):
            self._post(rank, x)
        return torch.stack(self._from_all(label)()).sum(0)

    def _exchange(
        self,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Shape]],
        like: Tensor,
        label: Label,
    ) -> Pending:
        for rank, x in sends:
            self._post(rank, x)
        expected = [(self._expect(rank, label), shape) for rank, shape in receives]
        return Pending(lambda: [take().view(shape) for take, shape in expected])


def run_ranks(size: int, work: Callable[[int, Hub], Any]) -> list[Any]:
    """Calls `work(rank, hub)` on `size` threads; their results, or the first error."""
    hub, results, errors = Hub(), [None] * size, []

    def call(rank: int) -> None:
        try:
            results[rank] = work(rank, hub)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(r,), daemon=True) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive() and not errors:
            thread.join(0.05)
    if errors:
        raise errors[0]
    return results
