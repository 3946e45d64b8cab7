"""What the verbs need of a group of ranks, whatever carries it.

Two carriers implement it: torch.distributed, and threads of one process for tests. Every call is
recorded in the ledger with the bytes that it brings in from other ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longctx.sequence.ledger import Label, Ledger

Shape = tuple[int, ...]


class Pending:
    """An exchange under way."""

    def __init__(self, finish: Callable[[], list[Tensor]]):
        self._finish = finish

    def wait(self) -> list[Tensor]:
        """What arrived; call once."""
        return self._finish()


class Communicator(ABC):
    """A group of ranks, of which this is one."""

    def __init__(self, rank: int, size: int, ledger: Ledger):
        self.rank, self.size, self.ledger = rank, size, ledger

    def all_gather(self, x: Tensor, label: Label, shapes: Sequence[Shape] | None = None) -> Pending:
        """Everybody's `x`, in order of ranks. Unequal shapes travel padded to the largest."""
        shapes = shapes or [tuple(x.shape)] * self.size
        numel = max(torch.Size(shape).numel() for shape in shapes)
        self.ledger.record(label, (self.size - 1) * numel * x.element_size())
        flat = torch.zeros(numel, dtype=x.dtype, device=x.device)
        flat[: x.numel()] = x.reshape(-1)
        pending = self._all_gather(flat, label)

        def finish() -> list[Tensor]:
            return [
                part[: torch.Size(shape).numel()].view(shape)
                for part, shape in zip(pending.wait(), shapes)
            ]

        return Pending(finish)

    def reduce_scatter(self, parts: Sequence[Tensor], label: Label) -> Pending:
        """Sum over ranks of the part meant for this one. Unequal parts travel padded."""
        numel = max(part.numel() for part in parts)
        own = parts[self.rank]
        self.ledger.record(label, (self.size - 1) * numel * own.element_size())
        flat = torch.zeros(self.size, numel, dtype=own.dtype, device=own.device)
        for row, part in zip(flat, parts):
            row[: part.numel()] = part.reshape(-1)
        pending = self._reduce_scatter(flat, label)
        return Pending(lambda: [pending.wait()[0][: own.numel()].view(own.shape)])

    def all_to_all(self, parts: Sequence[Tensor], shapes: Sequence[Shape], label: Label) -> Pending:
        """Sends `parts[r]` to rank r; receives tensors of these shapes."""
        sizes = [torch.Size(shape).numel() for shape in shapes]
        arriving = sum(sizes) - sizes[self.rank]
        self.ledger.record(label, arriving * parts[0].element_size())
        pending = self._all_to_all(parts, sizes, label)
        return Pending(lambda: [x.view(shape) for x, shape in zip(pending.wait(), shapes)])

    def all_reduce(self, x: Tensor, label: Label) -> Tensor:
        """Sum over ranks."""
        self.ledger.record(label, all_reduce_bytes(x, self.size))
        return self._all_reduce(x.contiguous(), label)

    def exchange(
        self,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Shape]],
        like: Tensor,
        label: Label,
    ) -> Pending:
        """Point to point: tensors to ranks, and shapes from ranks with `like`'s dtype.

        With neither there is no call.
        """
        if not sends and not receives:
            return Pending(lambda: [])
        numel = sum(torch.Size(shape).numel() for _, shape in receives)
        self.ledger.record(label, numel * like.element_size())
        return self._exchange([(r, x.contiguous()) for r, x in sends], receives, like, label)

    @abstractmethod
    def _all_gather(self, flat: Tensor, label: Label) -> Pending: ...

    @abstractmethod
    def _reduce_scatter(self, flat_PN: Tensor, label: Label) -> Pending: ...

    @abstractmethod
    def _all_to_all(self, parts: Sequence[Tensor], sizes: list[int], label: Label) -> Pending: ...

    @abstractmethod
    def _all_reduce(self, x: Tensor, label: Label) -> Tensor: ...

    @abstractmethod
    def _exchange(
        self,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Shape]],
        like: Tensor,
        label: Label,
    ) -> Pending: ...


class Alone(Communicator):
    """A group of one: everything arrives at once."""

    def __init__(self) -> None:
        super().__init__(0, 1, Ledger())

    def _all_gather(self, flat: Tensor, label: Label) -> Pending:
        return Pending(lambda: [flat])

    def _reduce_scatter(self, flat_PN: Tensor, label: Label) -> Pending:
        return Pending(lambda: [flat_PN[0]])

    def _all_to_all(self, parts: Sequence[Tensor], sizes: list[int], label: Label) -> Pending:
        return Pending(lambda: list(parts))

    def _all_reduce(self, x: Tensor, label: Label) -> Tensor:
        return x.clone()

    def _exchange(
        self,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Shape]],
        like: Tensor,
        label: Label,
    ) -> Pending:
        return Pending(lambda: [])


def all_reduce_bytes(x: Tensor, size: int) -> int:
    """What a rank receives in a sum over `size` ranks: all parts of its share, then all shares."""
    return 2 * (size - 1) * -(-x.numel() // size) * x.element_size()
