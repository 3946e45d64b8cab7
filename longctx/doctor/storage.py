"""The folder that runs are written to: its file system, its space and its speed."""

import errno
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

from longctx.checkpoint.config import Address
from longctx.doctor.findings import Finding
from longctx.files import write_whole
from longctx.train.redaction import redact

GIB = 2**30
PIECE = 2**20
WRITTEN = 256 * PIECE
MOUNTS = Path("/proc/self/mounts")
NETWORK = {"nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "gpfs", "beegfs", "fuse.sshfs", "9p"}
LOST = {"tmpfs": "is memory: gone with the machine", "overlay": "may go with its container"}
SLOW_CHECKPOINT = 300


def nearest_folder(path: Path) -> Path:
    """The folder, or the lowest one above it that exists; OSError if a run cannot make it there."""
    path = path.resolve()
    nearest = next(p for p in (path, *path.parents) if p.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(nearest))
    return nearest


def file_system(folder: Path) -> tuple[str, str]:
    """Type of the file system that holds it, and where that is mounted."""
    best = ("unknown", "")
    for line in MOUNTS.read_text().splitlines():
        mounted = line.split()[1].replace("\\040", " ")
        if folder.is_relative_to(mounted) and len(mounted) >= len(best[1]):
            best = (line.split()[2], mounted)
    return best


def kind_of_storage(folder: Path) -> list[Finding]:
    """Whether it lasts, and whether other hosts can see it."""
    kind, mounted = file_system(nearest_folder(folder))
    found = f"{folder} is on {kind} at {mounted}"
    if kind in LOST:
        return [Finding("note", found, f"{LOST[kind]}; only this host sees it")]
    if kind in NETWORK:
        return [Finding("ok", found, "other hosts can see it")]
    return [Finding("ok", found, "for runs of one host; several need one that all see")]


def what_files_can(folder: Path) -> list[Finding]:
    """Whether writing, locking, syncing and renaming work there."""
    try:
        where = nearest_folder(folder)
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=where) as own:
            write_whole(Path(own, "whole"), b"first")
            write_whole(Path(own, "whole"), b"second")
            renamed = Path(own, "whole").read_bytes() == b"second"
            with open(Path(own, "lock"), "w") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        meaning = f"no run can be written there ({error.strerror})"
        return [Finding("problem", f"{folder}: cannot write, lock or sync", meaning)]
    if not renamed:
        return [Finding("problem", f"{folder}: renaming leaves the old file", "no checkpoints")]
    return [Finding("ok", f"{folder}: files lock, sync and rename", "checkpoints are whole")]


def space_and_speed(folder: Address, name: str, needed: int) -> list[Finding]:
    """Whether a checkpoint of a config, `needed` bytes, fits, and how long it takes to write."""
    if isinstance(folder, str):
        told = f"checkpoints go to {redact(folder)}"
        return [Finding("note", told, "neither its room nor its speed is known")]
    where = nearest_folder(folder)
    free = shutil.disk_usage(where).free
    found, size = f"{free / GIB:.1f} GiB free", f"a checkpoint of {name}, {needed / GIB:.2f} GiB"
    if free < needed:
        return [Finding("problem", found, f"{size}, does not fit: set run.dir or checkpoint.dir")]
    level, meaning = ("warning", f"only one of {size}") if free < 3 * needed else ("ok", f"{size}")
    speed = write_speed(where, min(WRITTEN, free // 4))
    seconds = needed / speed
    slow = seconds > SLOW_CHECKPOINT
    return [
        Finding(level, found, meaning),
        Finding(
            "warning" if slow else "ok",
            f"{speed / 1e6:.0f} MB/s written and synced",
            f"{seconds:.1f} s for it" + ("; checkpoint.every should be far apart" if slow else ""),
        ),
    ]


def write_speed(folder: Path, size: int) -> float:
    """Bytes a second that a process writes and syncs; the file is removed."""
    piece = os.urandom(PIECE)
    # Without a name, so that nothing is left however this ends.
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for _ in range(max(1, size // PIECE)):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        return max(PIECE, size // PIECE * PIECE) / (time.perf_counter() - start)
