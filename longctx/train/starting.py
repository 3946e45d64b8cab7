"""Where a run starts: from a checkpoint of its own, from the weights of another run, or anew."""

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longctx.checkpoint import Address, Checkpoint, check_model, load_random, open_checkpoint
from longctx.errors import InputError, OutsideError

if TYPE_CHECKING:
    from longctx.train.trainer import Trainer


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    """Of training: forward passes three times, those that [memory] repeats not counted."""


def start(trainer: "Trainer", resumed: Address | None, initial: Address | None) -> None:
    """Goes on from `resumed`, or begins with the weights of `initial`; all processes must have
    found the same, and keep the same between their passes."""
    _agree_on(trainer, resumed or initial)
    if resumed:
        _resume(trainer, resumed)
    elif initial:
        with contextlib.closing(open_checkpoint(initial, trainer.crew)) as checkpoint:
            _load(trainer, checkpoint, weights_only=True)


def _agree_on(trainer: "Trainer", start: Address | None) -> None:
    if not trainer.crew:
        return
    own = f"{start}\n{trainer.settings.memory}"
    found = [text.decode().split("\n") for text in trainer.crew.gather(own.encode())]
    starts, policies = (sorted({*each}) for each in zip(*found))
    if len(starts) > 1:
        raise OutsideError(
            f"rank {trainer.mesh.rank}: processes see different checkpoints to start from "
            f"({', '.join(starts)}): wait until all hosts see the same folder, and start again"
        )
    if len(policies) > 1:
        raise InputError(
            f"memory.checkpointing: processes would keep different things ({'; '.join(policies)}), "
            "as on machines of different size with 'auto': set 'none', 'keep' or 'full'"
        )


def _resume(trainer: "Trainer", path: Address) -> None:
    """Goes back to a checkpoint: weights, optimizer, random state and place in the data."""
    with contextlib.closing(open_checkpoint(path, trainer.crew)) as checkpoint:
        _load(trainer, checkpoint, weights_only=False)
        load_random(checkpoint, trainer.mesh.rank)
        state = checkpoint.state
    try:
        trainer.progress = Progress(
            state["step"], state["tokens"], state["seconds"], state["flops"]
        )
        trainer.guard.load(state["guard"])
        trainer.loaders.load_state(state["data"])
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}/state.json: lacks {error}; it is not of this version of longctx"
        ) from error


def _load(trainer: "Trainer", checkpoint: Checkpoint, weights_only: bool) -> None:
    engine = trainer.engine
    check_model(checkpoint, {name: part.shape for name, part in engine.weights().items()})
    engine.load(checkpoint.read, checkpoint.names, weights_only)
