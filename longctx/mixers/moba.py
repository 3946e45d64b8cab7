"""MoBA (arXiv 2502.13189): attention to a query's own block and to the best of those before.

How well an earlier block fits is the product of the query and the block's mean key, in fp32, as in
the released code; heads of a key group sum theirs and share a selection. One softmax goes over all
that is seen. Nothing is learned for selecting, and nothing is differentiated through it.
"""

from dataclasses import dataclass

from longctx.mixers.base import Place
from longctx.mixers.selecting import Selecting, SelectingConfig


@dataclass(frozen=True)
class MoBAConfig(SelectingConfig, kind="moba"):
    """Attention to blocks that are selected by their mean keys."""

    def build(self, place: Place) -> Selecting:
        return Selecting(self, place)
