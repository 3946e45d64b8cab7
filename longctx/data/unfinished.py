"""The beginning of a folder of tokens: whatever is done stays, and the end is the same.

Text is divided into units. What a unit becomes is a file `unfinished-tokens/piece-N`, which any
process may write; pieces are joined to shards in order. `plan.json` says what is being made,
`shards.json` which shards are complete. A file gets its name when it is complete, so after a kill
just those units are done again that have no piece. Pieces hold a hash instead of being waited for
until they are on the disk: one that a power cut damaged is made again (`longctx/data/pieces.py`).
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from longctx.data.folder import (
    DTYPES,
    MANIFEST,
    UNFINISHED,
    FileSum,
    Index,
    Manifest,
    Shard,
    read_manifest,
    shard_files,
    shard_from,
    sum_of,
    write_index,
)
from longctx.data.pieces import Batch, Totals, chunks, piece_totals, read_piece, write_piece
from longctx.data.stores import Ids
from longctx.data.tokenizer import Tokenizer, find_tokenizer
from longctx.errors import InputError
from longctx.files import write_whole

INDEXED = "tokens"
"""Name, without its ending, of the two files that Megatron reads."""
RECORD = "tokenized.json"
"""Says of files for Megatron what a manifest says of a folder of tokens."""


@dataclass(frozen=True)
class Plan:
    """What is made of what."""

    tokenizer: str
    """Fingerprint."""
    tokenizer_name: str
    vocab_size: int
    dtype: str
    path: str
    column: str
    texts: str
    """sha256 of the names and sizes of all parts of the text."""
    shard_tokens: int
    format: str

    def check(self, begun: dict[str, Any], folder: Path) -> None:
        """InputError if what was begun in a folder is something else."""
        shown = {"texts": "names or sizes of the texts", "tokenizer": "the tokenizer"}
        for name, value in asdict(self).items():
            if name in ("path", "tokenizer_name") or begun.get(name) == value:
                continue
            change = shown.get(name, f"--{name} = {begun.get(name)} there, {value} here")
            raise InputError(
                f"{folder}: was begun with something else ({change}); choose another --output, or "
                "remove that folder"
            )


class Unfinished:
    """A folder in the making; one process at a time holds it, until `close`."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder = folder
        self.totals = Totals()
        """Of the units that were added, in this process or before."""
        self.next_unit = 0
        """The unit that `add` wants."""
        self._work = folder / UNFINISHED
        self._stack = contextlib.ExitStack()
        self._plan = asdict(plan)
        self._shards: list[Shard] = []
        self._waiting: list[int] = []
        self.is_finished = self._is_there(plan)
        if self.is_finished:
            return
        self._is_new, self._has_folder = not self._work.is_dir(), folder.exists()
        if self._is_new and self._has_folder and not (folder.is_dir() and _is_empty(folder)):
            raise InputError(f"--output {folder}: exists and is not empty; choose another")
        self._work.mkdir(parents=True, exist_ok=True)
        self._lock()
        try:
            self._resume(plan)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets go of the folder; nothing stays of one in which nothing was completed."""
        self._stack.close()
        if self.is_finished or not self._is_new or self._shards or any(self._pieces()):
            return
        shutil.rmtree(self._work, ignore_errors=True)
        if not self._has_folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def done(self, unit: int) -> Totals | None:
        """What a unit became, None if that is not known yet."""
        return piece_totals(self._piece(unit))

    def write_piece(self, unit: int, batches: Iterable[Batch]) -> Totals:
        """Writes what a unit became; any process may."""
        return write_piece(self._piece(unit), DTYPES[self._plan["dtype"]], batches)

    def add(self, unit: int, totals: Totals) -> None:
        """Takes the next unit, whose piece is there, into the folder."""
        assert unit == self.next_unit + len(self._waiting)
        self._waiting.append(unit)
        self.totals = self.totals.plus(totals)
        joined = sum(shard.tokens for shard in self._shards)
        is_full = self.totals.tokens - joined >= self._plan["shard_tokens"]
        if is_full and self._plan["format"] == "tokens":
            self._join()

    def finish(self, tokenizer: Tokenizer) -> None:
        """Completes the folder, after all units."""
        if not self.totals.tokens:
            shutil.rmtree(self._work)
            raise InputError(f"{self._plan['path'] or 'the embedded sources'}: no text in it")
        extras = self._save(tokenizer)
        if self._plan["format"] == "megatron":
            self._write_indexed(tokenizer)
            record = json.dumps({"plan": self._plan, **self.totals._asdict()}, indent=1)
            write_whole(self.folder / RECORD, f"{record}\n".encode())
        else:
            if self._waiting:
                self._join()
            manifest = Manifest(self._plan, tuple(self._shards), extras).encode()
            write_whole(self.folder / MANIFEST, manifest)
        self.is_finished = True
        shutil.rmtree(self._work, ignore_errors=True)

    def _is_there(self, plan: Plan) -> bool:
        if (self.folder / MANIFEST).is_file():
            manifest = read_manifest(self.folder)
            begun, totals = manifest.plan, [_totals_of(shard) for shard in manifest.shards]
        elif (self.folder / RECORD).is_file():
            with _damage_told(self.folder):
                record = json.loads((self.folder / RECORD).read_text())
                begun = record.pop("plan")
                totals = [Totals(**record)]
        else:
            return False
        plan.check(begun, self.folder)
        for part in totals:
            self.totals = self.totals.plus(part)
        shutil.rmtree(self._work, ignore_errors=True)
        return True

    def _lock(self) -> None:
        lock = os.open(self._work / "lock", os.O_CREAT | os.O_RDWR)
        self._stack.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._stack.close()
            raise InputError(
                f"--output {self.folder}: another longctx data tokenize writes it; wait for it"
            ) from None

    def _resume(self, plan: Plan) -> None:
        file, recorded = self._work / "plan.json", self._work / "shards.json"
        if file.exists():
            with _damage_told(self.folder):
                self._plan = json.loads(file.read_text())
                plan.check(self._plan, self.folder)
        else:
            write_whole(file, json.dumps(self._plan).encode())
        if recorded.exists():
            with _damage_told(self.folder):
                content = json.loads(recorded.read_text())
                self._shards = [shard_from(table) for table in content["shards"]]
                self.next_unit = content["next_unit"]
            for shard in self._shards:
                self.totals = self.totals.plus(_totals_of(shard))
        for piece in self._pieces():  # a kill came between a shard and the end of its pieces
            if int(piece.name.removeprefix("piece-")) < self.next_unit:
                piece.unlink()

    def _piece(self, unit: int) -> Path:
        return self._work / f"piece-{unit:08}"

    def _pieces(self) -> Iterator[Path]:
        return self._work.glob("piece-*[0-9]")

    def _join(self) -> None:
        """Makes a shard of the pieces that wait."""
        ids_file, index_file = shard_files(self.folder, len(self._shards))
        sums, indexes, totals, digest = [], [], Totals(), hashlib.sha256()

        def copy(out: BinaryIO) -> None:
            nonlocal totals
            for unit in self._waiting:
                with open(self._piece(unit), "rb") as file:
                    piece = read_piece(file)
                    totals = totals.plus(piece.totals)
                    indexes.append(piece.index)
                    for chunk in chunks(file, piece.ids_bytes):
                        digest.update(chunk)
                        out.write(chunk)
            sums.append(FileSum(out.tell(), digest.hexdigest()))

        write_whole(ids_file, copy)
        index = Index(*(np.concatenate(arrays) for arrays in zip(*indexes)))
        write_whole(index_file, lambda file: write_index(file, index))
        self._shards.append(Shard(**totals._asdict(), ids=sums[0], index=sum_of(index_file)))
        self.next_unit += len(self._waiting)
        content = {"next_unit": self.next_unit, "shards": [asdict(s) for s in self._shards]}
        record = json.dumps(content).encode()
        write_whole(self._work / "shards.json", record)
        for unit in self._waiting:
            self._piece(unit).unlink()
        self._waiting = []

    def _save(self, tokenizer: Tokenizer) -> dict[str, FileSum]:
        tokenizer.save(self._work)
        if not (saved := find_tokenizer(self._work)):
            return {}
        content, file = Path(saved).read_bytes(), self.folder / Path(saved).name
        write_whole(file, content)
        return {file.name: sum_of(file)}

    def _write_indexed(self, tokenizer: Tokenizer) -> None:
        from longctx.data.indexed import write_indexed

        write_indexed(self._work / INDEXED, self._documents(), tokenizer.vocab_size)
        for suffix in (".bin", ".idx"):
            file = self._work / f"{INDEXED}{suffix}"
            with open(file, "rb+") as written:
                os.fsync(written.fileno())
            file.replace(self.folder / file.name)

    def _documents(self) -> Iterator[Ids]:
        dtype = DTYPES[self._plan["dtype"]]
        for unit in self._waiting:
            with open(self._piece(unit), "rb") as file:
                lengths = read_piece(file).index.lengths
                file.seek(0)
                for length in lengths.tolist():
                    yield np.frombuffer(file.read(length * dtype.itemsize), dtype)


@contextlib.contextmanager
def _damage_told(folder: Path) -> Iterator[None]:
    """InputError for a record that is not as it was written."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"--output {folder}: what it says of itself is damaged; remove it, and tokenize again"
        ) from error


def _totals_of(shard: Shard) -> Totals:
    return Totals(shard.documents, shard.tokens, shard.text_bytes, shard.skipped)


def _is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())
