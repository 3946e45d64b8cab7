"""TensorBoard files that mirror `metrics.jsonl`."""

import json
from pathlib import Path

from longctx.train.mirror import FLUSH_SECONDS, flat
from longctx.train.redaction import redact

FOLDER = "tensorboard"


class Board:
    """Writes scalars; those of steps that a resumed run repeats hide the earlier ones."""

    def __init__(self, run_dir: Path, resolved: dict, resume_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("pip install 'longctx[tensorboard]'") from error
        folder = run_dir / FOLDER
        self._writer = SummaryWriter(
            str(folder), purge_step=resume_step + 1, flush_secs=FLUSH_SECONDS
        )
        self._writer.add_text("config", f"```\n{json.dumps(redact(resolved), indent=1)}\n```")
        self.place, self.trouble = str(folder), ""

    def log(self, row: dict) -> None:
        """All numbers of a row."""
        for name, value in flat(row).items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, row["step"])

    def finish(self, failed: bool) -> None:
        """Writes what is left."""
        self._writer.close()
