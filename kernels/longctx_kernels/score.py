"""What the paths of lifetime attention share: the score, its normalisers, and gradients."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NORMALISERS = ("softmax", "sigmoid", "relu", "softplus", "signed")


@dataclass(frozen=True)
class Score:
    """`scale * q . k + key bias + query bias`, and what makes weights of it.

    "signed" weights are sign(s) exp|s| / sum exp|s|; "softplus" ones softplus(s) over their sum;
    "sigmoid" and "relu" ones are not normalised, and their lse is 0.
    """

    scale: float
    normaliser: str = "softmax"
    key_bias_UH: Tensor | None = None
    query_bias_TH: Tensor | None = None

    @property
    def is_sum(self) -> bool:
        """Whether partial results just add up."""
        return self.normaliser in ("sigmoid", "relu")


class Gradients(NamedTuple):
    """Gradients of the operands; none for a bias that is not there."""

    dq_THK: Tensor
    dk_UJK: Tensor
    dv_UJV: Tensor
    dkey_bias_UH: Tensor | None = None
    dquery_bias_TH: Tensor | None = None


def wide_dtype(x: Tensor) -> torch.dtype:
    """At least fp32, for sums and log-sum-exps."""
    return torch.promote_types(x.dtype, torch.float32)
