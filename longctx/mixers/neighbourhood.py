"""Neighbourhood attention in one dimension, causal, with a stride (generalised neighbourhoods).

Queries of a step of `stride` tokens share one window, which ends with the step; they see of it what
is not after them. A stride of a kernel's tile makes the pattern one of whole tiles.
"""

from dataclasses import dataclass

from longctx.errors import InputError
from longctx.mixers.patterned import PatternedConfig
from longctx.sequence.policy import Neighbourhood


@dataclass(frozen=True)
class NeighbourhoodConfig(PatternedConfig, kind="neighbourhood"):
    """Windows that move on by steps."""

    window: int = 512
    """Tokens from the first that is seen to the end of the step."""
    stride: int = 64
    """Tokens of a step; 1 is a sliding window."""

    def policy(self) -> Neighbourhood:
        return Neighbourhood(self.window, self.stride)

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        self.check_positive(where, "window", "stride")
        if self.stride > self.window:
            raise InputError(
                f"{where}.stride = {self.stride}: is longer than window = {self.window}, so that "
                "tokens would not see themselves; lower it"
            )
