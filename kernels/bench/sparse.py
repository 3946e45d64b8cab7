"""Times sparse layers against full softmax, and holds them to what their visible pairs predict.

`python kernels/bench/sparse.py` writes docs/results/sparse-cost.md: one layer, forward and
backward. A layer should be faster than full softmax by the ratio of their FLOPs, which count each
visible pair once, within a factor of `SLACK`. Then every layer runs once more on longer sequences
while the largest block of memory that it asks for is recorded. The exit code is 1 if a layer is
slower than that, or asks for as much as a quarter of a byte for each pair of tokens.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from layers import Example
from report import machine, table

from longctx.mixers import Mixer, Place
from longctx.sequence.local import LocalView
from longctx.train.hardware import keep_freed_memory

REPORT = Path(__file__).parents[2] / "docs" / "results" / "sparse-cost.md"
SLACK = 2.0
WIDTH, HEADS, DEPTH = 256, 4, 4
FULL = "softmax"
LAYERS: dict[str, dict[str, Any]] = {
    FULL: {"kind": "softmax"},
    "window 1024": {"kind": "softmax", "window": 1024},
    "s2, 1/8 + 8 blocks": {"kind": "s2", "stride": 4, "local_blocks": 8},
    "fixed, 8 of 128": {"kind": "fixed"},
    "strided, 1/16 + 8 blocks": {"kind": "strided", "stride": 16},
    "neighbourhood 1024": {"kind": "neighbourhood", "window": 1024},
    "power": {"kind": "power"},
    "dma, 512": {"kind": "dma"},
    "lte, 768 + 512": {"kind": "lte"},
    "moba, 8 blocks": {"kind": "moba", "num_blocks": 8},
    "nsa": {"kind": "nsa", "num_kv_heads": 1},
    "scatterbrain": {"kind": "scatterbrain"},
    "sla": {"kind": "sla"},
    "combiner": {"kind": "combiner"},
    "bilevel": {"kind": "bilevel"},
    "mosa, 1/16": {"kind": "mosa", "sparsity": 16, "num_heads": 16, "head_dim": 64},
}


def layer(name: str) -> Mixer:
    """The layer with matrices of unit gain, so that choices differ."""
    example = Example(name, {"num_heads": HEADS, **LAYERS[name]})
    example.config(HEADS).check(WIDTH, name)
    return example.build(HEADS, Place(WIDTH, 0, DEPTH))


def work_on(mixer: Mixer, length: int) -> Callable[[], None]:
    """A forward and a backward pass."""
    x_BTD = torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(1))
    view = LocalView.whole(1, length)

    def work() -> None:
        mixed = mixer(x_BTD.requires_grad_(), view)
        (mixed.out.square().mean() + sum(mixed.losses.values())).backward()

    return work


def seconds(work: Callable[[], None], repeats: int) -> float:
    """Median, after a call that is not counted."""
    work()
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        samples.append(time.perf_counter() - start)
    return median(samples)


def largest_allocation(work: Callable[[], None]) -> int:
    """Bytes of the largest block of memory that a call asks for."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


def compare(length: int, repeats: int) -> tuple[list[list[str]], list[str]]:
    """Rows of the table of times, and what is too slow."""
    contexts, rows, slow = torch.arange(1, length + 1), [], []
    full_seconds = full_flops = 0.0
    for name in LAYERS:
        mixer = layer(name)
        taken, flops = seconds(work_on(mixer, length), repeats), mixer.flops(contexts)
        if name == FULL:
            full_seconds, full_flops = taken, flops
        faster, predicted = full_seconds / taken, full_flops / flops
        rows.append([name, f"{taken:.2f}", f"{predicted:.1f}", f"{faster:.1f}"])
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
        if faster < predicted / SLACK:
            slow.append(f"{name}: {faster:.1f} times as fast as softmax, {predicted:.1f} predicted")
    return rows, slow


def watch(length: int) -> tuple[list[list[str]], list[str]]:
    """Rows of the table of memory, and what takes too much."""
    rows, large = [], []
    for name in LAYERS:
        if name == FULL:
            continue
        mib = largest_allocation(work_on(layer(name), length)) / 2**20
        rows.append([name, f"{mib:,.0f}", f"{mib * 2**20 / length / WIDTH / 4:.1f}"])
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
        if mib * 2**20 >= length**2 / 4:
            large.append(f"{name}: asks for {mib:,.0f} MiB at once")
    return rows, large


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=32768, help="tokens when timed")
    parser.add_argument("--watched", type=int, default=65536, help="tokens when memory is recorded")
    parser.add_argument("--repeats", type=int, default=3, help="samples of each layer")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)  # what is compared is work, and not how well it spreads
    times, slow = compare(options.length, options.repeats)
    memory, large = watch(options.watched)
    wrong = slow + large
    REPORT.write_text(
        "\n\n".join(
            [
                "# What sparse layers cost on a CPU",
                f"Command: `{' '.join(['python kernels/bench/sparse.py', *sys.argv[1:]])}`",
                f"Machine: {machine()}",
                f"One layer with its projections, B 1, T {options.length}, width {WIDTH}, {HEADS} "
                f"heads (MoSA 16) x {WIDTH // HEADS}, fp32; forward and backward on one thread, "
                f"median of {options.repeats}. Predicted is the ratio of FLOPs, those of full "
                "softmax over the layer's.",
                table(["layer", "seconds", "predicted", "times as fast as softmax"], times),
                "\n".join(f"- FAIL: {line}" for line in wrong)
                or f"PASS: every layer is within {SLACK:g} times of what its FLOPs predict, and "
                "none asks for a quarter of a byte for each pair of tokens.",
                f"## The largest block of memory at T {options.watched}",
                "Of all that is asked for in a forward and a backward pass, kernels included.",
                table(["layer", "MiB", "times the layer's input"], memory),
            ]
        )
        + "\n"
    )
    print("\n".join(wrong) or f"wrote {REPORT}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
