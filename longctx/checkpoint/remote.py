"""Checkpoints behind a URL, through fsspec.

Nothing can be renamed there, so the manifest is written last, and a step without one is not a
checkpoint. A step that is saved again is no checkpoint until its new manifest is there.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from longctx.checkpoint.config import Address
from longctx.checkpoint.manifest import MANIFEST_FILE
from longctx.checkpoint.store import LATEST_FILE, Brought, step_of
from longctx.checkpoint.strict import reason
from longctx.errors import InputError


class RemoteStore:
    """Checkpoints below a URL that fsspec understands."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.system, self.path = _connect(self.url)

    def where(self, step: int) -> str:
        """The address that the checkpoint of a step has when it is complete."""
        return f"{self.url}/step-{step}"

    def _folder(self, step: int) -> str:
        return f"{self.path}/step-{step}"

    def _all_steps(self) -> list[int]:
        with _reported():
            self.system.invalidate_cache()
            if not self.system.isdir(self.path):
                return []
            names = [_last(path) for path in self.system.ls(self.path, detail=False)]
        return [step for name in names if (step := step_of(name)) is not None]

    def steps(self) -> dict[int, Address]:
        """The complete checkpoints."""
        with _reported():
            return {
                step: self.where(step)
                for step in self._all_steps()
                if self.system.exists(f"{self._folder(step)}/{MANIFEST_FILE}")
            }

    def begin(self, step: int) -> None:
        """Makes an empty place for the files of a step."""
        self.remove(step)
        with _reported():
            self.system.makedirs(self._folder(step), exist_ok=True)

    @contextlib.contextmanager
    def create(self, step: int, name: str) -> Iterator[BinaryIO]:
        """A new file in that place; it is durable when the context ends without an error."""
        with _reported(), self.system.open(f"{self._folder(step)}/{name}", "wb") as file:
            yield file

    def publish(self, step: int) -> None:
        """Points to the step, which is the newest checkpoint since it has a manifest."""
        with _reported():
            self.system.pipe_file(f"{self.path}/{LATEST_FILE}", f"step-{step}\n".encode())

    def abandon(self, step: int) -> None:
        """Clears away what was written of a step that failed."""
        with contextlib.suppress(OSError):
            self.remove(step)

    def remove(self, step: int) -> None:
        """Removes a checkpoint, its manifest first."""
        folder = self._folder(step)
        with _reported():
            self.system.invalidate_cache()
            if self.system.exists(f"{folder}/{MANIFEST_FILE}"):
                self.system.rm_file(f"{folder}/{MANIFEST_FILE}")
            if self.system.exists(folder):
                self.system.rm(folder, recursive=True)

    def sweep(self) -> None:
        """Clears away steps without a manifest."""
        complete = self.steps()
        for step in self._all_steps():
            if step not in complete:
                self.abandon(step)

    def read(self, address: Address, name: str) -> bytes:
        """One file of a checkpoint."""
        system, path = _connect(str(address))
        with _reported():
            content: bytes = system.cat_file(f"{path}/{name}")
            return content

    def bring(self, address: Address) -> Brought:
        """All files of a checkpoint, copied into a temporary folder of this machine."""
        system, path = _connect(str(address))
        hold = tempfile.TemporaryDirectory(prefix="longctx-checkpoint-")
        with _reported():
            system.invalidate_cache()
            found = system.ls(path, detail=True)
            for entry in found:
                if entry["type"] == "file":
                    name = _last(entry["name"])
                    system.get_file(entry["name"], str(Path(hold.name) / name))
        names = frozenset(_last(entry["name"]) for entry in found)
        return Brought(Path(hold.name), names, hold.cleanup)


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _connect(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    try:
        from fsspec.core import url_to_fs

        system, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InputError(f"{url}: no access to such URLs: {error}") from None
    return system, path.rstrip("/")


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Makes OSError of whatever a file system's client raises."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(reason(error)) from error
