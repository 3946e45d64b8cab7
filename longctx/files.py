"""Files that are complete or not there, whenever a process is killed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

Content = bytes | Callable[[BinaryIO], Any]
"""What a file holds, or a function that writes it."""


def write_whole(path: Path, content: Content, synced: bool = True) -> None:
    """Writes a file that gets its name when it is complete, and unless told otherwise on the disk.

    Raises OSError, and then leaves what was there before.
    """
    partial = path.with_name(f".partial-{path.name}")
    try:
        with open(partial, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            if synced:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
        if synced:
            sync_path(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync_path(path: Path) -> None:
    """Waits until a file's contents, or a directory's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
