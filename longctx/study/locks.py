"""One study at a time in a folder."""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from longctx.errors import InputError, OutsideError

LOCK_FILE = ".lock"
PATIENCE = 3
"""Seconds to wait for another command."""
PATIENCE_WITH_CELLS = 60
"""Seconds to wait for cells that a study left behind when it was killed."""
POLL_SECONDS = 0.1


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Keeps a second study out of the folder, also of another host if they share it.

    Yields a file descriptor. A process that inherits it keeps the folder locked as well, so that
    nothing trains a cell while one of a study that was killed still saves it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise OutsideError(f"{folder}: cannot write: {error.strerror}") from error
    try:
        _take(held, folder)
        _sign(held, folder)
        yield held
    finally:
        os.close(held)


def _take(held: int, folder: Path) -> None:
    """Locks, or says who has locked."""
    started = time.monotonic()
    has_said = False
    while not _try(held, folder):
        owner = os.pread(held, 200, 0).decode(errors="replace")
        is_gone = _is_gone(owner)
        if time.monotonic() - started > (PATIENCE_WITH_CELLS if is_gone else PATIENCE):
            what = "cells of a study that was killed" if is_gone else "another longctx study"
            raise InputError(
                f"{folder}: {what} ({owner or 'just started'}) still trains here: wait for it or "
                "end it, or choose another study.dir"
            )
        if is_gone and not has_said:
            print(f"waiting until cells that {owner} left behind have saved", flush=True)
            has_said = True
        time.sleep(POLL_SECONDS)


def _sign(held: int, folder: Path) -> None:
    """Tells others who has locked."""
    try:
        os.ftruncate(held, 0)
        os.pwrite(held, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    except OSError as error:
        raise OutsideError(f"{folder}: cannot write: {error.strerror}") from error


def _try(held: int, folder: Path) -> bool:
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise OutsideError(
            f"{folder / LOCK_FILE}: this file system has no locks ({error.strerror}); choose a "
            "study.dir on another one"
        ) from error
    return True


def _is_gone(owner: str) -> bool:
    """Whether this was a process of this host and is no more."""
    words = owner.split(" ")
    if len(words) != 4 or words[3] != socket.gethostname() or not words[1].isdigit():
        return False
    return not Path(f"/proc/{words[1]}").exists()
