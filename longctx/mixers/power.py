"""PowerAttention (arXiv 2503.03588): blocks near by, and at distances of powers of two.

L layers reach 2^L blocks. With shards of a power of two blocks each in order, a rank fetches just
log2(ranks) whole shards.
"""

from dataclasses import dataclass

from longctx.errors import InputError
from longctx.mixers.patterned import PatternedConfig
from longctx.sequence.policy import Power


@dataclass(frozen=True)
class PowerConfig(PatternedConfig, kind="power"):
    """Attention to blocks at distances of powers of two."""

    block: int = 64
    """Tokens of a block."""
    window_blocks: int = 4
    """Blocks that are seen, the query's own included."""
    sink_blocks: int = 1
    """First blocks of a document, which every query sees."""

    def policy(self) -> Power:
        return Power(self.block, self.window_blocks, self.sink_blocks)

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        self.check_positive(where, "block", "window_blocks")
        if self.sink_blocks < 0:
            raise InputError(f"{where}.sink_blocks = {self.sink_blocks}: must not be negative")
