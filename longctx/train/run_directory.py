"""Opens a run directory: a new one, or the same run again."""

import json
from pathlib import Path
from typing import Any

from longctx.config import decode, first_difference, load_table, to_toml
from longctx.errors import InputError, OutsideError
from longctx.train import checkpoint
from longctx.train.settings import IDENTITY, MAY_CHANGE, Settings

CONFIG_FILE = "config.toml"
SUMMARY_FILE = "summary.json"


def open_run(settings: Settings, fingerprint: str) -> Path | None:
    """Makes sure that `settings` may write to the run directory; the checkpoint to resume from.

    `fingerprint` is that of the data, which must not have changed since the checkpoint.
    """
    if not _holds_run(settings):
        return None
    resumed = checkpoint.latest(settings.run.path)
    if resumed and checkpoint.load_state(resumed)["data_fingerprint"] != fingerprint:
        raise InputError(
            f"{resumed}: was trained on other data than data.path holds now; "
            "restore the data or choose another run.dir"
        )
    return resumed


def finished(settings: Settings) -> dict[str, Any] | None:
    """The summary of this run if it came to its end; InputError if another is in its directory."""
    if not _holds_run(settings):
        return None
    try:
        summary: dict[str, Any] = json.loads((settings.run.path / SUMMARY_FILE).read_text())
    except (FileNotFoundError, ValueError):
        return None
    last = min(settings.train.stop_after or settings.train.steps, settings.train.steps)
    return summary if summary["step"] >= last else None


def write_config(settings: Settings) -> None:
    """Writes the resolved config into the run directory."""
    folder = settings.run.path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".partial-{CONFIG_FILE}"
        partial.write_text(to_toml(settings))
        checkpoint.sync_path(partial)
        partial.replace(folder / CONFIG_FILE)
    except OSError as error:
        raise OutsideError(
            f"run.dir = '{folder}': cannot write: {error.strerror}; choose another run.dir"
        ) from error


def _holds_run(settings: Settings) -> bool:
    """Whether the run directory holds this run; InputError if it holds anything else."""
    folder = settings.run.path
    if folder.exists() and not folder.is_dir():
        raise InputError(f"run.dir = '{folder}': is a file; choose another run.dir")
    file = folder / CONFIG_FILE
    if not file.exists():
        if folder.exists() and any(folder.iterdir()):
            raise InputError(
                f"run.dir = '{folder}': holds files but no run; choose another run.dir"
            )
        return False
    before = decode(Settings, load_table(file), file=str(file))
    if difference := first_difference(before, settings, IDENTITY, MAY_CHANGE):
        raise InputError(
            f"run.dir = '{folder}' holds another run ({difference}); "
            "choose another run.dir or restore that setting"
        )
    return True
