"""Which learning rate is best at three widths, with muP and without, under AdamW and Muon; with
`--tied` of a model whose head is its embedding, at the default init_std."""

import sys
import sysconfig
from pathlib import Path

import torch

from longctx.mixers.linear import LinearConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.decoder import Decoder, ModelConfig, initialise
from longctx.model.matrices import hidden_matrices
from longctx.parallel import Mesh, ParallelConfig, resolve
from longctx.parallel.engine import Replicated
from longctx.parallel.matrices import spread
from longctx.parallel.muon import Wholes
from longctx.sequence.local import LocalView
from longctx.train.optim import OptimConfig, build_optimizer, learning_rate

BASE, WIDTHS = 32, (32, 64, 128)
STEPS, ROWS, LENGTH, LAST = 120, 8, 64, 20
TIED = "--tied" in sys.argv
POWERS = range(8, 2, -1) if TIED else range(9, 3, -1)


def batches() -> torch.Tensor:
    """Bytes of the standard library, the same for every run."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = b"".join((folder / f"{name}.py").read_bytes() for name in ("argparse", "ast", "typing"))
    needed = STEPS * ROWS * (LENGTH + 1)
    order = torch.randperm(len(text) // 65, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor(list(text[: len(text) // 65 * 65])).view(-1, 65)[order]
    return rows.repeat(-(-needed // rows.numel()), 1)[: STEPS * ROWS].view(STEPS, ROWS, 65)


def loss(width: int, base_width: int, kind: str, lr: float, data: torch.Tensor) -> float:
    """Mean loss of the last steps."""
    heads = {"num_heads": width // 16, "head_dim": 16}
    mixers = {"L": LinearConfig(**heads), "S": SoftmaxConfig(**heads)}
    model_config = ModelConfig(
        width=width, depth=2, pattern="LS", mixers=mixers, mlp_hidden=2 * width,
        base_width=base_width, tied_head=TIED, init_std=0.02 if TIED else 0.1,
    )  # fmt: skip
    model = Decoder(model_config, 256)
    initialise(model, 0)
    layers = model_config.layers
    mesh = Mesh(resolve(ParallelConfig(), layers, 1, LENGTH), torch.device("cpu"), 60)
    wholes = Wholes(mesh, spread(hidden_matrices(model), None, False), torch.float32)
    optim = OptimConfig(kind=kind, lr=lr, warmup_steps=STEPS // 10)
    engine = Replicated(model, build_optimizer(model, optim, wholes), optim.clip_norm, mesh)
    losses = []
    for step, rows in enumerate(data, start=1):
        result = model(rows[:, :-1], rows[:, 1:], LocalView.whole(ROWS, LENGTH))
        mean = result.cross_entropy / (ROWS * LENGTH)
        engine.backward(mean)
        engine.gradient_norm()
        engine.update(learning_rate(optim, step, STEPS))
        losses.append(float(mean.detach()))
    return sum(losses[-LAST:]) / LAST


def main() -> None:
    """Prints a table for each optimizer."""
    torch.set_num_threads(1)
    data = batches()
    for kind in ("adamw", "muon"):
        print(f"\n| {kind}, width | " + " | ".join(f"2^{-k}" for k in POWERS) + " |")
        print("|---|" + "---:|" * len(POWERS))
        for base_width in (0, BASE):
            for width in WIDTHS:
                if base_width == width:
                    continue  # the same as without muP
                row = [loss(width, base_width, kind, 2.0**-k, data) for k in POWERS]
                told = [f"**{x:.3f}**" if x == min(row) else f"{x:.3f}" for x in row]
                name = f"{width}, muP from {BASE}" if base_width else f"{width}"
                print(f"| {name} | " + " | ".join(told) + " |", flush=True)


if __name__ == "__main__":
    main()
