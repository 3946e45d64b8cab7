"""How long a save stops the training, in the background and not; prints a Markdown table.

python -m tests.checkpoint.measure_stall --megabytes 256 --saves 5 --folder /some/disk
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from longctx.checkpoint import CheckpointConfig, Checkpoints, whole


def measure(folder: Path, megabytes: int, saves: int, asynchronous: bool) -> list[float]:
    """Seconds for which each save kept its caller."""
    tensors = {f"model/{i}": torch.randn(2**18) for i in range(megabytes)}
    checkpoints = Checkpoints(folder, CheckpointConfig(keep=1, asynchronous=asynchronous))
    seconds = []
    for step in range(saves):
        for tensor in tensors.values():
            tensor.add_(1)
        started = time.perf_counter()
        checkpoints.save(step, [whole(name, tensor) for name, tensor in tensors.items()], {})
        seconds.append(time.perf_counter() - started)
        checkpoints.wait()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    medians = {}
    print(f"{options.megabytes} MB in tensors of 1 MB, {torch.get_num_threads()} threads\n")
    print("| save | first, ms | median of the others, ms | longest, ms |\n|---|---|---|---|")
    for asynchronous in (False, True):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            seconds = measure(Path(folder), options.megabytes, options.saves, asynchronous)
        medians[asynchronous] = statistics.median(seconds[1:])
        name = "in the background" if asynchronous else "synchronous"
        figures = (seconds[0], medians[asynchronous], max(seconds))
        print(f"| {name} | " + " | ".join(f"{1000 * s:.1f}" for s in figures) + " |")
    print(
        f"\nThe background stalls for {medians[True] / medians[False]:.1%} of a synchronous save."
    )


if __name__ == "__main__":
    main()
