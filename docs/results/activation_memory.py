"""How much memory a step of a small hybrid takes on a CPU, with each saving switched on in turn.

    python docs/results/activation_memory.py [--tokens 65536] [--savings none,all]

Each row is a process of its own: the most that was resident in one forward and backward pass, less
what was resident after the model was built and had taken a step of 128 tokens.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

SAVINGS = {
    "none": {},
    "loss": {"loss_tokens": 1024},
    "full": {"loss_tokens": 1024, "checkpointing": "full"},
    "keep": {"loss_tokens": 1024, "checkpointing": "keep"},
    "all": {"loss_tokens": 1024, "checkpointing": "keep", "mlp_tokens": 1024},
}
VOCABULARY = 256
WARM_UP = 128
"""Tokens of a first step, after which everything is loaded that a step needs."""
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""What is freed is no longer resident."""


def resident(field: str) -> int:
    """Bytes of this process by a field of its status: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(saving: str, tokens: int) -> dict[str, float]:
    """One step in this process."""
    from longctx.model.decoder import Decoder, initialise
    from longctx.model.memory import MemoryConfig
    from longctx.model.saved_bytes import Batch, of_model
    from longctx.sequence.local import LocalView
    from longctx.train.settings import load_settings

    torch.set_num_threads(1)
    config, memory = load_settings("tiny").model, MemoryConfig(**SAVINGS[saving])
    predicted = of_model(config, VOCABULARY, memory, Batch(1, tokens))
    model = Decoder(config, VOCABULARY, memory).to(torch.float32)
    initialise(model, 0)

    def loss_of(tokens: int) -> torch.Tensor:
        view = LocalView.whole(1, tokens).keyed(0, 0, (0,))
        generator = torch.Generator().manual_seed(0)
        tokens_BT = torch.randint(VOCABULARY, (1, tokens), generator=generator)
        losses = model(tokens_BT, tokens_BT.roll(-1, 1), view)
        return losses.cross_entropy / tokens + sum(losses.mixers.values())

    loss_of(WARM_UP).backward()
    Path("/proc/self/clear_refs").write_text("5")
    before, started = resident("VmRSS"), time.perf_counter()
    loss = loss_of(tokens)
    kept = resident("VmRSS") - before
    loss.backward()
    return {
        "peak": resident("VmHWM") - before,
        "kept": kept,
        "formula": predicted,
        "seconds": time.perf_counter() - started,
        "loss": float(loss.detach()),
    }


def table(savings: list[str], tokens: int) -> list[tuple[str, dict[str, float]]]:
    """Every row in a process of its own."""
    rows = []
    for saving in savings:
        call = [sys.executable, __file__, "--one", saving, "--tokens", str(tokens)]
        done = subprocess.run(
            call, check=True, capture_output=True, text=True, env=os.environ | ALLOCATOR
        )
        rows.append((saving, json.loads(done.stdout)))
    return rows


def main() -> None:
    """Prints a table in Markdown, or one row as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--savings", default=",".join(SAVINGS))
    parser.add_argument("--one", choices=SAVINGS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.tokens)))
        return
    rows = table(options.savings.split(","), options.tokens)
    most = rows[0][1]["peak"]
    print("| savings | peak MiB | times less | after forward MiB | formula MiB | s | loss |")
    print("|---|---|---|---|---|---|---|")
    for saving, row in rows:
        mib = (row[name] / 2**20 for name in ("peak", "kept", "formula"))
        peak, kept, formula = (f"{value:.0f}" for value in mib)
        print(
            f"| {saving} | {peak} | {most / row['peak']:.1f} | {kept} | {formula} | "
            f"{row['seconds']:.1f} | {row['loss']:.6f} |"
        )


if __name__ == "__main__":
    main()
