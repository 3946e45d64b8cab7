"""A record of what a run ran on: versions, machine, source. Never environment variables."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import longctx
from longctx.errors import OutsideError
from longctx.train.redaction import redact, redact_source

GIT_SECONDS = 10
CHANGES_FILE = "changes.patch"
MOST_CHANGES = 2**20
"""Bytes of a patch that are kept."""


def describe() -> dict:
    """Everything about program and machine that helps to repeat a run, ready for JSON."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": redact(sys.argv),
        "longctx": longctx.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "platform": platform.platform(),
        "cpu": _proc_value("cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "cuda": torch.version.cuda,
        "devices": [
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        ],
        "git": _git_state(Path(__file__)),
    }


def write_changes(folder: Path, source: Path = Path(__file__)) -> None:
    """Writes what differs from the commit, in files that git tracks, as `git apply` reads it, but
    for secrets that are written out there.

    Nothing where nothing differs, and nothing for an installed package.
    """
    file = folder / CHANGES_FILE
    patch = _git(source.parent, "diff", "HEAD", "--binary") if _is_tracked(source) else None
    try:
        file.unlink(missing_ok=True)
        if patch:
            text = patch.decode(errors="surrogateescape")
            patch = redact_source(text).encode(errors="surrogateescape")
            if len(patch) > MOST_CHANGES:
                patch = patch[:MOST_CHANGES] + f"\ncut: {len(patch)} bytes\n".encode()
            file.write_bytes(patch)
    except OSError as error:
        raise OutsideError(f"{file}: cannot write: {error.strerror}") from error


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _proc_value(file: str, key: str) -> str | None:
    """The first value of `key` in a file of `/proc`, None where the system has no such file."""
    try:
        lines = Path("/proc", file).read_text().splitlines()
    except OSError:
        return None
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return next((value.strip() for name, value in pairs if name.strip() == key), None)


def _git_state(source: Path) -> dict | None:
    """Commit and dirty flag of the checkout that tracks `source`; None for an installed package."""
    if not _is_tracked(source):
        return None
    commit = _git(source.parent, "rev-parse", "HEAD")
    changes = _git(source.parent, "status", "--porcelain")
    return {
        "commit": None if commit is None else commit.decode().strip(),
        "dirty": None if changes is None else changes != b"",
    }


def _is_tracked(source: Path) -> bool:
    return _git(source.parent, "ls-files", "--error-unmatch", source.name) is not None


def _git(folder: Path, *arguments: str) -> bytes | None:
    """What git prints, None if it fails, is missing or takes too long."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            timeout=GIT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
