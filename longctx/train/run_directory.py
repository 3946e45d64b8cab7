"""Opens a run directory: a new one, or the same run again."""

from pathlib import Path

from longctx.config import decode, first_difference, load_table, to_toml
from longctx.errors import InputError, OutsideError
from longctx.train import checkpoint
from longctx.train.settings import IDENTITY, MAY_CHANGE, Settings

CONFIG_FILE = "config.toml"


def open_run(settings: Settings, fingerprint: str) -> Path | None:
    """Makes sure that `settings` may write to the run directory; the checkpoint to resume from.

    `fingerprint` is that of the data, which must not have changed since the checkpoint.
    """
    folder = settings.run.path
    if folder.exists() and not folder.is_dir():
        raise InputError(f"run.dir = '{folder}': is a file; choose another run.dir")
    if not (folder / CONFIG_FILE).exists():
        if folder.exists() and any(folder.iterdir()):
            raise InputError(
                f"run.dir = '{folder}': holds files but no run; choose another run.dir"
            )
        return None
    _check_same_run(settings, folder)
    resumed = checkpoint.latest(folder)
    if resumed and checkpoint.load_state(resumed)["data_fingerprint"] != fingerprint:
        raise InputError(
            f"{resumed}: was trained on other data than data.path holds now; "
            "restore the data or choose another run.dir"
        )
    return resumed


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


def _check_same_run(settings: Settings, folder: Path) -> None:
    file = folder / CONFIG_FILE
    before = decode(Settings, load_table(file), file=str(file))
    if difference := first_difference(before, settings, IDENTITY, MAY_CHANGE):
        raise InputError(
            f"run.dir = '{folder}' holds another run ({difference}); "
            "choose another run.dir or restore that setting"
        )
