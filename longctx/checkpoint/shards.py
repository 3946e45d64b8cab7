"""A safetensors file of one process, in the layout that PyTorch's HuggingFaceStorageReader reads.

The header says for each block where it starts in its tensor, and how large the tensor is. PyTorch
needs no longctx to read such files, and nothing in them can be executed.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from longctx.checkpoint.boxes import CODES, DTYPES, Piece, fits
from longctx.checkpoint.strict import canonical, parse_object
from longctx.parallel.box import Box

SHARDING = "DCP_SHARDING_INFO"
LONGEST_HEADER = 100_000_000
"""Bytes; safetensors refuses more."""
MOST_ELEMENTS = 2**62
CHUNK = 1 << 22


def shard_name(index: int, count: int) -> str:
    """Name of one of the files of tensors."""
    return f"shard-{index + 1:05}-of-{count:05}.safetensors"


@dataclass(frozen=True)
class Sum:
    """Size and sha256 of a file."""

    bytes: int
    sha256: str


def write_shard(file: BinaryIO, boxes: Iterable[Box]) -> tuple[Sum, dict[str, Piece]]:
    """Writes boxes of different tensors; what the file must be from now on, and what it holds."""
    kept = sorted(boxes, key=lambda box: (-box.tensor.element_size(), box.name))
    pieces = {
        box.name: Piece(CODES[box.tensor.dtype], box.shape, box.offsets, tuple(box.tensor.shape))
        for box in kept
    }
    sha, size = hashlib.sha256(), 0
    for part in _parts(_header(kept, pieces), kept):
        for start in range(0, len(part), CHUNK):
            chunk = part[start : start + CHUNK]
            sha.update(chunk)
            file.write(chunk)
        size += len(part)
    return Sum(size, sha.hexdigest()), pieces


def _header(boxes: list[Box], pieces: dict[str, Piece]) -> bytes:
    sharding = {
        name: {"saved_offsets": piece.offsets, "shape": piece.shape}
        for name, piece in pieces.items()
    }
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt", SHARDING: canonical(sharding).decode()}
    }
    start = 0
    for box in boxes:
        piece, stop = pieces[box.name], start + box.tensor.nbytes
        header[box.name] = {
            "dtype": piece.dtype,
            "shape": piece.block,
            "data_offsets": (start, stop),
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _parts(header: bytes, boxes: list[Box]) -> Iterator[memoryview]:
    yield memoryview(struct.pack("<Q", len(header)) + header)
    for box in boxes:
        yield memoryview(_as_bytes(box.tensor))


def _as_bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def read_pieces(file: BinaryIO) -> dict[str, Piece]:
    """What a shard holds; ValueError if its header is not exactly right for its data."""
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise ValueError("shorter than a header")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(size - 8, LONGEST_HEADER):
        raise ValueError("the header is longer than the file")
    header = parse_object(file.read(length))
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not isinstance(metadata.get(SHARDING), str):
        raise ValueError(f"the header has no {SHARDING}")
    sharding = parse_object(metadata[SHARDING].encode())
    if sharding.keys() != header.keys():
        raise ValueError(f"the header has other tensors than its {SHARDING}")
    pieces, spans = {}, []
    for name, entry in header.items():
        pieces[name], span = _read_entry(name, entry, sharding[name])
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError("data of tensors overlap or have gaps")
        end = stop
    if end != size - 8 - length:
        raise ValueError("the file is longer or shorter than its header says")
    return pieces


def _read_entry(name: str, entry: Any, sharding: Any) -> tuple[Piece, tuple[int, int]]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name}: the header's entry is not that of a tensor")
    if not isinstance(sharding, dict) or str(entry["dtype"]) not in DTYPES:
        raise ValueError(f"{name}: type {str(entry['dtype'])[:40]} is unknown")
    block, shape = _numbers(name, entry["shape"]), _numbers(name, sharding.get("shape"))
    offsets = _numbers(name, sharding.get("saved_offsets"))
    span = _numbers(name, entry["data_offsets"])
    if not fits(offsets, block, shape):
        raise ValueError(f"{name}: its block is not inside its shape")
    nbytes = math.prod(block) * DTYPES[entry["dtype"]].itemsize
    if len(span) != 2 or span[1] - span[0] != nbytes:
        raise ValueError(f"{name}: its data have another size than its block")
    return Piece(entry["dtype"], shape, offsets, block), (span[0], span[1])


def _numbers(name: str, found: Any) -> tuple[int, ...]:
    is_list = isinstance(found, list) and len(found) <= 32
    if not is_list or not all(type(n) is int and n >= 0 for n in found):
        raise ValueError(f"{name}: its header holds {str(found)[:40]} for a list of numbers")
    if math.prod(max(n, 1) for n in found) > MOST_ELEMENTS:
        raise ValueError(f"{name}: its header holds numbers that no memory has")
    return tuple(found)
