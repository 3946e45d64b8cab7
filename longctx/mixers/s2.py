"""S2-Attention (arXiv 2407.17678): heads share out the past, and each sees its shard by block.

A query sees the last blocks, and of all before those whose number is right for its head. Positions
count from the start of a document.
"""

from dataclasses import dataclass, replace

from longctx.errors import InputError
from longctx.mixers.base import Place
from longctx.mixers.patterned import PatternedConfig
from longctx.sequence.policy import Sharded


@dataclass(frozen=True)
class S2Config(PatternedConfig, kind="s2"):
    """Attention in which key heads see different parts of the past."""

    block: int = 64
    """Tokens of a block."""
    local_blocks: int = 8
    """Blocks that every head sees, the query's own included."""
    stride: int = 8
    """Of the blocks before, a head sees one in so many."""
    dense_heads: int = 0
    """The first key heads, which see everything."""

    def policy(self) -> Sharded:
        return Sharded(self.block, self.local_blocks, self.stride, self.key_heads, self.dense_heads)

    one_key_head_is_shared = False

    def policy_at(self, place: Place) -> Sharded:
        heads = self.key_heads * place.parts
        return replace(self.policy(), heads=heads, part=place.part, parts=place.parts)

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        self.check_positive(where, "block", "local_blocks", "stride")
        if not 0 <= self.dense_heads < self.key_heads:
            raise InputError(
                f"{where}.dense_heads = {self.dense_heads}: must be at least 0 and below the "
                f"{self.key_heads} key heads"
            )
        if not self.policy().covers:
            raise InputError(
                f"{where}.stride = {self.stride}: {self.key_heads} key heads leave blocks that no "
                "head sees; lower it, or set dense_heads"
            )
