"""The carrier for real ranks: plain torch.distributed calls, gloo or NCCL."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from longctx.errors import OutsideError
from longctx.sequence.communicator import Communicator, Pending, Shape
from longctx.sequence.ledger import Label, Ledger
from longctx.sequence.ranges import EXCHANGE

Result = TypeVar("Result")

# torch 2.13 renamed these two; 2.11 has the old names only.
all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def named(ledger: Ledger, label: Label, action: Callable[[], Result]) -> Result:
    """Does what may wait for other ranks; meanwhile the ledger says who asks, as does the error if
    one is lost."""
    ledger.waiting = label
    try:
        with ledger.ranges(EXCHANGE, label):
            return action()
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise OutsideError(
            f"rank {dist.get_rank()}: {label} failed; a rank is gone or slower than "
            f"parallel.timeout_seconds ({reason})"
        ) from error
    finally:
        ledger.waiting = None


class ProcessGroup(Communicator):
    """This process as a member of a torch.distributed group."""

    def __init__(self, group: Any, ledger: Ledger):
        super().__init__(dist.get_rank(group), dist.get_world_size(group), ledger)
        self.group = group

    def _call(self, label: Label, action: Callable[[], Result]) -> Result:
        return named(self.ledger, label, action)

    def _started(self, label: Label, works: Sequence[Any], result: list[Tensor]) -> Pending:
        arrives = self.ledger.ranges.departs(label)

        def finish() -> list[Tensor]:
            for work in works:
                self._call(label, work.wait)
            arrives()
            return result

        return Pending(finish)

    def _all_gather(self, flat: Tensor, label: Label) -> Pending:
        out = flat.new_empty(self.size * flat.numel())
        work = self._call(
            label, lambda: all_gather_flat(out, flat, group=self.group, async_op=True)
        )
        return self._started(label, [work], list(out.view(self.size, -1)))

    def _reduce_scatter(self, flat_PN: Tensor, label: Label) -> Pending:
        out = flat_PN.new_empty(flat_PN.shape[1])
        work = self._call(
            label,
            lambda: reduce_scatter_flat(out, flat_PN.reshape(-1), group=self.group, async_op=True),
        )
        return self._started(label, [work], [out])

    def _all_to_all(self, parts: Sequence[Tensor], sizes: list[int], label: Label) -> Pending:
        sent = torch.cat([part.reshape(-1) for part in parts])
        out = sent.new_empty(sum(sizes))
        work = self._call(
            label,
            lambda: dist.all_to_all_single(
                out,
                sent,
                sizes,
                [part.numel() for part in parts],
                group=self.group,
                async_op=True,
            ),
        )
        return self._started(label, [work], list(out.split(sizes)))

    def _all_reduce(self, x: Tensor, label: Label) -> Tensor:
        out = x.clone()
        self._call(label, lambda: dist.all_reduce(out, group=self.group))
        return out

    def _exchange(
        self,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Shape]],
        like: Tensor,
        label: Label,
    ) -> Pending:
        arriving = [like.new_empty(shape) for _, shape in receives]
        operations = [
            dist.P2POp(dist.irecv, x, group=self.group, group_peer=rank)
            for (rank, _), x in zip(receives, arriving)
        ]
        operations += [
            dist.P2POp(dist.isend, x, group=self.group, group_peer=rank) for rank, x in sends
        ]
        works = self._call(label, lambda: dist.batch_isend_irecv(operations))
        return self._started(label, works, arriving)
