"""Processes and their groups; the only reader of what a launcher puts into the environment."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longctx.parallel.config import Split
from longctx.sequence.c10d import ProcessGroup
from longctx.sequence.ledger import Label, Ledger
from longctx.sequence.local import LocalView
from longctx.sequence.plan import Documents, Plan
from longctx.sequence.sharded import Links, ShardedView
from longctx.sequence.view import SequenceView

OUTSIDE_LAYERS = -1


def world_size() -> int:
    """Processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this process speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def local_rank() -> int:
    """This process's number on its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


class Mesh:
    """This process among dp x sp; ranks that share sequences are neighbours."""

    def __init__(self, split: Split, device: torch.device, timeout_seconds: int):
        self.split, self.device, self.ledger = split, device, Ledger()
        self._timeout = timedelta(seconds=timeout_seconds)
        self.size = split.dp * split.sp
        self.rank = 0
        if self.size > 1:
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=self._timeout)
            self.rank = dist.get_rank()
            self._world = ProcessGroup(dist.group.WORLD, self.ledger)
        self.dp_rank, self.sp_rank = divmod(self.rank, split.sp)
        self._links = self._make_links() if split.sp > 1 else None

    def _make_links(self) -> Links:
        """Every process makes all groups, in the same order, and keeps its own."""
        sp, heads = self.split.sp, self.split.transports.heads
        mine: dict[str, ProcessGroup] = {}
        for first in range(0, self.size, sp):
            members = list(range(first, first + sp))
            layout = {
                "sequence": [members],
                "chain": [members],
                "heads": [members[j : j + heads] for j in range(0, sp, heads)],
                "ring": [members[u::heads] for u in range(heads)],
            }
            for name, groups in layout.items():
                for ranks in groups:
                    group = dist.new_group(ranks, timeout=self._timeout)
                    if self.rank in ranks:
                        mine[name] = ProcessGroup(group, self.ledger)
        return Links(**mine)

    def view(self, documents: Documents, seq_len: int) -> SequenceView:
        """The view of a batch whose rows hold these documents."""
        if self._links is None:
            return LocalView(documents, seq_len, self.device)
        plan = Plan(self.split.place(seq_len), self.sp_rank, documents)
        return ShardedView(plan, self._links, self.split.transports).to(self.device)

    def segments(self, seq_len: int) -> tuple[tuple[int, int], ...]:
        """The parts of every sequence that this process reads."""
        return tuple(map(tuple, self.split.place(seq_len).segments[self.sp_rank]))

    def sum(self, x: Tensor, name: str) -> Tensor:
        """Sum over all processes."""
        if self.size == 1:
            return x
        return self._world.all_reduce(x, Label(OUTSIDE_LAYERS, name))

    def sum_gradients(self, model: nn.Module) -> None:
        """Adds up the gradients of all processes, in one message."""
        if self.size == 1:
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        total = self.sum(torch.cat([g.flatten() for g in gradients]), "gradients")
        for gradient, summed in zip(gradients, total.split([g.numel() for g in gradients])):
            gradient.copy_(summed.view_as(gradient))

    def close(self) -> None:
        """Leaves the groups."""
        if self.size > 1:
            dist.destroy_process_group()
