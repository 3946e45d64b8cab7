"""A file of lines that a full or vanished disk interrupts but does not break."""

import contextlib
import os
from collections import deque
from pathlib import Path

MOST_WAITING = 10_000
"""Lines that memory holds for a disk that does not take them."""


class Lines:
    """Appends lines to a file; those that it does not take wait in memory, and are tried again with
    the next one.

    Opening it raises OSError; after that nothing does.
    """

    def __init__(self, path: Path, sync: bool) -> None:
        self.path, self._sync = path, sync
        self.trouble = ""
        """Why lines wait, or empty."""
        self.lost = 0
        """Lines that were dropped for newer ones."""
        self._waiting: deque[bytes] = deque()
        self._file: int | None = self._open()
        self._size = os.fstat(self._file).st_size

    def append(self, line: str) -> None:
        """Adds a line; it is in the file, and if `sync` on the disk, when this returns without
        `trouble`."""
        if len(self._waiting) == MOST_WAITING:
            self._waiting.popleft()
            self.lost += 1
        self._waiting.append(line.encode() + b"\n")
        self.flush()

    def flush(self) -> None:
        """Tries to write what waits."""
        if not self._waiting:
            return
        try:
            self._write(b"".join(self._waiting))
        except OSError as error:
            self.trouble = error.strerror or str(error)
            self._drop_file()
        else:
            self.trouble = ""
            self._waiting.clear()

    def close(self) -> None:
        """Tries a last time; what still waits then counts as lost."""
        self.flush()
        self.lost += len(self._waiting)
        self._waiting.clear()
        self._drop_file()

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def _write(self, content: bytes) -> None:
        if self._file is not None and not os.fstat(self._file).st_nlink:
            self._drop_file()
        if self._file is None:
            self._file = self._open()
            self._size = min(self._size, os.fstat(self._file).st_size)
            os.ftruncate(self._file, self._size)
        left = memoryview(content)
        while left:
            left = left[os.write(self._file, left) :]
        if self._sync:
            os.fsync(self._file)
        self._size += len(content)

    def _drop_file(self) -> None:
        """Closes the file; a half-written line is cut off, now or when it opens again."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            with contextlib.suppress(OSError):
                os.close(self._file)
        self._file = None
