"""AdamW and its learning-rate schedule."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from longctx.errors import InputError


@dataclass(frozen=True)
class OptimConfig:
    """The `[optim]` table."""

    lr: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After warm-up: a cosine, or constant with a linear decay at the end (wsd), or constant."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises from 0."""
    decay_steps: int = 0
    """Length of the final decay of wsd; 0 means a fifth of train.steps."""
    final_lr_share: float = 0.1
    """Learning rate at the end as a share of lr."""
    betas: tuple[float, ...] = (0.9, 0.95)
    """AdamW's two averaging constants."""
    eps: float = 1e-8
    """AdamW's term against division by zero."""
    weight_decay: float = 0.1
    """Decay of matrices; norms and embeddings have none."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            if getattr(self, name) <= 0:
                raise InputError(f"optim.{name} = {getattr(self, name)}: must be positive")
        for name in ("warmup_steps", "decay_steps", "weight_decay", "clip_norm", "final_lr_share"):
            if getattr(self, name) < 0:
                raise InputError(f"optim.{name} = {getattr(self, name)}: must not be negative")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"optim.betas = {list(self.betas)}: expected two numbers in [0, 1)")


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed, plain = [], []
    for parameter in model.parameters():
        is_matrix = parameter.dim() > 1 and id(parameter) not in embeddings
        (decayed if is_matrix else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps, fused=True
    )


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of the update that ends `step`, which counts from 1 to `steps`."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        length = min(config.decay_steps or max(1, steps // 5), steps - config.warmup_steps)
        left = min(1.0, (steps - step) / length)
    else:
        progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        left = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr_share + (1 - config.final_lr_share) * left)
