"""Steps of the real trainer on gloo ranks, with everything that c10d carries counted."""

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

from longctx.config import apply_overrides
from longctx.data import build_loaders
from longctx.parallel import Mesh
from longctx.parallel.megatron import drop_tensor_groups
from longctx.plan.traffic import traffic_of
from longctx.plan.workload import Workload
from longctx.sequence.ledger import Label, Traffic
from longctx.train.engines import settle_engine
from longctx.train.metrics import SilentLog
from longctx.train.prepare import settle_mesh
from longctx.train.settings import Settings, load_settings
from longctx.train.signals import StopRequest
from longctx.train.trainer import Trainer
from tests.presets import shrunk
from tests.sequence.c10d_counter import C10dCounter, profiled_messages

SMALL = {
    "data.task": "mqar",
    "data.prefetch": 0,
    "train.seq_len": 66,
    "train.batch_size": 2,
    "train.micro_batch": 0,
    "train.steps": 4,
    "parallel.sp": 1,
    "run.init_from": "",
}


class Case(NamedTuple):
    """A preset, what differs from it by `table.field`, whether a profile is made as well, and which
    step is counted."""

    preset: str
    changes: Mapping[str, Any] = MappingProxyType({})
    is_profiled: bool = False
    number: int = 2

    @property
    def settings(self) -> Settings:
        """At width 32, on generated data, with a layer of each letter and the first once more."""
        settings = load_settings(self.preset)
        model = shrunk(settings.model)
        letters = "".join(dict.fromkeys(model.letters))
        model = replace(model, pattern=letters, depth=len(letters) + 1)
        options = SMALL | dict(self.changes)
        argv = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        return apply_overrides(replace(settings, model=model), argv, "test")


class Step(NamedTuple):
    """What one process found in a step."""

    predicted: dict[Label, Traffic]
    recorded: dict[Label, Traffic]
    """By our ledger."""
    counted: Traffic
    messages: int
    profiled: int
    """Messages that PyTorch's profiler saw; as many as `messages` where it did not look."""


def counted_step(rank: int, ranks: int, case: Case) -> Step:
    """Of one of the processes of a group that is there already, or of one alone."""
    settings, config = case.settings, case.settings.train
    split = settle_engine(settings, settle_mesh(settings, ranks))
    loaders = build_loaders(settings.data, config.seq_len, config.batch_size, 0, False)
    with mock.patch("longctx.parallel.mesh.join"):
        mesh = Mesh(split, torch.device("cpu"), 60)
    with mock.patch("longctx.train.trainer.peak_flops", return_value=(1e9, "not measured")):
        trainer, log = Trainer(settings, loaders, mesh, StopRequest()), SilentLog()
    with contextlib.closing(trainer._read_ahead()):
        for _ in range(1, case.number):
            trainer.step(log)
        watched = profiled_messages() if case.is_profiled else contextlib.nullcontext([])
        with C10dCounter() as counter, watched as profiled:
            trainer.step(log)
    (ids, *_) = trainer._micro_batches(loaders.train.ids(case.number - 1))
    documents = loaders.train.read(ids, [(0, config.seq_len)]).documents
    work = Workload(settings, split, loaders.vocab_size, trainer.precision, documents)
    _forget_groups(mesh)
    messages = counter.messages
    found = traffic_of(work, rank), mesh.ledger.traffic(), counter.total(), messages
    return Step(*found, *(profiled or [messages]))


def _forget_groups(mesh: Mesh) -> None:
    """All but the one that the next case takes over."""
    if mesh.tensor_group:
        drop_tensor_groups()
    for group in list(dist.distributed_c10d._world.pg_map):
        if mesh.size == 1 or group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def counted_steps(rank: int, ranks: int, cases: dict[str, Case]) -> dict[str, Step]:
    """Of all cases, by name."""
    return {name: counted_step(rank, ranks, case) for name, case in cases.items()}
