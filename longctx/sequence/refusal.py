"""What no layer can run on, and what one of them refuses."""

from typing import Protocol

from longctx.sequence.sharded import Transports


class Refusing(Protocol):
    """A layer's config that knows what it cannot use."""

    def refusal(self, transports: Transports) -> str:
        """Why it cannot be built for these transports; empty if it can."""
        ...


def refuse(config: Refusing, placement: str, transports: Transports, ranks: int) -> str:
    """Why a layer cannot run on `ranks` ranks like this, and what would work; empty if it can."""
    heads = transports.heads
    if ranks % heads:
        return f"parallel.heads = {heads} does not divide the {ranks} ranks of a sequence"
    if placement == "mirror" and heads % 2:
        return (
            "parallel.placement = 'mirror' needs an even number of parallel.heads: "
            "set heads = 2, or choose placement 'contiguous' or 'zigzag'"
        )
    if transports.prefix == "ulysses" and heads == 1 < ranks:
        return (
            "parallel.prefix = 'ulysses' needs parallel.heads > 1: set heads, "
            "or choose prefix 'allgather', 'scan' or 'serial'"
        )
    return config.refusal(transports)
