"""Random directions of positive features (FAVOR+, arXiv 2009.14794), drawn once."""

import hashlib

import torch
from torch import Tensor


def random_features(seed: int, layer: int, head: int, count: int, size: int) -> Tensor:
    """`[count, size]` in fp32: orthogonal blocks whose rows are as long as normal vectors."""
    key = hashlib.sha256(f"favor/{seed}/{layer}/{head}".encode()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(key, "big") >> 1)

    def normal() -> Tensor:
        shape = (size, size)
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    blocks, lengths = [], []
    for _ in range(-(-count // size)):
        q, r = torch.linalg.qr(normal())
        # Which signs a factorisation chooses is up to the library; those of r make q unique.
        blocks.append((q * r.diagonal().sign()).mT)
        lengths.append(normal().norm(dim=1, keepdim=True))
    return (torch.cat(blocks) * torch.cat(lengths))[:count].float()
