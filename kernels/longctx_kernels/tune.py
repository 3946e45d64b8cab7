"""Times launch options around the shipped ones on this GPU, and rewrites its tables.

`python -m longctx_kernels.tune`: for each kernel and head size, every two options at a time, until
nothing is faster (`--quick`: one option at a time, once). What spills more than the shipped entry
or needs too much shared memory is not timed. Run the correctness suite (`make gpu`) afterwards.
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from longctx_kernels.ahead import SHARED_LIMITS, compile_launch
from longctx_kernels.launch import TABLES, Options, architecture_of, read_tables, recording
from longctx_kernels.specimens import Subject, subject_of

GAIN = 0.98
"""A candidate must take less than this share of the time of the best one so far."""

CHOICES = {"num_warps": (2, 4, 8), "num_stages": (1, 2, 3, 4)}
SMALLEST_TILE = 16


def main(argv: list[str] | None = None) -> int:
    """Tunes; 2 if there is no GPU."""
    parser = argparse.ArgumentParser(prog="longctx_kernels.tune", description=main.__doc__)
    parser.add_argument("--kernel", help="only this entry of the tables")
    parser.add_argument("--quick", action="store_true", help="one option at a time, once")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("tune needs a CUDA GPU: it times kernels", file=sys.stderr)
        return 2
    architecture = architecture_of(torch.device("cuda", torch.cuda.current_device()))
    names = {kernel for family in read_tables().values() for kernel in family.get(architecture, {})}
    if arguments.kernel and arguments.kernel not in names:
        parser.error(f"--kernel {arguments.kernel}: expected one of {', '.join(sorted(names))}")
    for family, table in read_tables().items():
        kernels = table.get(architecture, {})
        for kernel in kernels:
            if arguments.kernel in (None, kernel):
                for size in kernels[kernel]:
                    subject = subject_of(architecture, kernels, kernel, size)
                    tune_entry(architecture, kernel, kernels[kernel], subject, arguments.quick)
                    write_table(TABLES / f"{family}.json", table)
    return 0


def tune_entry(
    architecture: str, kernel: str, by_size: dict[str, Options], subject: Subject, quick: bool
) -> None:
    """Leaves the fastest options in the table `by_size`, which launches read."""
    size = str(subject.size)
    best = shipped = dict(by_size[size])
    allowed = spilled_bytes(architecture, kernel, subject)
    shortest = started_with = milliseconds(subject)
    tried = [shipped]
    while True:
        center = best
        for options in candidates(center, quick):
            if options in tried:
                continue
            tried.append(options)
            by_size[size] = options
            if spilled_bytes(architecture, kernel, subject) > allowed:
                continue
            if (took := milliseconds(subject)) < GAIN * shortest:
                best, shortest = options, took
        if best is center or quick:
            break
    by_size[size] = best
    changes = {name: value for name, value in best.items() if value != shipped[name]}
    print(
        f"{kernel} {size}: {started_with:.3f} -> {shortest:.3f} ms for forward and backward, "
        f"{len(tried)} tried, changes {changes or 'nothing'}",
        flush=True,
    )


def candidates(center: Options, quick: bool) -> Iterator[Options]:
    """Options that differ from `center` in one or, unless quick, two values."""
    choices = {
        name: CHOICES.get(name, (max(value // 2, SMALLEST_TILE), value, 2 * value))
        for name, value in center.items()
    }
    for names in itertools.combinations(choices, 1 if quick else 2):
        for values in itertools.product(*(choices[name] for name in names)):
            yield center | dict(zip(names, values))


def spilled_bytes(architecture: str, kernel: str, subject: Subject) -> float:
    """Most that launches of the kernel spill; infinite for what cannot run."""
    most = 0
    try:
        with recording(architecture) as launches:
            subject.on("meta")()
        for launch in launches:
            # Entries are named after their kernel, with the kind of gate or operand behind.
            if kernel.startswith(launch.kernel.__name__):
                compiled = compile_launch(launch, architecture)
                if compiled.shared_bytes > SHARED_LIMITS[architecture]:
                    return float("inf")
                most = max(most, compiled.spilled_bytes)
    except Exception:  # the compiler refuses some tiles, each in its own way
        return float("inf")
    return most


def milliseconds(subject: Subject) -> float:
    """Median time of forward and backward; infinite for what this GPU refuses."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return do_bench(subject.on("cuda"), warmup=25, rep=100, quantiles=[0.5])
    except OutOfResources:
        return float("inf")


def write_table(path: Path, table: dict) -> None:
    """Replaces the file at once, so that no reader sees half of it."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(table, indent=1) + "\n")
    os.replace(unfinished, path)


if __name__ == "__main__":
    sys.exit(main())
