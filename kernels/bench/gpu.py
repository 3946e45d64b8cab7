"""Checks every kernel on a GPU, then times what is right beside its peers; under 8 minutes.

`python kernels/bench/gpu.py` needs torch, triton and numpy only, and writes
kernels/bench/results/<gpu>.json and .md after every section. Wheels of fla-core and einops in
build/wheels are used without being installed. Kernels are first compiled by several processes.
The exit code is 1 if something is wrong or a target is missed, 2 if there is no GPU.
"""

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
# On a machine where nothing is installed, the kernels are found beside the bench.
sys.path.insert(0, str(ROOT / "kernels"))

import gpu_checks  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from gpu_bench import OURS, Items, Row, Rows, groups, targets, time_item  # noqa: E402
from gpu_checks import Check, precisions  # noqa: E402
from gpu_peers import fla_version, unpack_wheels  # noqa: E402
from gpu_problems import problems  # noqa: E402
from gpu_timing import ceilings  # noqa: E402
from report import table  # noqa: E402

RESULTS = ROOT / "kernels" / "bench" / "results"
BUDGET = 460
"""Seconds after which no further item is begun."""

WARM_SECONDS = 200


@dataclass
class Run:
    """What has been found so far."""

    arguments: argparse.Namespace
    command: str
    device: torch.device
    started: float = field(default_factory=time.perf_counter)
    checks: list[Check] = field(default_factory=list)
    rows: Rows = field(default_factory=Rows)
    tables: dict[str, list[Row]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def unjudged(self) -> str:
        """Why targets do not apply, or ""."""
        if self.device.type != "cuda":
            return "no GPU"
        return "tiny shapes" if self.arguments.tiny else ""

    @property
    def red(self) -> dict[str, Check]:
        """The first red check of each op that has one."""
        return {check.op: check for check in reversed(self.checks) if not check.is_green}

    def verdicts(self) -> list[str]:
        """A line per target."""
        return [target.line(self.rows, self.unjudged) for target in targets()]

    def is_failed(self) -> bool:
        """Whether something is wrong, broke or missed its target."""
        missed = any(line.startswith("FAIL") for line in self.verdicts())
        return missed or bool(self.red) or any(row.note for row in self.rows if _is_ours(row))

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started


def main(argv: list[str] | None = None) -> int:
    """Everything; see the module."""
    arguments = _parser().parse_args(argv)
    has_gpu = torch.cuda.is_available()
    if not (has_gpu or arguments.tiny):
        print("no GPU here: --tiny runs everything on the CPU and judges nothing", file=sys.stderr)
        return 2
    unpack_wheels(arguments.wheels)
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device("cuda" if has_gpu else "cpu")
    if not has_gpu:
        torch.set_num_threads(1)
    given = sys.argv[1:] if argv is None else argv
    run = Run(arguments, shlex.join(["python", "kernels/bench/gpu.py", *given]), device)
    if arguments.warm:
        return _warm(run, *map(int, arguments.warm.split("/")))
    run.notes.append(f"Seed {arguments.seed}.")
    torch.manual_seed(arguments.seed)
    if has_gpu:
        _section(run, "compiling", lambda: _compile(run))
        _section(run, "ceilings", lambda: run.notes.append(ceilings(device)))
    _section(run, "checks", lambda: _check(run))
    for items in groups(device, arguments.tiny):
        _section(run, items.title, lambda: _time(run, items))  # noqa: B023
    print(_markdown(run))
    return int(run.is_failed())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="tiny shapes; nothing is judged")
    parser.add_argument(
        "--out", type=Path, help="folder of results (default kernels/bench/results)"
    )
    parser.add_argument("--wheels", type=Path, default=ROOT / "build" / "wheels", help="of peers")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(2), "big"))
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds in all")
    parser.add_argument("--processes", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    return parser


def _section(run: Run, name: str, work) -> None:
    """Runs a part; what it raises is noted, and the results so far are written in any case."""
    print(f"{run.elapsed():.0f} s: {name}", file=sys.stderr, flush=True)
    begun = run.elapsed()
    try:
        work()
    except Exception as error:  # later sections still have something to say
        run.notes.append(f"{name} broke off: {type(error).__name__}: {str(error)[:300]}")
        run.rows.append(Row(name, OURS, note=run.notes[-1]))
    run.seconds[name] = run.elapsed() - begun
    _write(run)


def _compile(run: Run) -> None:
    """Fills Triton's cache: each process runs a share of all there is, once."""
    count = run.arguments.processes
    command = [sys.executable, __file__, "--wheels", str(run.arguments.wheels)]
    command += ["--tiny"] if run.arguments.tiny else []
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    workers = [
        subprocess.Popen([*command, "--warm", f"{i}/{count}"], **quiet) for i in range(count)
    ]
    limit = time.perf_counter() + WARM_SECONDS
    for worker in workers:
        try:
            worker.wait(max(0.0, limit - time.perf_counter()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def _warm(run: Run, share: int, count: int) -> int:
    """Compiles what belongs to a share; whatever fails will fail again where it is reported."""
    device, tiny = run.device, run.arguments.tiny
    # Peers come first: they tune themselves for longest.
    works = [
        (lambda make=make: list(time_item(make, device)))
        for items in groups(device, tiny)
        for _, make in items.makers
    ]
    works += [
        (lambda make=make, name=name: gpu_checks.check(make(gpu_checks.DTYPES[name]), name))
        for make in problems(device, tiny)
        for name in precisions()
    ]
    for work in works[share::count]:
        try:
            work()
        except Exception:
            continue
    return 0


def _check(run: Run) -> None:
    for check in gpu_checks.run_checks(run.device, run.arguments.tiny):
        run.checks.append(check)
        if not check.is_green:
            print(f"  RED {check}", file=sys.stderr, flush=True)


def _time(run: Run, items: Items) -> None:
    rows = run.tables.setdefault(items.title, [])
    for name, make in items.makers:
        if (red := run.red.get(items.op)) or not any(c.op == items.op for c in run.checks):
            done = [Row(name, OURS, note=f"not timed: {red or 'it was not checked'}")]
        elif run.elapsed() > run.arguments.budget:
            done = [Row(name, OURS, note="not timed: the time budget is spent")]
        else:
            print(f"  {name}", file=sys.stderr, flush=True)
            done = _guarded(name, time_item(make, run.device))
        for row in done:
            rows.append(row)
            run.rows.append(row)
            _write(run)


def _guarded(name: str, rows: Iterator[Row]) -> Iterator[Row]:
    """An item that cannot even be prepared is a row too: others follow it."""
    try:
        yield from rows
    except Exception as error:
        yield Row(name, OURS, note=f"{type(error).__name__}: {str(error)[:200]}")


def _is_ours(row: Row) -> bool:
    return row.who == OURS


def _gpu_name(run: Run) -> str:
    return torch.cuda.get_device_name() if run.device.type == "cuda" else "no GPU"


def _versions(run: Run) -> dict[str, str]:
    return {
        "gpu": _gpu_name(run),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "fla": fla_version() or "not installed",
        "python": platform.python_version(),
    }


def _write(run: Run) -> None:
    """JSON and Markdown; without a GPU only where it was asked for."""
    folder = run.arguments.out or (None if run.unjudged else RESULTS)
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    name = "cpu" if run.device.type != "cuda" else _gpu_name(run)
    stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    content = {
        "command": run.command,
        **_versions(run),
        "seconds": run.seconds,
        "notes": run.notes,
        "verdicts": run.verdicts(),
        "checks": [asdict(check) | {"is_green": check.is_green} for check in run.checks],
        "rows": [asdict(row) for row in run.rows],
    }
    (folder / f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / f"{stem}.md").write_text(_markdown(run))


def _markdown(run: Run) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in _versions(run).items())
    missing = "" if fla_version() else " Peer not installed: fla-core."
    parts = [
        "# GPU benchmark",
        f"Command: `{run.command}`\n\n{versions}. {run.elapsed():.0f} s.{missing}",
        *run.notes,
        f"## Correctness\n\n{_checks_text(run)}",
        *(f"## {title}\n\n{_rows_text(rows)}" for title, rows in run.tables.items()),
        "## Targets\n\n" + "\n".join(f"- {line}" for line in run.verdicts()),
    ]
    return "\n\n".join(parts) + "\n"


def _checks_text(run: Run) -> str:
    rows = []
    for op in dict.fromkeys(check.op for check in run.checks):
        for precision in gpu_checks.TOLERANCE:
            found = [c for c in run.checks if (c.op, c.precision) == (op, precision)]
            if found:
                worst, red = max(c.worst for c in found), sum(not c.is_green for c in found)
                allowed = f"{gpu_checks.TOLERANCE[precision]:.0e}"
                rows.append([op, precision, str(len(found)), f"{worst:.1e}", allowed, str(red)])
    lines = [f"- RED: {check}" for check in run.checks if not check.is_green]
    text = (
        "Outputs, final states and all gradients against fp64 (per token where short), over memory "
        "full of NaN, each twice; errors are RMS over that of the reference."
    )
    header = ["op", "dtype", "checks", "worst error", "allowed", "red"]
    return "\n\n".join([text, table(header, rows), *(["\n".join(lines)] if lines else [])])


def _rows_text(rows: list[Row]) -> str:
    header = ["item", "by", "forward ms", "with backward ms", "q20-q80", "as graph ms"]
    header += ["peak MiB", "worst error", "note"]
    cells = []
    for row in rows:
        numbers = [""] * 5
        if cost := row.cost:
            both = cost.both
            numbers = [f"{cost.forward.median:.3f}", f"{both.median:.3f}"]
            numbers += [f"{both.low:.3f}-{both.high:.3f}"]
            numbers += [f"{cost.graph.median:.3f}" if cost.graph else "-"]
            numbers += ["-" if cost.peak is None else f"{cost.peak:.0f}"]
        note = row.note or (row.cost.note if row.cost else "")
        error = f"{row.worst:.1e}" if row.errors else ""
        cells.append([row.item, row.who, *numbers, error, " ".join(note.split())])
    return table(header, cells)


if __name__ == "__main__":
    sys.exit(main())
