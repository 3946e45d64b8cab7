"""The `[checkpoint]` table."""

from dataclasses import dataclass
from pathlib import Path

from longctx.errors import InputError

Address = Path | str
"""Where checkpoints are: a path, or an fsspec URL."""


@dataclass(frozen=True)
class CheckpointConfig:
    """The `[checkpoint]` table."""

    every: int = 0
    """Steps between checkpoints; 0 saves only at the end."""
    keep: int = 2
    """How many newest checkpoints stay on disk."""
    keep_every: int = 0
    """Checkpoints of steps that this divides are never removed; 0 keeps only the newest."""
    asynchronous: bool = True
    """Train on while a copy in CPU memory is written to the disk."""
    dir: str = ""
    """Folder or fsspec URL (s3://...) of the checkpoints; empty means checkpoints in run.dir."""

    def __post_init__(self) -> None:
        for name in ("every", "keep_every"):
            if getattr(self, name) < 0:
                raise InputError(f"checkpoint.{name} must be 0 or more, not {getattr(self, name)}")
        if self.keep < 1:
            raise InputError(f"checkpoint.keep must be 1 or more, not {self.keep}")

    def folder(self, run_dir: Path) -> Address:
        """Where the checkpoints of the run in `run_dir` are."""
        return locate(self.dir) if self.dir else run_dir / "checkpoints"


def is_remote(address: Address) -> bool:
    """Whether an address is a URL."""
    return isinstance(address, str) and "://" in address


def locate(text: Address) -> Address:
    """A URL as it is, anything else as a path."""
    return text if is_remote(text) else Path(text)
