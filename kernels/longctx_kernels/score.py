"""What the paths of lifetime attention share: the score, its normalisers, and gradients."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NORMALISERS = ("softmax", "sigmoid", "relu", "softplus", "signed")


@dataclass(frozen=True)
class Score:
    """`scale * q . k + slope * (key position - query position) + (key bias + query bias)`, and
    what makes weights of it.

    Slopes, which have no gradient, weigh far keys less if they are positive (ALiBi). Biases are
    added to each other first: large ones of opposite signs lose nothing of the product.
    "signed" weights are sign(s) exp|s| / sum exp|s|; "softplus" ones softplus(s) over their sum;
    "sigmoid" and "relu" ones are not normalised, and their lse is 0.
    """

    scale: float
    normaliser: str = "softmax"
    key_bias_UH: Tensor | None = None
    query_bias_TH: Tensor | None = None
    slope_H: Tensor | None = None

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


def bias_of(score: Score, rows: slice, columns: slice | Tensor, heads: slice) -> Tensor | None:
    """The sum of biases in a tile, `[t, u, heads]` or what broadcasts to that."""
    key, query = score.key_bias_UH, score.query_bias_TH
    key_1uH = None if key is None else key[None, columns][:, :, heads]
    query_t1H = None if query is None else query[rows, None, heads]
    if key_1uH is None or query_t1H is None:
        return query_t1H if key_1uH is None else key_1uH
    return key_1uH + query_t1H


def wide_dtype(x: Tensor) -> torch.dtype:
    """At least fp32, for sums and log-sum-exps."""
    return torch.promote_types(x.dtype, torch.float32)
