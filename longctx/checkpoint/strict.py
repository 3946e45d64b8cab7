"""JSON and damage: what is read from a checkpoint is not believed before it is checked."""

import errno
import hashlib
import json
import os
import re
from typing import Any


class DamageError(Exception):
    """A file of a checkpoint that must not be used."""

    def __init__(self, file: str, problem: str):
        super().__init__(f"{file}: {problem}")
        self.file, self.problem = file, problem


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object whose keys are unique; ValueError for anything else."""
    try:
        found = json.loads(data.decode(), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def canonical(value: Any) -> bytes:
    """The one way to write a JSON value, without white space."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def digest(data: bytes) -> str:
    """sha256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def reason(error: BaseException) -> str:
    """What went wrong in words; safetensors hides the number of an operating system error."""
    hidden = re.search(r"os error (\d+)", str(error))
    number = int(hidden[1]) if hidden else getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full"
    return os.strerror(number) if number else str(error) or type(error).__name__
