"""What remains usable when processes hang: torch's record of exchanges, and a board for notes.

Neither needs a working process group.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist


def recorded_exchanges() -> str:
    """The last exchanges of this process as JSON, with the stacks that began them."""
    dump: Callable[[], bytes] | None = getattr(
        torch._C._distributed_c10d, "_dump_fr_trace_json", None
    )
    if dump is None:
        return "this build of torch records no exchanges"
    try:
        return dump().decode(errors="replace")
    except RuntimeError as error:
        return f"torch's record of exchanges cannot be read: {error}"


class Board:
    """Short notes, one of each process, that others can read without exchanging anything.

    They lie in the store through which the processes found each other. One thread uses a board. If
    the process that holds the store is frozen, a call never returns; if it is gone, a call raises
    RuntimeError.
    """

    def __init__(self, topic: str) -> None:
        self._topic = topic
        self._store = dist.distributed_c10d._get_default_store().clone()

    def post(self, rank: int, note: str) -> None:
        """Leaves the note of a process."""
        self._store.set(self._key(rank), note)

    def read(self, rank: int) -> str | None:
        """The note of a process, or None if it left none."""
        if not self._store.check([self._key(rank)]):
            return None
        return self._store.get(self._key(rank)).decode()

    def _key(self, rank: int) -> str:
        return f"longctx/{self._topic}/{rank}"
