"""The parts of a decoder layer that do not mix tokens."""

import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """Gated feed-forward layer."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.project_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Each token on its own."""
        return self.project_out(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class SquaredReLU(nn.Module):
    """Feed-forward layer without a gate, as Nemotron-H has it."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=False)
        self.project_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Each token on its own."""
        return self.project_out(F.relu(self.up(x_BTD)).square())


FEED_FORWARD = {"swiglu": SwiGLU, "relu2": SquaredReLU}
