"""Options that the commands of `longctx data` share."""

from dataclasses import dataclass
from typing import Literal

from longctx.data.config import SourceConfig


@dataclass(frozen=True)
class PathOptions:
    """How what is at a path is read; the `[data]` table has the same fields."""

    read_as: Literal["auto", "text", "jsonl", "parquet", "datasets", "tokens", "megatron"] = "auto"
    """What is at the path, data.format of a run; auto tells by names."""
    column: str = "text"
    """Field of a row that holds its text, or its token ids."""
    subset: str = ""
    """Configuration of a dataset of the datasets library."""
    split: str = "train"
    """Split of a dataset of the datasets library."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """What a row gets that is broken or has no text; skipped ones are counted."""

    def source(self, path: str) -> SourceConfig:
        """Where documents come from."""
        return SourceConfig(
            path=path,
            format=self.read_as,
            column=self.column,
            subset=self.subset,
            split=self.split,
            bad_rows=self.bad_rows,
        )
