"""Random numbers that depend on (seed, step, layer, sequence, position), never on the split."""

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX = (-4658895280553007687, -7723592293110705685)  # the two multipliers of splitmix64


def token_keys(seed: int, step: int, sequence_ids: tuple[int, ...], positions_BT: Tensor) -> Tensor:
    """An int64 key per token, from its place in the whole sequence."""
    rows = torch.tensor(sequence_ids, dtype=torch.int64, device=positions_BT.device)[:, None]
    keys = torch.full_like(positions_BT, seed)
    for part in (torch.full_like(positions_BT, step), rows, positions_BT):
        keys = _mix(keys + part * _GOLDEN + 1)
    return keys


def uniform(keys_BT: Tensor, layer: int, purpose: int, width: int) -> Tensor:
    """Numbers in [0, 1), `[B, T, width]` in fp32; each (layer, purpose) has its own."""
    number = torch.full_like(keys_BT, layer * 64 + purpose + 1)
    stream = _mix(keys_BT + number * _GOLDEN)
    channels = torch.arange(width, dtype=torch.int64, device=keys_BT.device)
    bits = _mix(stream[..., None] + channels * _GOLDEN)
    return _shifted(bits, 40).to(torch.float32) * 2.0**-24


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser; int64 products wrap as the unsigned ones do."""
    x = (x ^ _shifted(x, 30)) * _MIX[0]
    x = (x ^ _shifted(x, 27)) * _MIX[1]
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift to the right without carrying the sign in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
