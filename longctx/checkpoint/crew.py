"""The processes that write or read one checkpoint together."""

from typing import Protocol


class Crew(Protocol):
    """Processes that speak to each other in the same order; one thread at a time may use it."""

    rank: int
    """Number of this process."""
    size: int
    """How many there are."""

    def gather(self, data: bytes) -> list[bytes]:
        """What each process gave, in order of ranks; waits for all of them."""
        ...


class Solo:
    """The crew of one process."""

    rank, size = 0, 1

    def gather(self, data: bytes) -> list[bytes]:
        """What this process gave."""
        return [data]
