"""Tells a launcher that a run was asked to stop and has saved, which is neither done nor failed."""

import os
from pathlib import Path

from longctx.errors import OutsideError

STOPPED_FILE = "LONGCTX_STOPPED_FILE"
"""Environment variable with the file that a launcher looks for when its processes have ended."""


def tell_launcher(saved: str) -> bool:
    """Writes what was saved into the launcher's file; False if no launcher waits for one.

    The first process of each host writes, because hosts need not share the file's disk. All may
    then end with exit code 0, which torchrun does not take for a failure.
    """
    name = os.environ.get(STOPPED_FILE, "")
    if name and os.environ.get("LOCAL_RANK", "0") == "0":
        file, partial = Path(name), Path(f"{name}.{os.environ.get('RANK', '0')}")
        try:
            partial.write_text(f"{saved}\n")
            partial.replace(file)
        except OSError as error:
            raise OutsideError(
                f"{STOPPED_FILE} = '{name}': cannot write: {error.strerror}; the run has saved "
                f"{saved}, and the same command resumes it"
            ) from error
    return bool(name)
