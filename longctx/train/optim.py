"""AdamW, Muon, and their learning-rate schedule."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from longctx.errors import InputError
from longctx.model.decoder import Decoder
from longctx.model.matrices import growing_matrices, hidden_matrices, thin_matrices
from longctx.parallel.muon import Muon, Wholes


@dataclass(frozen=True)
class OptimConfig:
    """The `[optim]` table."""

    kind: Literal["adamw", "muon"] = "adamw"
    """Who changes the matrices of linear layers inside of blocks; everything else is AdamW's."""
    lr: float = 1e-3
    """Peak learning rate; Muon's changes have the size of AdamW's, so one serves both."""
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
    momentum: float = 0.95
    """Muon's averaging constant."""
    ns_steps: int = 5
    """Newton-Schulz iterations that make Muon's momentum orthogonal."""
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
        if not 0 <= self.momentum < 1:
            raise InputError(f"optim.momentum = {self.momentum}: must be at least 0 and below 1")
        if self.ns_steps < 1:
            raise InputError(f"optim.ns_steps = {self.ns_steps}: must be at least 1")


def muon_names(model: Decoder) -> list[str]:
    """Weights that Muon changes, of a model whose heads are not shared."""
    return list(hidden_matrices(model))


def build_optimizer(
    model: Decoder, config: OptimConfig, wholes: Wholes | None = None
) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only; or Muon beside it, which needs to know how the
    matrices of `muon_names` are held.

    A group's `lr_share` is what muP makes of the learning rate there; a step decays as it would
    without.
    """
    by_muon = set(muon_names(model)) if config.kind == "muon" else set[str]()
    narrowing, growing = model.config.narrowing, growing_matrices(model)
    thin = thin_matrices(model)
    own: list[dict[str, Any]] = []
    others: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        share = narrowing if name in growing else 1.0
        if name in by_muon:
            # An orthogonal change of a thin matrix grows with the longer side alone.
            own_share = share if name in thin else share**0.5
            own.append({"params": [parameter], "lr": config.lr, "lr_share": own_share})
        else:
            is_plain = parameter.dim() < 2 or parameter is model.embedding.weight
            others.setdefault((is_plain, share), []).append(parameter)
    for group in own:
        group["weight_decay"] = config.weight_decay / group["lr_share"]
    groups = [
        {
            "params": others[is_plain, share],
            "weight_decay": 0.0 if is_plain else config.weight_decay / share,
            "lr_share": share,
        }
        for is_plain, share in sorted(others)
    ]
    adamw = torch.optim.AdamW(
        groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps, fused=True
    )
    if not own:
        return adamw
    assert wholes is not None, "Muon without a way to bring matrices together"
    return Muon(own, wholes, adamw, config.momentum, config.ns_steps)


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
