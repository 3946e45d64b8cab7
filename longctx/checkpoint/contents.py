"""What a checkpoint holds of a model that one process holds whole.

Tensors are called `model/NAME`, `optimizer/PARAMETER/KEY` and `random/RANK/cpu` or `cuda`.
"""

import torch
from torch import nn

from longctx.checkpoint.boxes import whole
from longctx.checkpoint.reading import Checkpoint
from longctx.errors import InputError
from longctx.parallel.box import Box, model_tensors

MODEL = "model/"
HINT = "the checkpoint is of another model: use the [model] table it was trained with"


def random_boxes(rank: int) -> list[Box]:
    """torch's random state on the CPU, and on the current CUDA device if that is in use."""
    boxes = [whole(f"random/{rank}/cpu", torch.get_rng_state())]
    if torch.cuda.is_initialized():
        boxes.append(whole(f"random/{rank}/cuda", torch.cuda.get_rng_state()))
    return boxes


def check_model(checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> None:
    """InputError with the first name or shape in which the saved model differs from `shapes`."""
    for name, shape in shapes.items():
        if f"{MODEL}{name}" not in checkpoint.names:
            raise InputError(f"{checkpoint.path}: lacks {name}; {HINT}")
        saved = checkpoint.shape(f"{MODEL}{name}")
        if saved != tuple(shape):
            differ = f"has shape {list(saved)} instead of {list(shape)}"
            raise InputError(f"{checkpoint.path}: {name} {differ}; {HINT}")
    for name in sorted(checkpoint.names):
        if name.startswith(MODEL) and name.removeprefix(MODEL) not in shapes:
            extra = name.removeprefix(MODEL)
            raise InputError(f"{checkpoint.path}: has {extra}, which the model lacks; {HINT}")


def load_model(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Copies the saved weights into a model that is not split, of the same names and shapes.

    Weights saved in another precision are cast to the model's.
    """
    wanted = model_tensors(model)
    check_model(checkpoint, {name: tuple(tensor.shape) for name, tensor in wanted.items()})
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(checkpoint.read(f"{MODEL}{name}"))


def load_random(checkpoint: Checkpoint, rank: int) -> bool:
    """Sets torch's random state to that of a process; False if fewer wrote the checkpoint."""
    cpu, cuda = f"random/{rank}/cpu", f"random/{rank}/cuda"
    if cpu not in checkpoint.names:
        return False
    try:
        torch.set_rng_state(checkpoint.read(cpu))
        if cuda in checkpoint.names and torch.cuda.is_available():
            torch.cuda.set_rng_state(checkpoint.read(cuda))
    except (RuntimeError, TypeError) as error:
        raise InputError(f"{checkpoint.path}: {cpu} is no random state ({error})") from None
    return True
