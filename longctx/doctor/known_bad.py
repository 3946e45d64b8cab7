"""Versions that are known to compute wrongly, hang or leak, with who says so."""

from typing import NamedTuple


class Bad(NamedTuple):
    """A range of versions of a package."""

    package: str
    first: str
    """Empty: from the beginning."""
    fixed: str
    """The first version after it; empty if there is none yet."""
    what: str
    source: str
    hopper_only: bool = False
    is_avoided: bool = False
    """longctx does not use what is bad; your own programs may."""

    def holds(self, version: str) -> bool:
        """Whether a version lies in the range."""
        number = as_numbers(version)
        return as_numbers(self.first) <= number and (
            not self.fixed or number < as_numbers(self.fixed)
        )


def as_numbers(version: str) -> tuple[int, ...]:
    """2.13.0+cpu as (2, 13), so that versions compare; what follows the numbers is left out."""
    numbers = []
    for word in version.split("+")[0].split("."):
        digits = word[: len(word) - len(word.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


KNOWN_BAD = (
    Bad("torch", "2.6", "2.7.1", "dist.barrier leaks 4 GB of GPU memory", "arXiv 2506.13996"),
    Bad(
        "torch",
        "2.7.0",
        "2.7.1",
        "NCCL may hang in groups made with device_id",
        "pytorch#153960",
    ),
    Bad(
        "torch",
        "",
        "2.10",
        "torch.load with weights_only can still corrupt memory: load no foreign .pt files",
        "CVE-2026-24747",
    ),
    Bad("nccl", "", "2.26.2", "ending a run may hang in ncclCommAbort", "pytorch#149546"),
    Bad("nccl", "2.29.2", "2.29.3", "hangs", "pytorch#174338"),
    Bad(
        "triton",
        "3.4",
        "3.7.1",
        "gated kernels of fla give wrong gradients, so fla refuses them with backend 'fla'",
        "fla-org/flash-linear-attention#640",
        hopper_only=True,
    ),
    Bad(
        "fla-core",
        "",
        "0.5.2",
        "its context parallelism of KDA gives wrong gradients on all ranks but the last",
        "fla-org/flash-linear-attention#1115",
        is_avoided=True,
    ),
    Bad(
        "deepspeed",
        "0.19.8",
        "",
        "TiledFusedLogitsLoss ignores the gradient that comes in",
        "compared with the plain loss, in 0.19.8",
        is_avoided=True,
    ),
)
