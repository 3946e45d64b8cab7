"""Checkpoints without pickle: a directory of safetensors files and one JSON file.

`<run>/checkpoints/step-N/` holds `model.safetensors` (tied parameters once), `random.safetensors`,
`optimizer.safetensors` (tensors named `<parameter name>/<state key>`) and `state.json`, which names
the size of each other file. The directory gets its name only when all of it is on disk.
"""

import errno
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from longctx.errors import InputError, OutsideError

FORMAT = 1
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
RANDOM_FILE = "random.safetensors"
STATE_FILE = "state.json"


@dataclass(frozen=True)
class CheckpointConfig:
    """The `[checkpoint]` table."""

    every: int = 0
    """Steps between checkpoints; 0 saves only at the end."""
    keep: int = 2
    """How many newest checkpoints stay on disk."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise InputError(f"checkpoint.every must be 0 or more, not {self.every}")
        if self.keep < 1:
            raise InputError(f"checkpoint.keep must be 1 or more, not {self.keep}")


def save(
    run_dir: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict
) -> Path:
    """Write the checkpoint of `step` and return its directory; older ones are not touched.

    `state` goes into `state.json` beside `format`, `step` and `files`. Hyper-parameters of the
    optimizer are not saved: they come from the config.
    """
    parent = Path(run_dir) / "checkpoints"
    partial = parent / f".partial-step-{step}"
    final = parent / f"step-{step}"
    files = {
        MODEL_FILE: _model_tensors(model),
        OPTIMIZER_FILE: _optimizer_tensors(model, optimizer),
        RANDOM_FILE: _random_tensors(),
    }
    try:
        parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        sizes = {name: _write_tensors(partial / name, files[name]) for name in files}
        own = {"format": FORMAT, "step": step, "files": sizes}
        (partial / STATE_FILE).write_text(json.dumps({**state, **own}, indent=1) + "\n")
        sync_path(partial / STATE_FILE)
        _publish(partial, final)
    except (OSError, SafetensorError) as error:
        raise OutsideError(
            f"{final}: cannot write the checkpoint: {_reason(error)}; older checkpoints are intact"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def latest(run_dir: Path) -> Path | None:
    """The checkpoint of the highest step in a run directory, None without any."""
    found = _checkpoints(Path(run_dir))
    return found[-1] if found else None


def prune(run_dir: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints, and what interrupted saves left behind."""
    parent = Path(run_dir) / "checkpoints"
    for path in _checkpoints(Path(run_dir))[:-keep]:
        try:
            path.rename(path.with_name(f".removed-{path.name}"))
        except OSError as error:
            raise OutsideError(f"{path}: cannot remove the checkpoint: {_reason(error)}") from error
    for pattern in (".partial-step-*", ".replaced-step-*", ".removed-step-*"):
        for path in parent.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def resolve(path_or_run: Path) -> Path:
    """The checkpoint meant by a path: itself, or the newest one if it is a run directory."""
    path = Path(path_or_run)
    if path.is_dir() and _step_of(path) is not None:
        return path
    found = latest(path)
    if found is None:
        raise InputError(
            f"{path}: no checkpoint here; give a run directory that has checkpoints/step-N, "
            "or a step-N directory"
        )
    return found


def load_state(path: Path) -> dict:
    """The contents of `state.json`, after checking that every file has the size it names."""
    path = Path(path)
    try:
        state = json.loads((path / STATE_FILE).read_text())
        version, files = state["format"], dict(state["files"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _unusable(path / STATE_FILE, f"unreadable ({_reason(error)})") from error
    if version != FORMAT:
        raise InputError(
            f"{path / STATE_FILE}: format {version} is not the format {FORMAT} "
            "that this version of longctx reads; load it with the version that wrote it"
        )
    for name, size in files.items():
        if not (path / name).is_file():
            raise _unusable(path / name, "missing")
        actual = (path / name).stat().st_size
        if actual != size:
            raise _unusable(path / name, f"damaged ({actual} bytes instead of {size})")
    return state


def load_model(path: Path, model: nn.Module) -> None:
    """Copy the saved weights into `model`, which must have exactly the saved names and shapes.

    Weights saved in another precision are cast to the model's.
    """
    file = Path(path) / MODEL_FILE
    saved = _read_tensors(file)
    wanted = _model_tensors(model)
    hint = "the checkpoint is of another model: use the [model] table it was trained with"
    for name, tensor in wanted.items():
        if name not in saved:
            raise InputError(f"{file}: lacks {name}; {hint}")
        if saved[name].shape != tensor.shape:
            shapes = f"shape {list(saved[name].shape)} instead of {list(tensor.shape)}"
            raise InputError(f"{file}: {name} has {shapes}; {hint}")
    for name in saved:
        if name not in wanted:
            raise InputError(f"{file}: has {name}, which the model lacks; {hint}")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(saved[name])


def load_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Replace the state of `optimizer` by the saved one, matched by parameter names."""
    file = Path(path) / OPTIMIZER_FILE
    saved = _read_tensors(file)
    parameters = dict(model.named_parameters())
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    state: dict[nn.Parameter, dict[str, Tensor]] = {}
    for name, tensor in saved.items():
        parameter_name, _, key = name.rpartition("/")
        parameter = parameters.get(parameter_name)
        if parameter is None or id(parameter) not in group_of:
            raise InputError(
                f"{file}: has {name}, but the optimizer has no parameter {parameter_name}; "
                "use the [model] and [optim] tables it was trained with"
            )
        group = group_of[id(parameter)]
        counts_on_host = key == "step" and not (group.get("capturable") or group.get("fused"))
        device = torch.device("cpu") if counts_on_host else parameter.device
        state.setdefault(parameter, {})[key] = tensor.to(device)
    optimizer.state.clear()
    optimizer.state.update(state)


def load_random(path: Path) -> None:
    """Set torch's random state on the CPU, and on the current CUDA device if one was saved."""
    saved = _read_tensors(Path(path) / RANDOM_FILE)
    torch.set_rng_state(saved["cpu"])
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])


def sync_path(path: Path) -> None:
    """Wait until a file's contents, or a directory's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _step_of(path: Path) -> int | None:
    match = re.fullmatch(r"step-(\d+)", path.name)
    return int(match[1]) if match else None


def _checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint directories of a run, oldest first."""
    found = [path for path in run_dir.glob("checkpoints/step-*") if _step_of(path) is not None]
    return sorted(found, key=_step_of)


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers under the first of their names."""
    tensors: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensors.setdefault(id(tensor), (name, tensor))
    return {name: tensor.detach() for name, tensor in tensors.values()}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}/{key}": tensor
        for parameter, values in optimizer.state.items()
        for key, tensor in values.items()
        if tensor is not None
    }


def _random_tensors() -> dict[str, Tensor]:
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors


def _write_tensors(file: Path, tensors: dict[str, Tensor]) -> int:
    """Write a safetensors file through to the disk and return its size in bytes."""
    save_file({name: _owning_memory(tensor) for name, tensor in tensors.items()}, file)
    # safetensors makes files readable by their owner only; the umask decided about the directory.
    file.chmod(file.parent.stat().st_mode & 0o666)
    sync_path(file)
    return file.stat().st_size


def _owning_memory(tensor: Tensor) -> Tensor:
    """A contiguous CPU tensor that shares its memory with no larger one."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _read_tensors(file: Path) -> dict[str, Tensor]:
    load_state(file.parent)
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _unusable(file, f"unreadable ({_reason(error)})") from error


def _publish(partial: Path, final: Path) -> None:
    """Give a complete partial directory its final name, in place of an earlier save of the step."""
    sync_path(partial)
    replaced = final.with_name(f".replaced-{final.name}")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    try:
        partial.rename(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        raise
    sync_path(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _reason(error: Exception) -> str:
    """What went wrong in words; safetensors hides the number of an operating system error."""
    hidden = re.search(r"os error (\d+)", str(error))
    number = int(hidden[1]) if hidden else getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full"
    return os.strerror(number) if number else str(error)


def _unusable(file: Path, problem: str) -> InputError:
    """The error for a damaged checkpoint, with the next older one as the way out."""
    broken = file.parent
    siblings = _checkpoints(broken.parent.parent)
    older = [path for path in siblings if _step_of(path) < (_step_of(broken) or 0)]
    mend = f"remove {broken}"
    if older:
        mend += f" to go on from {older[-1].name}"
    return InputError(f"{file}: {problem}; {mend}")
