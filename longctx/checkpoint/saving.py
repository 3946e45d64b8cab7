"""Saves checkpoints: each process writes its file, then all become visible at once.

The order is the promise: files, manifest, the checkpoint's name, the pointer to it, and only then
are older ones removed. Whatever ends this at any moment leaves the last good checkpoint.
"""

import contextlib
import json
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longctx.checkpoint.boxes import Piece, assemble, sort_boxes
from longctx.checkpoint.config import Address, CheckpointConfig
from longctx.checkpoint.crew import Crew, Solo
from longctx.checkpoint.manifest import MANIFEST_FILE, STATE_FILE, Manifest, config_sum
from longctx.checkpoint.shards import Sum, shard_name, write_shard
from longctx.checkpoint.store import open_store
from longctx.checkpoint.strict import digest, reason
from longctx.errors import OutsideError
from longctx.parallel.box import Box

T = TypeVar("T")
LAST_SECONDS = 120.0
"""How long a run that an error ends waits for the checkpoint that it is writing."""


class Checkpoints:
    """The checkpoints of a run, as one of its processes writes them.

    Every process of the crew makes the same calls in the same order. What an interrupted run left
    in the folder is swept away: nobody else may be writing there.
    """

    def __init__(self, folder: Address, config: CheckpointConfig, crew: Crew | None = None):
        self._config, self._crew = config, crew or Solo()
        self._store = open_store(folder)
        self._copies = _Copies()
        self._copy: _Copy | None = None
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        """Of the last save in the background."""
        self._untold = ""
        if self._crew.rank == 0:
            with contextlib.suppress(OSError):
                self._store.sweep()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Gives a save in the background some time if an error, but no user, ends the context."""
        if self._thread and isinstance(error, Exception):
            self._thread.join(LAST_SECONDS)

    def save(
        self, step: int, boxes: Iterable[Box], state: dict[str, Any], wait: bool = False
    ) -> None:
        """Saves the checkpoint of `step`: what this process's boxes and the state are now.

        Returns at once, and copies behind the caller's back: call `settle` before any of them
        changes. With `wait`, or if the config wants no background, returns when the checkpoint is
        on the disk, and raises OutsideError if it is not. A save that is still being written is
        waited for. The state is that of the first process.
        """
        content = json.dumps({**state, "step": step}, indent=1).encode() + b"\n"
        config_sha256 = config_sum(state)
        self._join()
        if wait or not self._config.asynchronous:
            self._write(step, list(boxes), content, config_sha256)
            return
        self._copy = self._copies.take(boxes)
        self._thread = threading.Thread(
            target=self._write_behind,
            args=(self._copy, step, content, config_sha256),
            name=f"checkpoint of step {step}",
            daemon=True,
        )
        self._thread.start()

    def settle(self) -> None:
        """Returns when what the last save holds may change."""
        if self._copy:
            self._copy.settle()
            self._copy = None

    def wait(self) -> None:
        """Waits for the last save; raises OutsideError, in all processes alike, if that failed."""
        self._join()
        self._untold = ""
        if self._failure:
            raise self._failure

    def failure(self) -> str | None:
        """Why a save in the background failed, told once; does not wait."""
        untold, self._untold = self._untold, ""
        return untold or None

    def _join(self) -> None:
        if self._thread:
            self._thread.join()
            self._thread = None

    def _write_behind(self, copy: "_Copy", step: int, content: bytes, config_sha256: str) -> None:
        try:
            self._write(step, copy.boxes, content, config_sha256, copy.finish)
        except Exception as error:
            self._failure, self._untold = error, str(error)
        else:
            self._failure = None

    def _write(
        self,
        step: int,
        boxes: Sequence[Box],
        content: bytes,
        config_sha256: str,
        copy: Callable[[], None] = lambda: None,
    ) -> None:
        store, crew = self._store, self._crew

        def begin() -> list[list[Box]]:
            copy()
            if crew.rank == 0:
                store.begin(step)
            return sort_boxes(boxes)

        def write() -> list[dict[str, Any]]:
            return [self._write_shard(step, *shard) for shard in zip(mine, lists)]

        def publish() -> None:
            if crew.rank == 0:
                self._publish(step, dict(zip(names, chain(*written))), content, config_sha256)

        def prune() -> None:
            if crew.rank == 0:
                self._prune(step)

        try:
            lists, counts = self._together(step, begin, len)
            names = [shard_name(i, sum(counts)) for i in range(sum(counts))]
            mine = names[sum(counts[: crew.rank]) :]
            _, written = self._together(step, write)
            self._together(step, publish)
        except _SaveError:
            if crew.rank == 0:
                store.abandon(step)
            raise
        self._together(step, prune)

    def _write_shard(self, step: int, name: str, boxes: Sequence[Box]) -> dict[str, Any]:
        """Writes one file; its sum, and where its pieces belong."""
        try:
            with self._store.create(step, name) as file:
                total, pieces = write_shard(file, boxes)
        except Exception as error:
            raise OutsideError(self._explain(step, name, error)) from error
        return {"sum": asdict(total), "pieces": {n: asdict(p) for n, p in pieces.items()}}

    def _publish(
        self, step: int, shards: dict[str, dict[str, Any]], content: bytes, config_sha256: str
    ) -> None:
        assemble({name: _pieces(shard["pieces"]) for name, shard in shards.items()})
        sums = {name: Sum(**shard["sum"]) for name, shard in shards.items()}
        sums[STATE_FILE] = Sum(len(content), digest(content))
        manifest = Manifest(step, config_sha256, len(shards), sums)
        for name, data in ((STATE_FILE, content), (MANIFEST_FILE, manifest.encode())):
            with self._store.create(step, name) as file:
                file.write(data)
        self._store.publish(step)

    def _together(
        self, step: int, work: Callable[[], T], tell: Callable[[T], Any] = lambda done: done
    ) -> tuple[T, list[Any]]:
        """Every process does its work: what this one's gave, and what each tells of it.

        If it failed anywhere, all raise the first one's error.
        """
        cause: Exception | None = None
        result: Any = None
        try:
            result = work()
            message = {"done": tell(result)}
        except Exception as error:  # whatever it is, the others wait for this process's word
            cause = error
            message = {"failed": self._explain(step, "", error)}
        replies = [json.loads(m) for m in self._crew.gather(json.dumps(message).encode())]
        failed = [reply["failed"] for reply in replies if "failed" in reply]
        if failed:
            raise _SaveError(failed[0]) from cause
        return result, [reply["done"] for reply in replies]

    def _explain(self, step: int, file: str, error: Exception) -> str:
        if isinstance(error, OutsideError):
            return str(error)
        where = f"{self._store.where(step)}/{file}".rstrip("/")
        process = f" (process {self._crew.rank})" if self._crew.size > 1 else ""
        why = reason(error)
        if isinstance(error, FileNotFoundError) and self._crew.size > 1:
            why += ": do all processes see that folder?"
        return f"{where}: cannot write the checkpoint{process}: {why}; older checkpoints are intact"

    def _prune(self, saved: int) -> None:
        """Removes all but the newest, those of round steps and the one that was just saved."""
        store, config = self._store, self._config
        steps = sorted(store.steps())
        kept = {saved, *steps[-config.keep :]}
        kept |= {step for step in steps if config.keep_every and step % config.keep_every == 0}
        for step in steps:
            if step not in kept:
                try:
                    store.remove(step)
                except OSError as error:
                    where = store.where(step)
                    raise OutsideError(
                        f"{where}: cannot remove the checkpoint: {reason(error)}"
                    ) from error
        store.sweep()


class _SaveError(OutsideError):
    """All processes know that a save failed."""


def _pieces(told: dict[str, dict[str, Any]]) -> dict[str, Piece]:
    return {
        name: Piece(p["dtype"], tuple(p["shape"]), tuple(p["offsets"]), tuple(p["block"]))
        for name, p in told.items()
    }


class _Copies:
    """Memory for copies of boxes, which the next copy reuses."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def take(self, boxes: Iterable[Box]) -> "_Copy":
        """Begins a copy of the boxes as they are now."""
        before, self._buffers = self._buffers, {}
        pairs = []
        for box in boxes:
            tensor, place = box.tensor.detach(), (box.name, box.offsets)
            buffer = before.get(place)
            if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                buffer = torch.empty(
                    tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda
                )
            self._buffers[place] = buffer
            pairs.append((tensor, Box(box.name, box.shape, box.offsets, buffer)))
        return _Copy(pairs)


class _Copy:
    """Boxes that become copies while training goes on: of a GPU by a stream of its own, of a CPU by
    the thread that calls `finish`."""

    def __init__(self, pairs: Sequence[tuple[Tensor, Box]]):
        self.boxes = [box for _, box in pairs]
        self._on_host = [(x, box.tensor) for x, box in pairs if not x.is_cuda]
        self._done = threading.Event()
        self._copied: list[torch.cuda.Event] = []
        for device in {x.device for x, _ in pairs if x.is_cuda}:
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for x, box in pairs:
                    if x.device == device:
                        box.tensor.copy_(x, non_blocking=True)
                        x.record_stream(stream)
            self._copied.append(stream.record_event())

    def finish(self) -> None:
        """Copies what is left, in one thread: all others are busy with training."""
        try:
            for x, buffer in self._on_host:
                if x.is_contiguous():
                    np.copyto(_bytes(buffer), _bytes(x))
                else:
                    buffer.copy_(x)
        finally:
            self._done.set()
        for event in self._copied:
            event.synchronize()

    def settle(self) -> None:
        """Lets nothing that comes after change what is being copied."""
        if self._on_host:
            self._done.wait()
        for event in self._copied:
            event.wait()


def _bytes(x: Tensor) -> npt.NDArray[np.uint8]:
    return x.reshape(-1).view(torch.uint8).numpy()
