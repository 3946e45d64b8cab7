"""Processes and their groups; the only reader of what a launcher puts into the environment."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from longctx.errors import InputError, OutsideError
from longctx.parallel.config import Split
from longctx.parallel.crew import GlooCrew
from longctx.parallel.megatron import TensorGroup, drop_tensor_groups, make_tensor_group
from longctx.parallel.rendezvous import join
from longctx.sequence.c10d import ProcessGroup
from longctx.sequence.communicator import Alone, Communicator
from longctx.sequence.ledger import OUTSIDE_LAYERS, Label, Ledger
from longctx.sequence.local import LocalView
from longctx.sequence.plan import Documents, Plan
from longctx.sequence.sharded import Links, ShardedView
from longctx.sequence.view import SequenceView

SECONDS_TO_WRITE = 3600
"""How long processes wait for the slowest of them to write its part of a checkpoint."""


def world_size() -> int:
    """Processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first_here() -> bool:
    """Whether this process speaks for those of its host, of which each may lack something."""
    return local_rank() == 0


def has_joined() -> bool:
    """Whether this process is in a group with others."""
    return dist.is_initialized()


def processes_here() -> int:
    """Processes of this run on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class Mesh:
    """This process among dp x sp x tp; ranks that share heads are neighbours, then those that share
    sequences."""

    def __init__(self, split: Split, device: torch.device, timeout_seconds: int):
        self.split, self.device, self.ledger = split, device, Ledger()
        self._timeout = timedelta(seconds=timeout_seconds)
        self.data_size = split.dp * split.sp
        self.size = self.data_size * split.tp
        self.rank = 0
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self.is_joined = self.size > 1 or split.engine != "none"
        backend = "nccl" if device.type == "cuda" else "gloo"
        if self.is_joined and not has_joined():
            if self.size > 1:
                join(backend, self._timeout)
            else:
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        if self.is_joined:
            self.rank = dist.get_rank()
            self._world = self._data = ProcessGroup(dist.group.WORLD, self.ledger)
        self.data_rank, self.tp_rank = divmod(self.rank, split.tp)
        self.dp_rank, self.sp_rank = divmod(self.data_rank, split.sp)
        self.tensor_group: TensorGroup | None = None
        if split.tp > 1:
            self.tensor_group = make_tensor_group(split.tp, split.sp, self._timeout, self.ledger)
            ranks = [list(range(t, self.size, split.tp)) for t in range(split.tp)]
            self._data = self._own_group(ranks)
        self._links = self._make_links() if split.sp > 1 else None

    def _own_group(self, groups: Sequence[Sequence[int]]) -> ProcessGroup:
        """Makes all these groups of ranks, as every process must; the one that this one is in."""
        made = {tuple(r): dist.new_group(list(r), timeout=self._timeout) for r in groups}
        return next(ProcessGroup(made[r], self.ledger) for r in made if self.rank in r)

    def _make_links(self) -> Links:
        """Every process makes all groups, in the same order, and keeps its own."""
        sp, tp, heads = self.split.sp, self.split.tp, self.split.transports.heads
        firsts = [d * sp * tp + t for d in range(self.split.dp) for t in range(tp)]
        rings = [range(first, first + sp * tp, tp) for first in firsts]
        return Links(
            sequence=self._own_group(rings),
            chain=self._own_group(rings),
            heads=self._own_group([r[j : j + heads] for r in rings for j in range(0, sp, heads)]),
            ring=self._own_group([r[u::heads] for r in rings for u in range(heads)]),
        )

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
        """Sum over the processes with different tokens, equal on all."""
        return self._data.all_reduce(x, Label(OUTSIDE_LAYERS, name)) if self.data_size > 1 else x

    def sum_over_all(self, x: Tensor, name: str) -> Tensor:
        """Sum over all processes."""
        return self._world.all_reduce(x, Label(OUTSIDE_LAYERS, name)) if self.size > 1 else x

    def gather(self, x: Tensor) -> list[Tensor]:
        """This of every process, in order of ranks."""
        if self.size == 1:
            return [x]
        return self._world.all_gather(x, Label(OUTSIDE_LAYERS, "replicas")).wait()

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Adds up those of all processes that hold the same weights, in one message; in place."""
        if self.data_size == 1:
            return
        flat = torch.cat([g.flatten() for g in gradients])
        total = self._data.all_reduce(flat, Label(OUTSIDE_LAYERS, "gradients"))
        for gradient, summed in zip(gradients, total.split([g.numel() for g in gradients])):
            gradient.copy_(summed.view_as(gradient))

    def shards(self) -> DeviceMesh:
        """The processes that hold the weights of this one's heads, replica by replica."""
        split, kind = self.split, self.device.type
        mine = torch.arange(self.tp_rank, self.size, split.tp)
        if split.replicas == 1:
            return DeviceMesh.from_group(self._data.group, kind, mesh=mine)
        each_RS = mine.view(split.replicas, -1)
        every = [torch.arange(t, self.size, split.tp).view_as(each_RS) for t in range(split.tp)]
        across = self._own_group([column for m in every for column in m.mT.tolist()]).group
        within = self._own_group([row for m in every for row in m.tolist()]).group
        names = ("replicas", "shards")
        return DeviceMesh.from_group([across, within], kind, mesh=each_RS, mesh_dim_names=names)

    def holders(self) -> Communicator:
        """The processes that hold one copy of the weights together; without an engine that spreads
        them, all. Every process calls this once."""
        each = self.size // self.split.replicas
        if each == 1:
            return Alone()
        if each == self.size:
            return self._world
        firsts = range(0, self.size, each)
        return self._own_group([range(first, first + each) for first in firsts])

    def crew(self) -> GlooCrew | None:
        """All processes, to speak about checkpoints beside the training; None for one alone."""
        patience = max(SECONDS_TO_WRITE, int(self._timeout.total_seconds()))
        return GlooCrew(patience) if self.size > 1 else None

    @contextlib.contextmanager
    def told_by_rank(self) -> Iterator[None]:
        """A mistake in the input that one of several processes finds in here is told by it."""
        try:
            yield
        except InputError as error:
            if self.size == 1:
                raise
            raise OutsideError(f"rank {self.rank}: {error}") from error

    def close(self) -> None:
        """Leaves the groups."""
        if self.tensor_group:
            drop_tensor_groups()
        if self.is_joined:
            dist.destroy_process_group()
