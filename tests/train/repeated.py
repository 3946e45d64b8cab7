"""Trains a few steps and prints digests of what came out: `python -m tests.train.repeated`."""

import sys

import torch

from longctx.model.decoder import Decoder, ModelConfig, initialise
from longctx.sequence.local import LocalView
from longctx.train.determinism import make_deterministic
from longctx.train.replicas import weights_digest
from tests.mixers.examples import VARIANTS, WIDTH

VOCABULARY = 40


def every_kind() -> ModelConfig:
    """A layer of each kind."""
    firsts = [next(iter(variants.values())) for variants in VARIANTS.values()]
    mixers = {chr(ord("A") + i): mixer for i, mixer in enumerate(firsts)}
    return ModelConfig(width=WIDTH, depth=len(mixers), pattern="".join(mixers), mixers=mixers)


def hybrid() -> ModelConfig:
    """Linear, delta, routed softmax and sparse layers."""
    kinds = {"L": "linear", "D": "gdn", "S": "moh", "N": "nsa"}
    mixers = {letter: next(iter(VARIANTS[kind].values())) for letter, kind in kinds.items()}
    return ModelConfig(width=64, depth=4, pattern="LDSN", mixers=mixers)


def trained(config: ModelConfig, length: int, steps: int) -> list[int]:
    """Digests of the weights, and of the last loss, of a model after a few steps."""
    model = Decoder(config, VOCABULARY)
    initialise(model, seed=5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    tokens = torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))
    documents = torch.zeros(2, length, dtype=torch.int32)
    documents[:, 17:] = 1
    for step in range(steps):
        view = LocalView.of_ids(documents).keyed(5, step, [2 * step, 2 * step + 1])
        losses = model(tokens, tokens, view)
        total = losses.cross_entropy / tokens.numel() + sum(losses.mixers.values())
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.adapt(losses.statistics, tokens.numel())
    return weights_digest([*model.state_dict().values(), total.detach()]).tolist()


if __name__ == "__main__":
    make_deterministic()
    sys.stdout.write(f"{torch.get_num_threads()} {trained(hybrid(), length=700, steps=2)}\n")
