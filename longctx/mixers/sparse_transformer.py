"""The patterns of Sparse Transformers (arXiv 1904.10509): fixed columns, and strides.

Both sum what their heads or layers would see in turn: near tokens, and far ones, in every head.
"""

from dataclasses import dataclass, replace

from longctx.errors import InputError
from longctx.mixers.base import Place, indivisible
from longctx.mixers.patterned import PatternedConfig
from longctx.sequence.policy import Fixed, Strided


@dataclass(frozen=True)
class FixedConfig(PatternedConfig, kind="fixed"):
    """The own block, and summary columns of every block before it."""

    block: int = 128
    """Tokens of a block."""
    columns: int = 8
    """Last tokens of a block that stay visible."""
    verticals: int = 1
    """So many choices of columns, one after another from the end of a block, taken by key heads in
    turn."""

    def policy(self) -> Fixed:
        return Fixed(self.block, self.columns, self.verticals, self.key_heads)

    def policy_at(self, place: Place) -> Fixed:
        return replace(self.policy(), first=place.part * self.key_heads)

    def tp_refusal(self, tp: int) -> str:
        parted = indivisible("num_kv_heads", self.key_heads, "tp", tp)
        return super().tp_refusal(tp) or (parted if self.verticals > 1 else "")

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        self.check_positive(where, "block", "columns", "verticals")
        if self.columns * self.verticals > self.block:
            raise InputError(
                f"{where}.columns = {self.columns}: {self.verticals} times as many are more than a "
                f"block of {self.block}"
            )


@dataclass(frozen=True)
class StridedConfig(PatternedConfig, kind="strided"):
    """The last blocks, and of those before every one at a multiple of a stride."""

    block: int = 64
    """Tokens of a block; 1 is the paper's pattern, and slow."""
    local_blocks: int = 8
    """Blocks that are seen, the query's own included."""
    stride: int = 8
    """Blocks from one that is seen to the next."""

    def policy(self) -> Strided:
        return Strided(self.block, self.local_blocks, self.stride)

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        self.check_positive(where, "block", "local_blocks", "stride")
