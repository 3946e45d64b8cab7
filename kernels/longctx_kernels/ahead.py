"""Compiles recorded launches for GPUs that are not there, and reads what the compiler made of them.

`recording` in `launch.py` gives the launches; here each becomes machine code, and registers,
spilled bytes, shared memory and the instructions that matter are read from it.
`python -m longctx_kernels.ahead` compiles all of `specimens.py` and writes a table and a budget.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from longctx_kernels.launch import Launch

_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
    torch.uint8: "*u8",
}
_COUNTED = {
    "wgmma": r"wgmma\.mma_async",
    "mma": r"\bmma\.sync",
    "tcgen05": r"tcgen05\.mma",
    "cp_async": r"cp\.async\.c[ag]",
    "tma": r"cp\.async\.bulk\.tensor",
}
"""Instructions in PTX; disassembly shows the same, but takes longer than compilation."""

SHARED_LIMITS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Most bytes of shared memory that one block can have."""
PROCESSES = 2
REPORT = Path("docs/results/kernels-ahead.md")
BUDGET = Path("tests/golden/kernels_ahead.json")
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """What one launch needs of the machine."""

    kernel: str
    architecture: str
    options: dict[str, int]
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self)


def compile_launch(launch: Launch, architecture: str) -> Compiled:
    """Machine code of a launch for an architecture such as sm_90 or gfx942."""
    signature, constants, attributes = _describe(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    hardware = {k: v for k, v in launch.options.items() if k in ("num_warps", "num_stages")}
    built = triton.compile(source, target=_target(architecture), options=hardware)
    read = _read_cuda if architecture.startswith("sm_") else _read_hip
    registers, spilled, counts = read(built)
    name = launch.kernel.__name__
    options, shared = dict(launch.options), built.metadata.shared
    return Compiled(name, architecture, options, registers, spilled, shared, counts)


def launch_key(launch: Launch) -> str:
    """Equal for launches that share machine code: names, types, constants and alignment."""
    signature, constants, attributes = _describe(launch)
    hardware = {k: v for k, v in launch.options.items() if k in ("num_warps", "num_stages")}
    return repr((launch.kernel.__name__, signature, constants, sorted(attributes), hardware))


def _target(architecture: str) -> GPUTarget:
    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture[3:]), 32)
    return GPUTarget("hip", architecture, 64)


def _describe(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Types, constants and alignment of all parameters, as a real launch would specialise them."""
    values = dict(zip((p.name for p in launch.kernel.params), launch.arguments))
    values |= {k: v for k, v in launch.options.items() if k not in ("num_warps", "num_stages")}
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(launch.kernel.params):
        value = values[parameter.name]
        is_open = not (parameter.is_constexpr or parameter.do_not_specialize)
        kind = "constexpr" if parameter.is_constexpr else _type_of(value, is_open)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        elif is_open and (isinstance(value, Tensor) or value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _type_of(value: Any, is_open: bool) -> str:
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    if value is None or (is_open and isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _read_cuda(built: Any) -> tuple[int, int, dict[str, int]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [str(_TOOLS / "cuobjdump"), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{n}:(\d+)", usage)[1]) for n in ("REG", "STACK"))
    counts = {name: len(re.findall(code, built.asm["ptx"])) for name, code in _COUNTED.items()}
    return registers, stack, {name: count for name, count in counts.items() if count}


def _read_hip(built: Any) -> tuple[int, int, dict[str, int]]:
    code = built.asm["amdgcn"]
    registers, spilled = (
        int(re.search(rf"\.{n}:\s+(\d+)", code)[1]) for n in ("vgpr_count", "vgpr_spill_count")
    )
    mfma = len(re.findall(r"\bv_mfma", code))
    return registers, 4 * 64 * spilled, {"mfma": mfma} if mfma else {}


@dataclass(frozen=True)
class Result:
    """A specimen by name, and its machine code or why there is none."""

    call: str
    size: int
    dtype: str
    kernel: str
    architecture: str
    compiled: Compiled | None
    error: str = ""

    @property
    def key(self) -> str:
        """What a spill budget is for: launches of one kernel, size and dtype share it."""
        return f"{self.kernel} {self.size} {self.dtype}"


def compile_specimens(chosen: Sequence[tuple[str, int]], processes: int) -> list[Result]:
    """Machine code of (architecture, index in `specimens(architecture)`), in several processes."""
    # Forked children of a process in which torch has threads may hang.
    results = []
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for result in pool.map(_compile_specimen, *zip(*chosen), chunksize=4):
            results.append(result)
            if len(results) % 100 == 0:
                print(f"{len(results)} of {len(chosen)}", file=sys.stderr, flush=True)
    return results


def _compile_specimen(architecture: str, index: int) -> Result:
    from longctx_kernels.specimens import specimens

    found = specimens(architecture)[index]
    kernel = found.launch.kernel.__name__
    names = (found.call, found.size, str(found.dtype).partition(".")[2], kernel, architecture)
    try:
        return Result(*names, compile_launch(found.launch, architecture))
    except Exception as error:  # Triton and ptxas raise what they like: all of it is the result
        cause = error.__cause__ or error
        return Result(*names, None, f"{type(cause).__name__}: {str(cause).splitlines()[-1]}")


def spill_budget(results: Iterable[Result]) -> dict[str, dict[str, int]]:
    """Architecture -> kernel, size and dtype -> most spilled bytes of its launches."""
    budget: dict[str, dict[str, int]] = {}
    for result in results:
        if result.compiled is not None:
            row = budget.setdefault(result.architecture, {})
            row[result.key] = max(row.get(result.key, 0), result.compiled.spilled_bytes)
    return {name: dict(sorted(row.items())) for name, row in sorted(budget.items())}


def report(results: Sequence[Result], command: str) -> str:
    """A Markdown table per architecture."""
    parts = [
        "# Kernels compiled ahead of time",
        f"Command: `{command}`; Triton {triton.__version__}, torch {torch.__version__}. No GPU: "
        "numbers are the compiler's. Launches that share machine code are one row, named after "
        "the first call that makes them. Spilled is the stack frame of a thread in bytes (gfx942: "
        "of a wavefront); shared is KiB of a block.",
    ]
    for architecture in dict.fromkeys(result.architecture for result in results):
        rows = [result for result in results if result.architecture == architecture]
        built = [row.compiled for row in rows if row.compiled]
        spilling = sum(c.spilled_bytes > 0 for c in built)
        largest = max((c.shared_bytes for c in built), default=0) / 1024
        limit = SHARED_LIMITS[architecture] / 1024
        parts.append(
            f"## {architecture}\n\n{len(rows)} launches, {len(rows) - len(built)} of them do not "
            f"compile, {spilling} spill; most shared memory {largest:.0f} of {limit:.0f} KiB."
        )
        header = ("kernel", "call", "D", "dtype", "options", "registers", "spilled", "shared")
        lines = [f"| {' | '.join((*header, 'instructions'))} |"]
        lines.append("|" + " --- |" * 5 + " ---: |" * 3 + " --- |")
        lines += [_row(row) for row in rows]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _row(result: Result) -> str:
    start = (result.kernel, result.call, str(result.size), result.dtype)
    if result.compiled is None:
        return f"| {' | '.join((*start, '', '', '', '', result.error.replace('|', '/')))} |"
    c = result.compiled
    tiles = [f"{k} {v}" for k, v in c.options.items() if k.startswith(("BLOCK", "LISTED"))]
    tiles += [f"{c.options['num_warps']} warps", f"{c.options['num_stages']} stages"]
    counts = ", ".join(f"{count} {name}" for name, count in c.instructions.items())
    numbers = (str(c.registers), str(c.spilled_bytes), f"{c.shared_bytes / 1024:.1f}")
    return f"| {' | '.join((*start, ', '.join(tiles), *numbers, counts))} |"


def main(argv: list[str] | None = None) -> int:
    """Compiles everything; 1 if something does not compile or needs more than there is."""
    from longctx_kernels.specimens import specimens

    parser = argparse.ArgumentParser(prog="longctx_kernels.ahead", description=main.__doc__)
    parser.add_argument("--architectures", default=",".join(SHARED_LIMITS))
    parser.add_argument("--out", type=Path, default=REPORT, help="the table")
    parser.add_argument("--budget", type=Path, default=BUDGET, help="JSON file of spilled bytes")
    arguments = parser.parse_args(argv)
    names = arguments.architectures.split(",")
    if unknown := set(names) - set(SHARED_LIMITS):
        parser.error(f"unknown {', '.join(sorted(unknown))}: know {', '.join(SHARED_LIMITS)}")
    chosen = [(name, index) for name in names for index in range(len(specimens(name)))]
    print(f"{len(chosen)} launches, about a second each", file=sys.stderr, flush=True)
    results = compile_specimens(chosen, PROCESSES)
    for path in (arguments.out, arguments.budget):
        path.parent.mkdir(parents=True, exist_ok=True)
    given = sys.argv[1:] if argv is None else argv
    command = " ".join(["python -m longctx_kernels.ahead", *given])
    arguments.out.write_text(report(results, command))
    # Architectures that were left out keep their budget.
    kept = json.loads(arguments.budget.read_text()) if arguments.budget.exists() else {}
    budget = dict(sorted((kept | spill_budget(results)).items()))
    arguments.budget.write_text(json.dumps(budget, indent=1) + "\n")
    bad = [result for result in results if _is_illegal(result)]
    for result in bad:
        trouble = result.error or "too much shared memory"
        print(f"{result.architecture} {result.key} ({result.call}): {trouble}", file=sys.stderr)
    return int(bool(bad))


def _is_illegal(result: Result) -> bool:
    limit = SHARED_LIMITS[result.architecture]
    return result.compiled is None or result.compiled.shared_bytes > limit


if __name__ == "__main__":
    sys.exit(main())
