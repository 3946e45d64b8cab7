"""How fast the processes of a run reach one another, measured by messages."""

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from statistics import median
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from longctx.errors import OutsideError
from longctx.parallel.rendezvous import join
from longctx.sequence.c10d import all_gather_flat

Result = TypeVar("Result")
MIB = 2**20
SMALL, SMALL_TIMES = 8, 30
LARGE, LARGE_TIMES = {"cpu": 4 * MIB, "cuda": 64 * MIB}, 5
GATHERED = {"cpu": (MIB // 16, MIB, 8 * MIB), "cuda": (MIB, 16 * MIB, 128 * MIB)}
"""Bytes of each process in an all-gather, and of an all-reduce."""
MOST_GATHERED = {"cpu": 512 * MIB, "cuda": 8192 * MIB}
"""Bytes that a process gathers at most, except in the smallest."""
WARM_UP = 2
CLOCK_TIMES = 5
PATIENCE = timedelta(minutes=10)
"""For others that measure, on top of the time that a message may take."""


class LinkTime(NamedTuple):
    """What a message between two processes takes, one way: medians."""

    latency: float
    """Seconds of the smallest."""
    bandwidth: float
    """Bytes a second of a large one."""


class CollectiveTime(NamedTuple):
    """What all processes take together."""

    verb: str
    size: int
    """Bytes that each process gives."""
    seconds: float
    bandwidth: float
    """Bytes a second that a process receives, as a ring would bring them."""


def as_line(error: Exception) -> str:
    """What it says, or what it is."""
    return " ".join(str(error).split()) or type(error).__name__


class Peers:
    """All processes that a launcher started, for as long as they are measured."""

    def __init__(self, device: torch.device, timeout_seconds: int):
        self.device = device
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=timeout_seconds)
        join(backend, timeout, "--timeout_seconds")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # Processes that failed, and others that waited for them, meet in a group of their own.
        self._control = self._group("gloo", timeout + PATIENCE)
        _, errors = self.together(self._take_device)
        if errors:
            raise OutsideError(errors[0])
        self._measured = self._group(None, timeout)

    def _group(self, backend: str | None, timeout: timedelta) -> Any:
        try:
            return dist.new_group(backend=backend, timeout=timeout)
        except RuntimeError as error:
            raise OutsideError(
                f"rank {self.rank}: a process stopped answering ({as_line(error)})"
            ) from error

    def _take_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, in order of ranks; waits for all of them."""
        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value, group=self._control)
        except RuntimeError as error:
            raise OutsideError(
                f"rank {self.rank}: a process stopped answering ({as_line(error)})"
            ) from error
        return values

    def together(self, work: Callable[[], Result]) -> tuple[list[Result], list[str]]:
        """What each process makes of some work, and how it failed where it did, first ones first:
        others fail later, of waiting for them."""
        result, failure, start = None, (0.0, ""), time.perf_counter()
        try:
            result = work()
        except Exception as error:
            failure = time.perf_counter() - start, f"rank {self.rank}: {as_line(error)}"
        answers = self.gather((result, failure))
        return [answer for answer, _ in answers], [t for _, t in sorted(f for _, f in answers) if t]

    def links(self, pairs: Sequence[tuple[int, int]]) -> dict[tuple[int, int], LinkTime]:
        """Of these pairs of ranks, one after another, so that none disturbs another.

        A process knows those of pairs of which it is the first.
        """
        found = {}
        for first, second in pairs:
            self._wait()
            if self.rank in (first, second):
                times = [self._one_way(first, second, *each) for each in self._messages()]
                if self.rank == first:
                    moving = max(times[1] - times[0], 1e-9)
                    found[first, second] = LinkTime(times[0], self._messages()[1][0] / moving)
        self._wait()
        return found

    def _messages(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (SMALL, SMALL_TIMES), (LARGE[self.device.type], LARGE_TIMES)

    def _one_way(self, first: int, second: int, size: int, times: int) -> float:
        x = torch.zeros(size, dtype=torch.uint8, device=self.device)
        other = second if self.rank == first else first

        def there_and_back() -> None:
            for action in (dist.send, dist.recv) if self.rank == first else (dist.recv, dist.send):
                action(x, other, group=self._measured)

        return median(self._seconds(there_and_back, times)) / 2

    def _seconds(self, work: Callable[[], Any], times: int) -> list[float]:
        found = []
        for _ in range(WARM_UP + times):
            start = time.perf_counter()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            found.append(time.perf_counter() - start)
        return found[WARM_UP:]

    def collectives(self) -> list[CollectiveTime]:
        """All-gather and all-reduce by size, as this process sees them."""
        return [
            self._collective(verb, size)
            for size in self._sizes()
            for verb in ("all-gather", "all-reduce")
        ]

    def _sizes(self) -> list[int]:
        """Of all, the smallest, and those that every process can hold of all."""
        smallest, *others = GATHERED[self.device.type]
        return [smallest, *(n for n in others if n * self.size <= MOST_GATHERED[self.device.type])]

    def _collective(self, verb: str, size: int) -> CollectiveTime:
        own = torch.zeros(size // 4, device=self.device)
        every = own.new_empty(self.size * own.numel())
        received = self.size - 1.0 if verb == "all-gather" else 2 * (self.size - 1) / self.size

        def work() -> None:
            if verb == "all-gather":
                all_gather_flat(every, own, group=self._measured)
            else:
                dist.all_reduce(own, group=self._measured)

        self._wait()
        seconds = median(self._seconds(work, LARGE_TIMES))
        return CollectiveTime(verb, size, seconds, received * size / seconds)

    def clocks(self) -> list[float]:
        """On rank 0: by how many seconds the clock of each rank is ahead of its own."""
        ahead = [0.0]
        x = torch.zeros(1, dtype=torch.float64)
        for other in range(1, self.size):
            if self.rank == other:
                for _ in range(CLOCK_TIMES):
                    dist.recv(x, 0, group=self._measured)
                    now = torch.tensor([time.time()], dtype=torch.float64)
                    dist.send(now, 0, group=self._measured)
            elif self.rank == 0:
                found = []
                for _ in range(CLOCK_TIMES):
                    start = time.time()
                    dist.send(x, other, group=self._measured)
                    dist.recv(x, other, group=self._measured)
                    end = time.time()
                    found.append((end - start, float(x) - (start + end) / 2))
                ahead.append(min(found)[1])
        return ahead

    def _wait(self) -> None:
        dist.all_reduce(torch.zeros(1), group=self._measured)

    def close(self) -> None:
        """Leaves the group."""
        dist.destroy_process_group()
