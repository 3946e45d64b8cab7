"""What processes really hold of a run at tiny sizes, counted tensor by tensor."""

import gc
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from longctx.model.allocations import Allocations
from longctx.model.memory import MemoryConfig
from longctx.parallel import Mesh, ParallelConfig, Split, mesh
from longctx.plan.memory import memory_of
from longctx.plan.workload import Workload, workload
from longctx.train.engines import build_engine
from longctx.train.settings import Settings, load_settings
from tests.presets import shrunk

VOCABULARY = 300
SECONDS = 2.0
"""For messages that were sent to be forgotten."""


class Found(NamedTuple):
    """Bytes on one process, as predicted and as counted."""

    what: str
    predicted: dict[str, int]
    counted: dict[str, int]


def work_of(name: str, ranks: int, policy: str, **table: Any) -> Workload:
    """A preset at a tiny size on so many processes, a layer of each letter and the first once more;
    `table` may change what is in tables."""
    preset = load_settings(name)
    train = {"seq_len": 256, "batch_size": 1, "micro_batch": 0, "device": "cpu"}
    train |= {"precision": "fp32"} | table.get("train", {})
    model = shrunk(preset.model)
    letters = "".join(dict.fromkeys(model.letters))
    settings = Settings(
        model=replace(model, pattern=letters, depth=len(letters) + 1),
        optim=replace(preset.optim, **table.get("optim", {})),
        train=replace(preset.train, **train),
        parallel=ParallelConfig(**{"sp": ranks} | table.get("parallel", {})),
        memory=MemoryConfig(checkpointing=policy, **table.get("memory", {})),
    )
    return workload(settings, ranks, VOCABULARY, settings.train.precision)


def count(rank: int, works: Sequence[tuple[str, Workload]]) -> list[Found]:
    """Of one process of a group that has met."""
    mesh.join = lambda *_: None
    gc.freeze()
    found = []
    for what, work in works:
        torch.manual_seed(0)
        memory = memory_of(work, rank)
        predicted = {
            "weights": memory.weights,
            "gradients": memory.gradients,
            "optimizer": memory.optimizer,
            "activations": sum(memory.activations.values()),
        }
        found.append(Found(what, predicted, _counted(work, predicted["activations"])))
    return found


def _counted(work: Workload, expected: int) -> dict[str, int]:
    settings = work.settings
    here = _mesh(work.split)
    engine = build_engine(settings, work.vocab_size, here)
    rows = max(work.micro_rows)
    view = here.view(work.documents or ((0,),) * rows, settings.train.seq_len)
    view = view.keyed(0, 0, tuple(range(rows)))
    ids_BT = view.token_ids_BT % work.vocab_size
    # Once before, for what a view finds out of a batch and an optimizer of weights.
    losses = engine.model(ids_BT, ids_BT, view)
    engine.backward(losses.cross_entropy / ids_BT.numel() + sum(losses.mixers.values()))
    gradients = _bytes(p.grad for p in engine.model.parameters())
    engine.gradient_norm()
    engine.update(1e-4)
    del losses
    states = [x for state in engine.optimizer.state.values() for x in state.values()]
    weights = _bytes([*engine.model.parameters(), *engine.model.buffers()])
    with Allocations() as allocations:
        losses = engine.model(ids_BT, ids_BT, view)
        own = [losses.cross_entropy, *losses.mixers.values(), *losses.statistics.values()]
        alive = _settled(allocations, expected + _bytes(own)) - _bytes(own)
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": _bytes(states),
        "activations": alive,
    }


@cache
def _mesh(split: Split) -> Mesh:
    """Connected once."""
    return Mesh(split, torch.device("cpu"), 60)


def _settled(allocations: Allocations, expected: int) -> int:
    """What is alive once messages that were sent are gone, which gloo holds for a moment."""
    deadline = time.monotonic() + SECONDS
    while allocations.alive() > expected and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    return allocations.alive()


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    """Of what lies here, in the memory that is taken for it."""
    local = [x.to_local() if isinstance(x, DTensor) else x for x in tensors if x is not None]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in local}
    return sum(storages.values())
