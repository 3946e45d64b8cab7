"""Opens a run directory: a new one, or the same run again."""

import json
import tempfile
from pathlib import Path
from typing import Any

from longctx.checkpoint import Address, latest, read_state
from longctx.config import decode, first_difference, load_table, to_toml
from longctx.data import Tokenizer
from longctx.errors import InputError, OutsideError
from longctx.files import write_whole
from longctx.train.settings import IDENTITY, MAY_CHANGE, Settings

CONFIG_FILE = "config.toml"
SUMMARY_FILE = "summary.json"


def open_run(settings: Settings, fingerprint: str) -> Address | None:
    """Makes sure that `settings` may write to the run directory; the checkpoint to resume from.

    `fingerprint` is that of the data, which must not have changed since the checkpoint.
    """
    folder = settings.checkpoints
    if isinstance(folder, Path) and folder.exists() and not folder.is_dir():
        raise InputError(f"checkpoint.dir = '{folder}': is a file; choose another checkpoint.dir")
    before, resumed = _run_before(settings), latest(folder)
    if before is None and resumed:
        raise InputError(
            f"checkpoint.dir = '{settings.checkpoints}': holds checkpoints of another run; "
            "choose another checkpoint.dir"
        )
    if resumed:
        _check_checkpoint(resumed, settings, fingerprint)
    elif before and (left := latest(before.checkpoint.folder(settings.run.path))):
        raise InputError(
            f"checkpoint.dir = '{settings.checkpoints}': is empty, but the run has {left}; "
            "move its checkpoints, or restore checkpoint.dir"
        )
    return resumed


def finished(settings: Settings) -> dict[str, Any] | None:
    """The summary of this run if it came to its end; InputError if another is in its directory."""
    if _run_before(settings) is None:
        return None
    try:
        summary = json.loads((settings.run.path / SUMMARY_FILE).read_text())
    except (FileNotFoundError, ValueError):
        return None
    step = summary.get("step") if isinstance(summary, dict) else None
    last = min(settings.train.stop_after or settings.train.steps, settings.train.steps)
    return summary if isinstance(step, int) and step >= last else None


def write_config(settings: Settings, tokenizer: Tokenizer | None = None) -> None:
    """Writes the resolved config into the run directory, beside the file of its tokenizer, and
    tries the folder of checkpoints."""
    folder = settings.run.path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / CONFIG_FILE, to_toml(settings).encode())
        if tokenizer:
            tokenizer.save(folder)
    except OSError as error:
        raise OutsideError(
            f"run.dir = '{folder}': cannot write: {error.strerror}; choose another run.dir"
        ) from error
    _try_to_write(settings.checkpoints)


def _try_to_write(folder: Address) -> None:
    """Raises OutsideError before a run that could not save; a URL is believed."""
    if not isinstance(folder, Path):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OutsideError(
            f"checkpoint.dir = '{folder}': cannot write: {error.strerror}; choose another "
            "checkpoint.dir"
        ) from error


def _check_checkpoint(path: Address, settings: Settings, fingerprint: str) -> None:
    """InputError if a checkpoint is not of this run, or not of this data."""
    state = read_state(path)
    saved = decode(Settings, state["config"], file=str(path))
    if difference := first_difference(saved, settings, IDENTITY, MAY_CHANGE):
        raise InputError(
            f"{path}: is of another run ({difference}); choose another checkpoint.dir or run.dir"
        )
    if state["data_fingerprint"] != fingerprint:
        raise InputError(
            f"{path}: was trained on other data, or with another tokenizer, than [data] names now; "
            "restore them or choose another run.dir"
        )


def _run_before(settings: Settings) -> Settings | None:
    """The settings of this run when it was last here; InputError if anything else is."""
    folder = settings.run.path
    if folder.exists() and not folder.is_dir():
        raise InputError(f"run.dir = '{folder}': is a file; choose another run.dir")
    file = folder / CONFIG_FILE
    if not file.exists():
        if folder.exists() and not all(p.name.startswith(".partial-") for p in folder.iterdir()):
            raise InputError(
                f"run.dir = '{folder}': holds files but no run; choose another run.dir"
            )
        return None
    before = decode(Settings, load_table(file), file=str(file))
    if difference := first_difference(before, settings, IDENTITY, MAY_CHANGE):
        raise InputError(
            f"run.dir = '{folder}' holds another run ({difference}); "
            "choose another run.dir or restore that setting"
        )
    return before
