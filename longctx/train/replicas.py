"""Whether processes that should hold the same weights do, bit for bit."""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from longctx.errors import OutsideError
from longctx.train.culprits import ranks

CHUNK = 1 << 20
"""Elements that are hashed at a time."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def weights_digest(tensors: Sequence[Tensor]) -> Tensor:
    """A 64-bit hash of the bits of each tensor, [tensors] int64, exact on any device.

    An element's bits times an odd number that depends on its place, summed modulo 2^64: one changed
    element always changes the sum.
    """
    return torch.stack([_digest(tensor) for tensor in tensors])


def check_replicas(
    weights: Mapping[str, Tensor],
    gather: Callable[[Tensor], Sequence[Tensor]],
    replicas: Sequence[Sequence[int]],
) -> None:
    """Refuses to go on if processes of one of these groups hold different weights.

    `weights` are this process's parts, by the same names everywhere; `gather` brings one tensor
    from every process, in order of ranks.
    """
    names = list(weights)
    digests = torch.stack(list(gather(weights_digest(list(weights.values()))))).cpu()
    for group in replicas:
        differs_N = (digests[list(group)] != digests[group[0]]).any(0)
        if differs_N.any():
            first = int(differs_N.to(torch.int8).argmax())
            values = {rank: int(digests[rank, first]) for rank in group}
            raise OutsideError(_message(names[first], values, int(differs_N.sum())))


def _message(name: str, digests: Mapping[int, int], differing: int) -> str:
    """The ranks in the minority, or all of them if there is none."""
    (common, votes), *_ = Counter(digests.values()).most_common()
    odd = [rank for rank, digest in digests.items() if digest != common]
    told = f"{ranks(odd)} differ{'s' * (len(odd) == 1)} from the other replicas"
    if 2 * votes <= len(digests):
        told = f"{ranks(digests)} differ from one another"
    return (
        f"{told} in {differing} of the weights, first in {name}: a device computes wrongly or its "
        "memory is damaged; take that machine out and go on from the last checkpoint"
    )


def _digest(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().reshape(-1)
    bits = flat.view(_BITS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for number, chunk in enumerate(bits.split(CHUNK)):
        factors = _factors(bits.device)[: len(chunk)]
        total += (chunk.to(torch.int64) * factors).sum() * _odd(number)
    return total


@functools.lru_cache(maxsize=1)
def _factors(device: torch.device) -> Tensor:
    """An odd number for each place in a chunk, the same everywhere."""
    generator = torch.Generator().manual_seed(0x5EED)
    lowest, highest = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    return torch.randint(lowest, highest, (CHUNK,), generator=generator).bitwise_or(1).to(device)


def _odd(number: int) -> int:
    """An odd 64-bit number, as a signed one, for each chunk."""
    mixed = (number + 1) * 0x9E3779B97F4A7C15 % 2**64
    mixed = (mixed ^ mixed >> 31) * 0xBF58476D1CE4E5B9 % 2**64 | 1
    return mixed - 2**64 if mixed >= 2**63 else mixed
