"""Which files a path means, and what is in them."""

import glob
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from longctx.data.config import SourceConfig
from longctx.errors import InputError, OutsideError

Format = Literal["text", "jsonl", "parquet", "datasets", "tokens", "megatron"]

MAX_EMBEDDED_BYTES = 2_000_000
FOREIGN_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
GLOB_CHARACTERS = "*?["
HUB = "hf://"
SAVED_DATASETS = (("dataset_info.json", "state.json"), ("dataset_dict.json",))
ROWS = {".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".json.gz": "jsonl", ".parquet": "parquet"}
NO_TEXT = {".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".tar", ".tgz", ".arrow"}


def tell_format(source: SourceConfig) -> Format:
    """What is at the path: what the config says, or else what names tell."""
    if source.format != "auto":
        return source.format
    if source.streaming or source.path.startswith(HUB):
        return "datasets"
    if not source.path:
        return "text"
    path = Path(source.path).expanduser()
    if os.path.isdir(path):
        from longctx.data.folder import is_token_folder

        if is_token_folder(path):
            return "tokens"
        if is_saved_dataset(path):
            return "datasets"
    if is_indexed(source.path):
        return "megatron"
    files = find_files(source.path)
    kind = _format_of(list(files), source.path)
    if kind == "text":
        _refuse_no_text(files, source.path)
    return kind


def settled(source: SourceConfig) -> SourceConfig:
    """The same source with the format that is at the path, so that nothing looks for it again."""
    return replace(source, format=tell_format(source))


def is_saved_dataset(path: Path) -> bool:
    """Whether the datasets library saved this folder."""
    return any(all(os.path.isfile(path / name) for name in names) for names in SAVED_DATASETS)


def is_indexed(prefix: str) -> bool:
    """Whether Megatron's two files begin with this."""
    path = str(Path(prefix).expanduser())
    return all(os.path.isfile(path + suffix) for suffix in (".idx", ".bin"))


def find_files(path: str) -> dict[str, Path]:
    """Files by name, in the order of names; none of a path means the standard library's sources."""
    found = _user_files(path) if path else _embedded_files()
    if not found:
        raise InputError(f"data.path = {path!r}: holds no files; choose another")
    return dict(sorted(found.items()))


def size_of(path: Path) -> int:
    """Bytes of a file."""
    try:
        return path.stat().st_size
    except OSError as error:
        raise OutsideError(f"{path}: cannot be read ({error.strerror}); check the disk") from error


def read_bytes(path: Path) -> bytes:
    """A whole file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> OutsideError:
    """What is said when a file that was found cannot be read."""
    return OutsideError(f"{path}: cannot be read ({error.strerror}); check its permissions")


def _format_of(names: list[str], path: str) -> Format:
    """Rows only if all files hold them; beside text, .json is text too, as in a folder of code."""
    kinds = {_kind(name): name for name in names}
    if "text" in kinds or not kinds:
        kinds.pop("json", None)
    elif "json" in kinds:
        kinds["jsonl"] = kinds.pop("json")
    if len(kinds) <= 1:
        return next(iter(kinds), "text")
    raise InputError(
        f"data.path = {path!r}: files of several formats, {' and '.join(sorted(kinds.values()))}; "
        "set data.format, or choose files of one format with a glob"
    )


def _refuse_no_text(files: dict[str, Path], path: str) -> None:
    """InputError for files that names tell to be no text."""
    for name, file in files.items():
        if file.suffix in NO_TEXT:
            raise InputError(
                f"data.path = {path!r}: {name} is no plain text; choose other files with a glob, "
                'or set data.format = "text" to take its bytes for text'
            )
        if file.suffix in (".bin", ".idx") and is_indexed(str(file.with_suffix(""))):
            raise InputError(
                f"data.path = {path!r}: {name} holds token ids, not text; name a whole folder of "
                f"tokens, or Megatron's files without .bin and .idx, as in {file.with_suffix('')}"
            )


def _kind(name: str) -> str:
    kinds = (kind for suffix, kind in ROWS.items() if name.endswith(suffix))
    return next(kinds, "json" if name.endswith(".json") else "text")


def _embedded_files() -> dict[str, Path]:
    base = Path(sysconfig.get_paths()["stdlib"])
    found = _named(_walk(base, lambda name: name not in FOREIGN_FOLDERS), base)
    return {
        name: path
        for name, path in found.items()
        if name.endswith(".py") and os.access(path, os.R_OK) and size_of(path) <= MAX_EMBEDDED_BYTES
    }


def _walk(folder: Path, wanted: Callable[[str], bool]) -> Iterator[Path]:
    """Files below a folder, as far as names of folders and files are wanted."""

    def fail(error: OSError) -> None:
        raise unreadable(Path(error.filename), error) from error

    for place, folders, files in os.walk(folder, onerror=fail):
        folders[:] = filter(wanted, folders)
        paths = (os.path.join(place, name) for name in files if wanted(name))
        yield from (Path(path) for path in paths if os.path.isfile(path))


def _user_files(pattern: str) -> dict[str, Path]:
    """Files by name, relative to the folder or to the part of a glob before its first wildcard.

    Hidden files and folders are left out, as a glob does.
    """
    path = Path(pattern).expanduser()
    if os.path.isfile(path):
        return {path.name: path}
    if os.path.isdir(path):
        return _named(_walk(path, lambda name: not name.startswith(".")), path)
    matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
    if not matches:
        raise InputError(
            f"data.path = {pattern!r}: no such file, folder or glob match; "
            "leave it empty for the embedded source"
        )
    return _named((match for match in matches if os.path.isfile(match)), _fixed_folder(path))


def _fixed_folder(pattern: Path) -> Path:
    while any(character in str(pattern) for character in GLOB_CHARACTERS):
        pattern = pattern.parent
    return pattern


def _named(files: Iterable[Path], base: Path) -> dict[str, Path]:
    return {file.relative_to(base).as_posix(): file for file in files}
