"""Boxes and pieces: blocks of tensors on the processes, and in the files."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.parallel.box import Box

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of types in safetensors files."""
DTYPES = {code: dtype for dtype, code in CODES.items()}


def whole(name: str, tensor: Tensor) -> Box:
    """The box that is all of a tensor."""
    return Box(name, tuple(tensor.shape), (0,) * tensor.ndim, tensor.detach())


def sort_boxes(boxes: Iterable[Box]) -> list[list[Box]]:
    """The boxes that hold anything, so that no two of a list are of the same tensor.

    A tensor without elements has one box all the same. ValueError for what no file can hold.
    """
    lists: list[list[Box]] = [[]]
    counts: dict[str, int] = {}
    for box in boxes:
        block = tuple(box.tensor.shape)
        if not fits(box.offsets, block, box.shape):
            raise ValueError(f"{box.name}: no block {block} at {box.offsets} in shape {box.shape}")
        if box.tensor.dtype not in CODES:
            raise ValueError(f"{box.name}: safetensors holds no {box.tensor.dtype}")
        if box.tensor.numel() == 0 and math.prod(box.shape) > 0:
            continue
        count = counts[box.name] = counts.get(box.name, 0) + 1
        if count > len(lists):
            lists.append([])
        lists[count - 1].append(box)
    return lists


@dataclass(frozen=True)
class Piece:
    """Where a file's block of a tensor belongs."""

    dtype: str
    """safetensors' name of the type."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    offsets: tuple[int, ...]
    """Where the block starts in the whole tensor."""
    block: tuple[int, ...]
    """Shape of the block."""


@dataclass(frozen=True)
class Spread:
    """A whole tensor and the files that hold its pieces."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[tuple[str, Piece], ...]


def fits(offsets: tuple[int, ...], block: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a block at `offsets` lies inside a tensor of this shape."""
    if not len(offsets) == len(block) == len(shape):
        return False
    return all(o >= 0 and b >= 0 and o + b <= s for o, b, s in zip(offsets, block, shape))


def overlap(
    offsets: tuple[int, ...], block: tuple[int, ...], piece: Piece
) -> list[tuple[int, int]] | None:
    """From where to where a block and a piece meet, in each dimension of the whole tensor."""
    ends = zip(offsets, block, piece.offsets, piece.block)
    meets = [(max(o, p), min(o + b, p + q)) for o, b, p, q in ends]
    return meets if all(start < stop for start, stop in meets) else None


def assemble(files: dict[str, dict[str, Piece]]) -> dict[str, Spread]:
    """The tensors that the files hold together; ValueError for one with gaps or overlaps."""
    found: dict[str, list[tuple[str, Piece]]] = {}
    for file, pieces in files.items():
        for name, piece in pieces.items():
            found.setdefault(name, []).append((file, piece))
    spreads = {}
    for name, held in found.items():
        first = held[0][1]
        for file, piece in held:
            if (piece.dtype, piece.shape) != (first.dtype, first.shape):
                raise ValueError(
                    f"{name} is {first.dtype} {list(first.shape)} in {held[0][0]} "
                    f"but {piece.dtype} {list(piece.shape)} in {file}"
                )
        _check_cover(name, first.shape, [piece for _, piece in held])
        spreads[name] = Spread(DTYPES[first.dtype], first.shape, tuple(held))
    return spreads


def _check_cover(name: str, shape: tuple[int, ...], pieces: Iterable[Piece]) -> None:
    """Whether each element is in one piece: the pieces are as large as the whole and disjoint."""
    wanted, covered = math.prod(shape), 0
    open_pieces: list[Piece] = []
    for piece in sorted(pieces, key=lambda p: p.offsets):
        covered += math.prod(piece.block)
        if not shape:
            overlapping = covered > 1
        else:
            open_pieces = [p for p in open_pieces if p.offsets[0] + p.block[0] > piece.offsets[0]]
            overlapping = any(overlap(piece.offsets, piece.block, p) for p in open_pieces)
            open_pieces.append(piece)
        if overlapping:
            raise ValueError(
                f"{name} {list(shape)}: two files hold the elements at {piece.offsets}"
            )
    if covered != wanted:
        raise ValueError(f"{name} {list(shape)}: only {covered} of {wanted} elements are in a file")
