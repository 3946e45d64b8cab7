"""How long saves keep training waiting, in the background and not; prints a Markdown table.

python -m tests.checkpoint.measure_stall --megabytes 256 --steps 15 --folder /some/disk
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from longctx.checkpoint import CheckpointConfig, Checkpoints, whole


class Job:
    """Steps of matrix products that change tensors at their end, and a save after each."""

    def __init__(self, folder: Path, megabytes: int, asynchronous: bool):
        self._tensors = {f"model/{i}": torch.randn(2**18) for i in range(megabytes)}
        self.checkpoints = Checkpoints(folder, CheckpointConfig(keep=1, asynchronous=asynchronous))
        self._matrix = torch.randn(1024, 1024)

    def step(self, number: int, products: int) -> float:
        """Seconds that the step waited for its checkpoint."""
        for _ in range(products):
            self._matrix @ self._matrix
        started = time.perf_counter()
        self.checkpoints.settle()
        waited = time.perf_counter() - started
        for tensor in self._tensors.values():
            tensor.add_(1)
        boxes = [whole(name, tensor) for name, tensor in self._tensors.items()]
        started = time.perf_counter()
        self.checkpoints.save(number, boxes, {})
        return waited + time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--products", type=int, default=60, help="so many 1024^3 a step")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    print(f"{options.megabytes} MB in tensors of 1 MB, {torch.get_num_threads()} threads\n")
    print("| saves | first, ms | median of the others, ms | longest, ms |\n|---|---|---|---|")
    medians = []
    for name, asynchronous in (("synchronous", False), ("in the background", True)):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            job = Job(Path(folder), options.megabytes, asynchronous)
            seconds = [job.step(number, options.products) for number in range(options.steps)]
            job.checkpoints.wait()
        medians.append(statistics.median(seconds[1:]))
        figures = (seconds[0], medians[-1], max(seconds))
        print(f"| {name} | " + " | ".join(f"{1000 * s:.1f}" for s in figures) + " |")
    print(f"\nThe background keeps it waiting for {medians[1] / medians[0]:.1%} of that.")


if __name__ == "__main__":
    main()
