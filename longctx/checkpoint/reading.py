"""Reads a checkpoint after showing that every file of it is what was written."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longctx.checkpoint.boxes import Piece, Spread, assemble, fits, overlap
from longctx.checkpoint.config import Address, is_remote
from longctx.checkpoint.crew import Crew, Solo
from longctx.checkpoint.manifest import (
    MANIFEST_FILE,
    STATE_FILE,
    Manifest,
    config_sum,
    parse_manifest,
)
from longctx.checkpoint.shards import Sum, read_pieces
from longctx.checkpoint.store import Brought, Store, open_store, plain_file, step_of
from longctx.checkpoint.strict import DamageError, digest, parse_object, reason
from longctx.errors import InputError, OutsideError

T = TypeVar("T")


class Checkpoint:
    """A checkpoint whose files have been verified."""

    def __init__(
        self,
        path: Address,
        state: dict[str, Any],
        spreads: dict[str, Spread],
        brought: Brought,
    ):
        self.path = path
        """Where it is."""
        self.state = state
        """What the run said of itself, `step` among it."""
        self._spreads, self._brought = spreads, brought
        self._files: dict[str, Any] = {}

    @property
    def names(self) -> frozenset[str]:
        """Names of the tensors."""
        return frozenset(self._spreads)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor."""
        return self._spread(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor."""
        return self._spread(name).dtype

    def read(
        self,
        name: str,
        offsets: Sequence[int] | None = None,
        shape: Sequence[int] | None = None,
    ) -> Tensor:
        """A tensor, or the block of this shape that starts at `offsets`, in memory of its own.

        Only the bytes of the block are read, from whichever files hold them.
        """
        spread = self._spread(name)
        start = tuple(offsets) if offsets is not None else (0,) * len(spread.shape)
        size = tuple(shape) if shape is not None else spread.shape
        if not fits(start, size, spread.shape):
            raise ValueError(f"{name}: no block {size} at {start} in shape {spread.shape}")
        out = torch.empty(size, dtype=spread.dtype)
        for file, piece in spread.pieces:
            meets = overlap(start, size, piece)
            if meets is not None:
                target = tuple(slice(a - o, b - o) for (a, b), o in zip(meets, start))
                source = tuple(slice(a - o, b - o) for (a, b), o in zip(meets, piece.offsets))
                out[target] = self._part(file, name, source)
        return out

    def _part(self, file: str, name: str, part: tuple[slice, ...]) -> Tensor:
        path = self._brought.folder / file
        try:
            if file not in self._files:
                self._files[file] = safe_open(path, "pt")
            opened = self._files[file]
            tensor: Tensor = opened.get_slice(name)[part] if part else opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise OutsideError(f"{path}: cannot read {name}: {reason(error)}") from None
        return tensor

    def _spread(self, name: str) -> Spread:
        if name not in self._spreads:
            raise InputError(f"{self.path}: lacks {name}")
        return self._spreads[name]

    def close(self) -> None:
        """Forgets the files; nothing can be read any more."""
        self._files.clear()
        self._brought.release()


def open_checkpoint(path: Address, crew: Crew | None = None) -> Checkpoint:
    """Verifies a checkpoint, whose files the processes divide among themselves, and opens it.

    All processes raise the same InputError, which names the file that is damaged, missing or does
    not belong there, and the newest older checkpoint that is good.
    """
    crew, store = crew or Solo(), open_store(_parent(path))
    brought = _agree(crew, path, lambda: store.bring(path))
    try:
        manifest = _agree(crew, path, lambda: _read_manifest(path, brought))
        share = range(crew.rank, len(manifest.files), crew.size)
        if is_remote(path):  # each process has a copy of its own
            share = range(len(manifest.files))
        _agree(crew, path, lambda: _verify(brought.folder, manifest, share))
        state = _agree(crew, path, lambda: _parse_state(brought.folder, manifest))
        spreads = _agree(crew, path, lambda: _read_spreads(brought.folder, manifest))
    except Exception:
        brought.release()
        raise
    return Checkpoint(path, state, spreads, brought)


def read_state(path: Address) -> dict[str, Any]:
    """The state in a checkpoint, verified; of the other files only the names are looked at."""
    store = open_store(_parent(path))

    def read() -> dict[str, Any]:
        manifest = parse_manifest(_read(store, path, MANIFEST_FILE))
        content = _read(store, path, STATE_FILE)
        total = manifest.files[STATE_FILE]
        if Sum(len(content), digest(content)) != total:
            raise DamageError(STATE_FILE, "damaged (its sha256 is not that of the manifest)")
        return _state_of(content, manifest)

    return _agree(Solo(), path, read)


def _agree(crew: Crew, path: Address, work: Callable[[], T]) -> T:
    """What the work of this process gave, if that of all processes went well."""
    result: Any = None
    problem: dict[str, str] = {}
    try:
        result = work()
    except DamageError as damage:
        problem = {"file": damage.file, "damage": damage.problem}
    except (FileNotFoundError, NotADirectoryError):
        problem = {"absent": "no checkpoint here"}
    except OSError as error:
        problem = {"outside": f"cannot read the checkpoint: {reason(error)}"}
    problems = [json.loads(m) for m in crew.gather(json.dumps(problem).encode())]
    found = next((p for p in problems if p), None)
    if found is None:
        return result
    if "outside" in found:
        raise OutsideError(f"{path}: {found['outside']}")
    if "absent" in found:
        raise InputError(f"{path}: {found['absent']}")
    mend = crew.gather((_mend(path) if crew.rank == 0 else "").encode())[0].decode()
    where = f"{path}/{found['file']}" if found["file"] else f"{path}"
    raise InputError(f"{where}: {found['damage']}; {mend}")


def _mend(path: Address) -> str:
    """The way out: the newest older checkpoint that is good."""
    broken = step_of(_name(path))
    bad = [str(path)]
    try:
        store = open_store(_parent(path))
        steps = store.steps()
        for step in sorted((s for s in steps if broken is not None and s < broken), reverse=True):
            if _is_good(store, steps[step]):
                return f"remove {' and '.join(bad)} to go on from {_name(steps[step])}"
            bad.append(_name(steps[step]))
    except OSError:
        return f"remove {path}"
    return f"remove {path}; no older checkpoint is good"


def _is_good(store: Store, path: Address) -> bool:
    brought = store.bring(path)
    try:
        manifest = _read_manifest(path, brought)
        _verify(brought.folder, manifest, range(len(manifest.files)))
        _parse_state(brought.folder, manifest)
        _read_spreads(brought.folder, manifest)
    except DamageError:
        return False
    finally:
        brought.release()
    return True


def _parent(path: Address) -> Address:
    return path.rstrip("/").rpartition("/")[0] if isinstance(path, str) else path.parent


def _name(path: Address) -> str:
    return path.rstrip("/").rpartition("/")[2] if isinstance(path, str) else path.name


def _read(store: Store, path: Address, name: str) -> bytes:
    try:
        return store.read(path, name)
    except FileNotFoundError:
        raise DamageError(name, "missing") from None


def _read_manifest(path: Address, brought: Brought) -> Manifest:
    """The manifest of a checkpoint that holds the files it names, and no others."""
    if MANIFEST_FILE not in brought.names:
        raise DamageError(
            MANIFEST_FILE, "missing, so this is no checkpoint of this version of longctx"
        )
    manifest = parse_manifest(plain_file(brought.folder / MANIFEST_FILE).read_bytes())
    for name in sorted(brought.names - manifest.files.keys() - {MANIFEST_FILE}):
        raise DamageError(name, "does not belong to the checkpoint")
    for name in sorted(manifest.files.keys() - brought.names):
        raise DamageError(name, "missing")
    named = step_of(_name(path).removeprefix(".replaced-"))
    if named is not None and named != manifest.step:
        raise DamageError(MANIFEST_FILE, f"is of step {manifest.step}")
    return manifest


def _verify(folder: Path, manifest: Manifest, share: range) -> None:
    names = sorted(manifest.files)
    for name in (names[i] for i in share):
        file, total = plain_file(folder / name), manifest.files[name]
        size = file.stat().st_size
        if size != total.bytes:
            raise DamageError(name, f"damaged ({size} bytes instead of {total.bytes})")
        with open(file, "rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != total.sha256:
            raise DamageError(name, "damaged (its sha256 is not that of the manifest)")


def _parse_state(folder: Path, manifest: Manifest) -> dict[str, Any]:
    return _state_of(plain_file(folder / STATE_FILE).read_bytes(), manifest)


def _state_of(content: bytes, manifest: Manifest) -> dict[str, Any]:
    try:
        state = parse_object(content)
    except ValueError as error:
        raise DamageError(STATE_FILE, f"unreadable ({error})") from None
    if state.get("step") != manifest.step or config_sum(state) != manifest.config_sha256:
        raise DamageError(STATE_FILE, "is of another step or config than the manifest")
    return state


def _read_spreads(folder: Path, manifest: Manifest) -> dict[str, Spread]:
    files: dict[str, dict[str, Piece]] = {}
    for name in manifest.shards:
        try:
            with open(plain_file(folder / name), "rb") as file:
                files[name] = read_pieces(file)
        except ValueError as error:
            raise DamageError(name, f"unreadable ({error})") from None
    try:
        return assemble(files)
    except ValueError as error:
        raise DamageError("", str(error)) from None
