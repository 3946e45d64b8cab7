"""Where checkpoints are: a folder of this machine."""

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from longctx.checkpoint.config import Address, is_remote
from longctx.checkpoint.manifest import MANIFEST_FILE
from longctx.checkpoint.strict import DamageError
from longctx.files import sync_path, write_whole

LATEST_FILE = "latest"


@dataclass(frozen=True)
class Brought:
    """A checkpoint's files where they can be read."""

    folder: Path
    """A folder of this machine."""
    names: frozenset[str]
    """Everything that lies in the checkpoint, wanted or not."""
    release: Callable[[], None] = lambda: None
    """To be called when nothing is read any more."""


class Store(Protocol):
    """What writing and finding checkpoints needs; errors of the system are OSError."""

    def where(self, step: int) -> Address:
        """The address that the checkpoint of a step has when it is complete."""
        ...

    def steps(self) -> dict[int, Address]:
        """The complete checkpoints."""
        ...

    def begin(self, step: int) -> None:
        """Makes an empty place for the files of a step."""
        ...

    def create(self, step: int, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """A new file in that place; it is durable when the context ends without an error."""
        ...

    def publish(self, step: int) -> None:
        """Makes the step, all of whose files are there, the newest checkpoint."""
        ...

    def abandon(self, step: int) -> None:
        """Clears away what was written of a step that failed."""
        ...

    def remove(self, step: int) -> None:
        """Removes a complete checkpoint."""
        ...

    def sweep(self) -> None:
        """Clears away what interrupted saves and removals left."""
        ...

    def read(self, address: Address, name: str) -> bytes:
        """One file of a checkpoint."""
        ...

    def bring(self, address: Address) -> Brought:
        """All files of a checkpoint."""
        ...


def plain_text(path: Path) -> str:
    """What is in a file; nothing if there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""


def open_store(folder: Address) -> Store:
    """The store of a folder or URL."""
    if is_remote(folder):
        from longctx.checkpoint.remote import RemoteStore

        return RemoteStore(str(folder))
    return LocalStore(Path(folder))


def step_of(name: str) -> int | None:
    """The step that a folder's name stands for."""
    match = re.fullmatch(r"step-(\d+)", name)
    return int(match[1]) if match else None


def plain_file(file: Path) -> Path:
    """The path of an ordinary file: reading a link or a pipe could do anything."""
    if not stat.S_ISREG(file.lstat().st_mode):
        raise DamageError(file.name, "is no ordinary file")
    return file


class LocalStore:
    """Checkpoints in a folder: written under another name, then renamed.

    Where a step is saved again, the earlier one is called `.replaced-step-N` until the new one has
    its name, and counts as the step's checkpoint for as long as there is no other.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def where(self, step: int) -> Path:
        """The address that the checkpoint of a step has when it is complete."""
        return self.folder / f"step-{step}"

    def _aside(self, kind: str, step: int) -> Path:
        return self.folder / f".{kind}-step-{step}"

    def steps(self) -> dict[int, Address]:
        """The complete checkpoints."""
        found: dict[int, Address] = {}
        for path in self.folder.glob(f".replaced-step-*/{MANIFEST_FILE}"):
            if (step := step_of(path.parent.name.removeprefix(".replaced-"))) is not None:
                found[step] = path.parent
        for path in self.folder.glob(f"step-*/{MANIFEST_FILE}"):
            if (step := step_of(path.parent.name)) is not None:
                found[step] = path.parent
        return found

    def begin(self, step: int) -> None:
        """Makes an empty place for the files of a step."""
        partial = self._aside("partial", step)
        self.folder.mkdir(parents=True, exist_ok=True)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()

    @contextlib.contextmanager
    def create(self, step: int, name: str) -> Iterator[BinaryIO]:
        """A new file in that place; it is durable when the context ends without an error."""
        with open(self._aside("partial", step) / name, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def publish(self, step: int) -> None:
        """Makes the step, all of whose files are there, the newest checkpoint."""
        partial, final = self._aside("partial", step), self.where(step)
        replaced = self._aside("replaced", step)
        sync_path(partial)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        try:
            partial.rename(final)
        except OSError:
            if replaced.exists():
                replaced.rename(final)
            raise
        sync_path(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)
        self._point_to(final.name)

    def _point_to(self, name: str) -> None:
        write_whole(self.folder / LATEST_FILE, f"{name}\n".encode())

    def abandon(self, step: int) -> None:
        """Clears away what was written of a step that failed."""
        shutil.rmtree(self._aside("partial", step), ignore_errors=True)

    def remove(self, step: int) -> None:
        """Removes a complete checkpoint."""
        removed = self._aside("removed", step)
        shutil.rmtree(removed, ignore_errors=True)
        Path(self.steps()[step]).rename(removed)
        shutil.rmtree(removed, ignore_errors=True)

    def sweep(self) -> None:
        """Clears away what interrupted saves and removals left."""
        steps = self.steps()
        complete = set(steps.values())
        for pattern in (".partial-step-*", ".replaced-step-*", ".removed-step-*"):
            for path in self.folder.glob(pattern):
                if path not in complete:
                    shutil.rmtree(path, ignore_errors=True)
        newest, partial = f"step-{max(steps, default=0)}", self.folder / f".partial-{LATEST_FILE}"
        is_told = plain_text(self.folder / LATEST_FILE) == f"{newest}\n"
        if steps and (partial.exists() or not is_told):
            self._point_to(newest)  # a kill came between a checkpoint's name and word of it

    def read(self, address: Address, name: str) -> bytes:
        """One file of a checkpoint."""
        return plain_file(Path(address) / name).read_bytes()

    def bring(self, address: Address) -> Brought:
        """All files of a checkpoint, where they are."""
        return Brought(Path(address), frozenset(os.listdir(address)))
