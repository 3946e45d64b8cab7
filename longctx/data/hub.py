"""Datasets of the datasets library: from its hub, saved by it, or files that it reads."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx.data.config import SourceConfig
from longctx.data.files import HUB, find_files, is_saved_dataset, tell_format
from longctx.errors import InputError, OutsideError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "jsonl": ("json", {}),
    "parquet": ("parquet", {}),
    "text": ("text", {"sample_by": "document", "encoding_errors": "replace"}),
}


def open_dataset(source: SourceConfig) -> "Dataset | IterableDataset":
    """The split that a source names; an IterableDataset, not shuffled, if it is `streaming`.

    No code of a dataset is run. A folder of files is read by the builder of their format.
    """
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it raises
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it tells a server of local files, too
    path = Path(source.path).expanduser()
    if not source.path.startswith(HUB) and is_saved_dataset(path):
        return _saved(source, path)
    name, options = _how_to_load(source)
    try:
        return datasets.load_dataset(
            name, source.subset or None, split=source.split, streaming=source.streaming, **options
        )
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        raise InputError(f"data.path = {source.path!r}: {_reason(error)}") from error
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise OutsideError(
            f"data.path = {source.path!r}: cannot be loaded ({_reason(error)}); check the name, "
            "the network and HF_HUB_OFFLINE, or download it first"
        ) from error


def _how_to_load(source: SourceConfig) -> tuple[str, dict[str, Any]]:
    if source.path.startswith(HUB):
        return source.path.removeprefix(HUB), {}
    written = "auto" if source.format == "datasets" else source.format
    kind = tell_format(replace(source, format=written, streaming=False))
    if kind not in BUILDERS:
        raise InputError(f"data.path = {source.path!r}: the datasets library reads no {kind}")
    builder, options = BUILDERS[kind]
    files = [str(path) for path in find_files(source.path).values()]
    split = source.split.partition("[")[0]  # of a slice such as train[:10%]
    return builder, {"data_files": {split: files}, **options}


def _saved(source: SourceConfig, path: Path) -> Any:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # the library lets through whatever its readers raise
        raise InputError(f"{path}: a damaged dataset ({_reason(error)})") from error
    if isinstance(found, datasets.DatasetDict):
        if source.split not in found:
            raise InputError(
                f"{path}: no split {source.split!r}; set data.split to one of {', '.join(found)}"
            )
        found = found[source.split]
    if source.streaming:
        return found.to_iterable_dataset(num_shards=max(len(found.cache_files), 1))
    return found


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
