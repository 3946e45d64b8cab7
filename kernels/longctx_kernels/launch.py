"""The one place that launches Triton kernels, and the tables of tiles, warps and stages.

`tables/*.json` hold, per architecture, kernel and head size, the options of a launch: constexpr
tile sizes, `num_warps` and `num_stages`. `python -m longctx_kernels.tune` regenerates them. While
`recording`, launches are kept instead of made, so that kernels can be compiled for a machine that
is not there; operands are then meta tensors.
"""

import contextlib
import importlib.util
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TABLES = Path(__file__).with_name("tables")
INTERPRETER = "interpreter"
SIZES = (64, 128, 256)
"""Head sizes that the tables distinguish; others use the next larger one."""

Options = dict[str, int]


@torch.compiler.assume_constant_result
@cache
def has_triton() -> bool:
    """Whether Triton is installed, as it is on Linux."""
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter on the CPU (TRITON_INTERPRET=1)."""
    if not has_triton():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Launch:
    """One launch as it would have been made."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: Options


@dataclass
class Recording:
    """An architecture to pretend, and the launches for it."""

    architecture: str
    launches: list[Launch] = field(default_factory=list)


_recordings: list[Recording] = []
_one_at_a_time = threading.Lock()


@contextlib.contextmanager
def recording(architecture: str) -> Iterator[list[Launch]]:
    """Keeps launches, with the options of `architecture`, instead of making them."""
    _recordings.append(Recording(architecture))
    try:
        yield _recordings[-1].launches
    finally:
        _recordings.pop()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, options: Mapping[str, int]) -> None:
    """Runs `kernel` over `grid`; all its parameters but those in `options` are positional."""
    if _recordings:
        _recordings[-1].launches.append(Launch(kernel, grid, arguments, dict(options)))
    elif is_interpreted():
        # The interpreter keeps the place in the grid in a global variable.
        with _one_at_a_time:
            kernel[grid](*arguments, **_without_hardware(options))
    else:
        kernel[grid](*arguments, **options)


def _without_hardware(options: Mapping[str, int]) -> Options:
    hardware = ("num_warps", "num_stages")
    return {k: v for k, v in options.items() if k not in hardware}


def launch_options(kernel: str, size: int, device: torch.device) -> Options:
    """Options of the kernel's name for heads of `size`, on the architecture of `device`."""
    by_size = _kernel_table(architecture_of(device), kernel)
    fitting = [key for key in sorted(map(int, by_size)) if key >= size]
    if not fitting:
        most = max(map(int, by_size))
        raise ValueError(f"head dim {size} is not supported: {kernel} goes up to {most}")
    return dict(by_size[str(fitting[0])])


def architecture_of(device: torch.device) -> str:
    """Name of the table for `device`: the newest that is not newer than it."""
    if _recordings:
        return _recordings[-1].architecture
    if device.type != "cuda":
        return INTERPRETER
    return _nearest(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _nearest(index: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    known = [int(name[3:]) for name in architectures() if name.startswith("sm_")]
    return f"sm_{max((n for n in known if n <= 10 * major + minor), default=min(known))}"


@cache
def read_tables() -> dict[str, dict[str, dict[str, dict[str, Options]]]]:
    """Family -> architecture -> kernel -> head size -> options."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(TABLES.glob("*.json"))}


def architectures() -> list[str]:
    """Architectures that the tables know, without the interpreter."""
    names = {name for family in read_tables().values() for name in family}
    return sorted(names - {INTERPRETER})


def _kernel_table(architecture: str, kernel: str) -> dict[str, Options]:
    for family in read_tables().values():
        if kernel in family.get(architecture, {}):
            return family[architecture][kernel]
    raise ValueError(f"no launch table has kernel {kernel!r} for {architecture}")


def backend_of(x: Tensor, choice: str = "auto") -> str:
    """Who computes on the device of `x`: "torch", "triton" or "fla"; checks an explicit choice."""
    on_gpu = x.device.type == "cuda" and has_triton()
    can_launch = on_gpu or is_interpreted() or bool(_recordings)
    if choice == "auto":
        return "triton" if can_launch and x.dtype != torch.float64 else "torch"
    if choice == "triton" and not can_launch:
        raise ValueError(
            f"backend 'triton' needs Triton and a CUDA device, not {x.device.type!r}: choose "
            "'torch', or set TRITON_INTERPRET=1 before Python starts to interpret the kernels"
        )
    if choice == "triton" and x.dtype == torch.float64:
        raise ValueError("backend 'triton' computes in at most fp32: choose 'torch' for fp64")
    if choice == "fla" and x.device.type != "cuda":
        raise ValueError(f"backend 'fla' needs a CUDA device, not {x.device.type!r}")
    if choice not in ("torch", "triton", "fla"):
        raise ValueError(f"backend {choice!r}: expected auto, torch, triton or fla")
    return choice
