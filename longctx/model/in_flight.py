"""What is in flight on one process between a forward and a backward pass."""

from dataclasses import dataclass, replace

import torch
from longctx_kernels.decay_torch import saved_rows
from torch import nn

from longctx.sequence.expected import Share

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.float32}
"""Of weights and of the residual stream."""
TRITON_CHUNK = 256
"""Tokens between the states that decay attention keeps on a GPU."""


@dataclass(frozen=True)
class Batch:
    """What is in flight."""

    rows: int
    tokens: int
    """Of each row."""
    precision: str = "fp32"
    """fp64, fp32, or bf16 by autocast."""
    documents: int = 0
    """Of all rows; 0 is one in each."""
    share: Share | None = None
    """What this process has of sequences that it shares with others; None holds whole ones."""
    rounds_weights: bool = True
    """Whether autocast rounds weights, which it does not if they arrive in bf16."""
    on_gpu: bool = False
    """Whether Triton computes what it can."""

    @property
    def pieces(self) -> int:
        """Parts of documents, of which each segment of each row has at least one."""
        return max(self.documents, self.rows * self.segments)

    @property
    def split(self) -> Share | None:
        """The share, if others have one too."""
        return self.share if self.share and self.share.placement.ranks > 1 else None

    @property
    def segments(self) -> int:
        """Of each row on this process."""
        return len(self.split.placement.segments[self.split.rank]) if self.split else 1

    @property
    def total(self) -> int:
        """Tokens of all rows."""
        return self.rows * self.tokens

    @property
    def wide(self) -> int:
        """Bytes of a number in the residual stream and in states."""
        return DTYPES[self.precision].itemsize

    @property
    def narrow(self) -> int:
        """Bytes of a number that linear maps take and give."""
        return 2 if self.precision == "bf16" else self.wide

    def normed(self, width: int, maps: int) -> int:
        """The output of a norm that so many linear maps read: one tensor, or each its rounded."""
        rounded = self.narrow < self.wide
        return self.total * width * (maps * self.narrow if rounded else self.wide)

    def rounded(self, module: nn.Module) -> int:
        """Rounded weights of the linear maps in a module."""
        maps = (m for m in module.modules() if isinstance(m, nn.Linear))
        rounds = self.narrow < self.wide and self.rounds_weights
        return sum(m.weight.numel() for m in maps) * (2 if rounds else 0)

    def states(self, heads: int, key_dim: int, value_dim: int, rows: int = 0) -> int:
        """Those that a recurrent core keeps on its way: of delta rules in PyTorch, whose states may
        have more `rows` than keys have elements; of decays, on a GPU, in Triton."""
        state = heads * (rows or key_dim) * value_dim
        if self.on_gpu and not rows and self.precision != "fp64":
            return (self.total // TRITON_CHUNK + self.pieces) * state * self.narrow
        slabs = saved_rows(self.total, self.pieces, heads * max(key_dim, value_dim))
        return slabs * state * self.wide

    def of_group(self) -> "Batch":
        """The same as a Ulysses group sees it, whose ranks hold some heads of all its tokens."""
        assert self.share is not None
        tokens, share = self.share.group_tokens, self.share.of_group()
        return replace(self, tokens=tokens, share=share)

    def arriving(self, left: int) -> int:
        """Tokens of all rows that come from other ranks because they lie just left of segments."""
        if self.split is None:
            return 0
        own = self.split.placement.segments[self.split.rank]
        near = [(max(0, segment.start - left), segment.start) for segment in own]
        held = sum(max(0, min(b, s.stop) - max(a, s.start)) for a, b in near for s in own)
        return self.rows * (sum(b - a for a, b in near) - held)
