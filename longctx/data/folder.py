"""A folder of token ids, read through memory maps.

    manifest.json     sizes and sha256 of the other files, and the sha256 of itself; written last
    tokens-00000.bin  ids end to end, uint16 or uint32, little endian
    tokens-00000.idx  lengths and residues of these documents, two arrays in numpy's format
    tokenizer.json    the tokenizer's own file, under its own name; nothing for bytes

`longctx data tokenize` writes it (`longctx/data/unfinished.py`).
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from longctx.data.stores import Ids, check_ids, check_range
from longctx.errors import InputError, OutsideError

VERSION = 1
MANIFEST = "manifest.json"
UNFINISHED = "unfinished-tokens"
"""Folder inside that holds what is not yet complete."""
OWN_SUM = "sha256"
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclass(frozen=True)
class FileSum:
    """Size and contents of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """What a manifest says of two files: ids, and the index of their documents."""

    documents: int
    tokens: int
    text_bytes: int
    """Bytes of text that these documents were."""
    skipped: int
    """Rows between them that were broken or empty."""
    ids: FileSum
    index: FileSum


@dataclass(frozen=True)
class Manifest:
    """What a folder holds."""

    plan: dict[str, Any]
    """What was tokenized and how; of this, `tokenizer`, `vocab_size` and `dtype` decide how the
    ids are read."""
    shards: tuple[Shard, ...]
    extras: dict[str, FileSum]
    """The tokenizer's own files."""

    def encode(self) -> bytes:
        """The contents of the file."""
        content = {
            "version": VERSION,
            **asdict(self),
            "documents": sum(shard.documents for shard in self.shards),
            "tokens": sum(shard.tokens for shard in self.shards),
        }
        content[OWN_SUM] = hashlib.sha256(canonical(content)).hexdigest()
        return json.dumps(content, sort_keys=True, indent=1).encode() + b"\n"


class TokenFolder:
    """Documents of a folder; a `TokenStore` that maps files and holds 17 bytes a document.

    Manifest, index and the sizes of all files are always checked; `verify` also hashes the ids.
    """

    def __init__(self, path: Path | str, verify: bool = True) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        plan = self.manifest.plan
        self.vocab_size: int = plan["vocab_size"]
        self.tokenizer: str = plan["tokenizer"]
        self.tokenizer_spec = next((str(self.path / name) for name in self.manifest.extras), "")
        """Of the tokenizer's own file in the folder, empty for bytes."""
        self.bytes_read = 0
        self._dtype = DTYPES[plan["dtype"]]
        parts = [self._open(number, verify) for number in range(len(self.manifest.shards))]
        self.lengths = np.concatenate([lengths for lengths, _ in parts])
        self.residues = np.concatenate([residues for _, residues in parts])
        for name, total in self.manifest.extras.items():
            check_file(self.path / name, total, hashed=verify)
        self._first = np.cumsum([0, *(len(lengths) for lengths, _ in parts)])
        self._starts = np.concatenate([np.cumsum(lengths) - lengths for lengths, _ in parts])
        self._maps: dict[int, np.memmap] = {}

    @property
    def skipped(self) -> int:
        """Rows and files that were left out when the folder was made."""
        return sum(shard.skipped for shard in self.manifest.shards)

    @property
    def text_bytes(self) -> int:
        """Bytes of text that the documents were."""
        return sum(shard.text_bytes for shard in self.manifest.shards)

    def read(self, document: int, start: int, stop: int) -> Ids:
        """Tokens `start` to `stop` of a document; no other byte is touched."""
        check_range(self, document, start, stop)
        number = int(np.searchsorted(self._first, document, side="right")) - 1
        origin = int(self._starts[document])
        ids = np.array(self._map(number)[origin + start : origin + stop])
        self.bytes_read += ids.nbytes
        return check_ids(ids, self.vocab_size, str(self.path), document)

    def fingerprint(self) -> str:
        """sha256 of tokenizer and hashes; the same wherever the folder lies and the text lay."""
        hashes = [(shard.ids.sha256, shard.index.sha256) for shard in self.manifest.shards]
        return hashlib.sha256(canonical([self.tokenizer, self.vocab_size, hashes])).hexdigest()

    def _open(self, number: int, verify: bool) -> "Index":
        shard, (ids, index) = self.manifest.shards[number], shard_files(self.path, number)
        check_file(ids, shard.ids, hashed=verify)
        check_file(index, shard.index)
        with open(index, "rb") as file:
            found = read_index(file)
        if (len(found.lengths), int(found.lengths.sum())) != (shard.documents, shard.tokens):
            raise InputError(f"{index}: is not what {MANIFEST} says; tokenize it again")
        return found

    def _map(self, number: int) -> np.memmap:
        if number not in self._maps:
            file, _ = shard_files(self.path, number)
            try:
                self._maps[number] = np.memmap(file, self._dtype, mode="r")
            except (OSError, ValueError) as error:
                raise OutsideError(f"{file}: cannot be read ({error}); check the disk") from error
        return self._maps[number]


class Index(NamedTuple):
    """Documents of a file of ids."""

    lengths: npt.NDArray[np.int64]
    residues: npt.NDArray[np.uint8]


def is_token_folder(path: Path) -> bool:
    """Whether a path is a folder of tokens, or the beginning of one, which TokenFolder refuses."""
    if (path / UNFINISHED).is_dir():
        return True
    return (path / MANIFEST).is_file() and any(path.glob("tokens-*"))


def shard_files(folder: Path, number: int) -> tuple[Path, Path]:
    """The files of ids and index of a shard."""
    return folder / f"tokens-{number:05}.bin", folder / f"tokens-{number:05}.idx"


def read_manifest(folder: Path) -> Manifest:
    """What the manifest of a folder says; InputError if it is not, bit for bit, as written."""
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        if (folder / UNFINISHED).is_dir():
            raise InputError(
                f"{folder}: is unfinished; run the same longctx data tokenize command again"
            ) from None
        raise InputError(f"{folder}: is no folder of tokens (it has no {MANIFEST})") from None
    except OSError as error:
        raise OutsideError(f"{path}: cannot be read ({error.strerror}); check the disk") from error
    damaged = InputError(f"{path}: is damaged; copy the folder again, or tokenize again")
    try:
        content = json.loads(data)
        if content["version"] != VERSION:
            raise InputError(
                f"{path}: version {content['version']!r} is not version {VERSION}, which this "
                "longctx reads; tokenize again"
            )
        shards = tuple(shard_from(table) for table in content["shards"])
        extras = {name: FileSum(**total) for name, total in content["extras"].items()}
        manifest = Manifest(content["plan"], shards, extras)
        is_whole = manifest.encode() == data and shards and manifest.plan["dtype"] in DTYPES
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise damaged from None
    if not is_whole:
        raise damaged
    return manifest


def check_file(path: Path, total: FileSum, hashed: bool = True) -> None:
    """InputError if a file has not the size, or the contents, that its manifest says."""
    try:
        size = path.stat().st_size
        if size != total.size:
            raise InputError(
                f"{path}: has {size:,} bytes instead of {total.size:,}, so it changed since it "
                "was tokenized; copy the folder again, or tokenize again"
            )
        if hashed:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != total.sha256:
                raise InputError(
                    f"{path}: changed since it was tokenized (its sha256 is another); copy the "
                    "folder again, or tokenize again"
                )
    except FileNotFoundError:
        raise InputError(f"{path}: is missing; copy the folder again, or tokenize again") from None
    except OSError as error:
        raise OutsideError(f"{path}: cannot be read ({error.strerror}); check the disk") from error


def sum_of(path: Path) -> FileSum:
    """Size and sha256 of a file."""
    with open(path, "rb") as file:
        return FileSum(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def write_index(file: BinaryIO, index: Index) -> None:
    """Writes lengths and residues."""
    np.save(file, index.lengths.astype("<i8"), allow_pickle=False)
    np.save(file, index.residues.astype("u1"), allow_pickle=False)


def read_index(file: BinaryIO) -> Index:
    """What `write_index` wrote."""
    lengths, residues = (np.load(file, allow_pickle=False) for _ in range(2))
    return Index(lengths, residues)


def canonical(value: Any) -> bytes:
    """The one way to write a JSON value, without white space."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def shard_from(table: dict[str, Any]) -> Shard:
    """A shard from its table in JSON."""
    sums = {name: FileSum(**table[name]) for name in ("ids", "index")}
    return Shard(**(table | sums))
