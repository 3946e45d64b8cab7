"""Finds checkpoints: the newest of a folder, or the one that a path means."""

from pathlib import Path

from longctx.checkpoint.config import Address, CheckpointConfig, is_remote, locate
from longctx.checkpoint.manifest import MANIFEST_FILE
from longctx.checkpoint.store import open_store, step_of
from longctx.checkpoint.strict import reason
from longctx.config import decode, load_table
from longctx.errors import InputError, OutsideError


def latest(folder: Address) -> Address | None:
    """The checkpoint of the highest step in a folder of checkpoints, None without any."""
    try:
        steps = open_store(folder).steps()
    except OSError as error:
        raise OutsideError(f"{folder}: cannot look for checkpoints: {reason(error)}") from error
    if steps:
        return steps[max(steps)]
    if not is_remote(folder):
        for path in sorted(Path(folder).glob("step-*")):
            if step_of(path.name) is not None:
                raise InputError(
                    f"{path}: has no {MANIFEST_FILE}, so it is damaged or of an older format; "
                    "move it away, or use the version of longctx that wrote it"
                )
    return None


def resolve(path_or_run: Address) -> Address:
    """The checkpoint meant by a path or URL: itself, or the newest of a run or folder."""
    address = locate(path_or_run)
    if isinstance(address, Path):
        if (address / MANIFEST_FILE).exists() or step_of(address.name) is not None:
            return address
        folders = [_folder_of_run(address), address]
    else:
        url = address.rstrip("/")
        if step_of(url.rpartition("/")[2]) is not None:
            return url
        folders = [url, f"{url}/checkpoints"]
    for folder in folders:
        if found := latest(folder):
            return found
    raise InputError(
        f"{address}: no checkpoint here; give a run directory that has checkpoints/step-N, "
        "or a step-N directory"
    )


def _folder_of_run(run: Path) -> Address:
    """Where the config of a run says that its checkpoints are."""
    file = run / "config.toml"
    table = load_table(file).get("checkpoint", {}) if file.exists() else {}
    return decode(CheckpointConfig, table, file=str(file)).folder(run)
