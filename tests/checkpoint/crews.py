"""Crews of threads, and checkpoints whose contents are known."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longctx.checkpoint import Address, Box, CheckpointConfig, Checkpoints, Crew

SECONDS = 20


class ThreadCrew:
    """One of several threads of this process that behave as processes."""

    def __init__(self, rank: int, slots: list[bytes], barrier: threading.Barrier):
        self.rank, self.size = rank, len(slots)
        self._slots, self._barrier = slots, barrier

    def gather(self, data: bytes) -> list[bytes]:
        self._slots[self.rank] = data
        self._barrier.wait(SECONDS)
        out = list(self._slots)
        self._barrier.wait(SECONDS)
        return out


def together(size: int, work: Callable[[Crew], Any]) -> list[Any]:
    """What `work` gave, or the exception it raised, in each thread of a crew."""
    slots, barrier = [b""] * size, threading.Barrier(size)
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadCrew(rank, slots, barrier))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def succeed(size: int, work: Callable[[Crew], Any]) -> list[Any]:
    """What `work` gave in each thread of a crew; raises if it failed in one."""
    results = together(size, work)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def tensors_of(step: int) -> dict[str, Tensor]:
    """Tensors of many types and shapes; they tell the step."""
    generator = torch.Generator().manual_seed(step)
    matrix = torch.randn(7, 5, generator=generator)
    return {
        "model/matrix": matrix,
        "model/half": matrix.bfloat16(),
        "model/cube": torch.randn(2, 6, 3, generator=generator, dtype=torch.float64),
        "model/few": torch.randn(2, generator=generator),
        "model/mask": matrix > 0,
        "model/empty": torch.zeros(0, 4),
        "model/scalar": torch.tensor(float(step)),
        "optimizer/matrix/step": torch.tensor(step),
        "optimizer/matrix/exp_avg": matrix.T.contiguous(),
        "random/0/cpu": torch.randint(256, (77,), generator=generator, dtype=torch.uint8),
    }


def split(tensors: dict[str, Tensor], rank: int, world: int, dim: int = 0) -> list[Box]:
    """This rank's uneven rows (or another dimension) of each tensor, as views of the whole."""
    boxes = []
    for index, (name, tensor) in enumerate(tensors.items()):
        if tensor.ndim == 0:
            if index % world == rank:
                boxes.append(Box(name, (), (), tensor))
            continue
        cut = min(dim, tensor.ndim - 1)
        size = tensor.shape[cut]
        start, stop = (-(-size * r // world) for r in (rank, rank + 1))
        offsets = tuple(start if d == cut else 0 for d in range(tensor.ndim))
        boxes.append(
            Box(name, tuple(tensor.shape), offsets, tensor.narrow(cut, start, stop - start))
        )
    return boxes


def state_of(step: int) -> dict[str, Any]:
    return {"tokens": 10 * step, "config": {"run": {"seed": 0}}}


def save(folder: Address, step: int, world: int = 1, dim: int = 0, **config: Any) -> None:
    """Saves the checkpoint whose contents `tensors_of(step)` gives."""

    def work(crew: Crew) -> None:
        checkpoints = Checkpoints(folder, CheckpointConfig(**({"keep": 9} | config)), crew)
        boxes = split(tensors_of(step), crew.rank, world, dim)
        checkpoints.save(step, boxes, state_of(step), wait=True)

    succeed(world, work)


def bytes_under(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
