"""Compares the losses of runs at equal settings: python docs/results/precision.py RUN RUN ..."""

import json
import sys
from pathlib import Path

WINDOW = 100


def means(run: Path) -> list[float]:
    """Mean training loss of every `WINDOW` steps."""
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [sum(losses[i : i + WINDOW]) / WINDOW for i in range(0, len(losses), WINDOW)]


def main(names: list[str]) -> None:
    """Prints a table of means, and the largest difference from the first run."""
    runs = [means(Path(name)) for name in names]
    print("| steps | " + " | ".join(Path(name).name for name in names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for i, row in enumerate(zip(*runs)):
        cells = " | ".join(f"{value:.4f}" for value in row)
        print(f"| {i * WINDOW + 1}-{(i + 1) * WINDOW} | {cells} |")
    for name, run in zip(names[1:], runs[1:]):
        differences = [b - a for a, b in zip(runs[0], run)]
        print(f"{Path(name).name}: {min(differences):+.4f} to {max(differences):+.4f}")


main(sys.argv[1:])
