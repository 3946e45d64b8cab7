"""Processes that speak about checkpoints, beside the training and never in its way."""

from datetime import timedelta

import torch
import torch.distributed as dist

from longctx.errors import OutsideError


class GlooCrew:
    """All processes, in a gloo group of their own; one thread at a time may use it.

    Training goes on in other groups meanwhile: in a common one, both would take each other's
    messages. `timeout_seconds` covers the time that the slowest process takes to write its file.
    """

    def __init__(self, timeout_seconds: int):
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        self.rank: int = dist.get_rank()
        self.size: int = dist.get_world_size()

    def gather(self, data: bytes) -> list[bytes]:
        """What each process gave, in order of ranks; waits for all of them."""
        try:
            lengths = self._all_gather(torch.tensor([len(data)]))
            padded = torch.zeros(max(map(int, lengths)), dtype=torch.uint8)
            if data:
                padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            gathered = self._all_gather(padded)
        except RuntimeError as error:
            raise OutsideError(
                f"a process was lost while all spoke about a checkpoint: {error}"
            ) from error
        return [x[: int(n)].numpy().tobytes() for x, n in zip(gathered, lengths)]

    def _all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        out = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(out, x, group=self._group)
        return out
