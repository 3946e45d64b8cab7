"""The `[data]` table."""

from dataclasses import dataclass, field, fields
from typing import Literal

from longctx.config.steps import range_of_steps
from longctx.errors import InputError


@dataclass(frozen=True)
class SourceConfig:
    """Where documents come from."""

    path: str = ""
    """Text file, folder or glob, one document a file; JSON lines or parquet, one a row; a folder
    of tokens; the prefix of a Megatron .bin and .idx; hf://NAME, or a folder that datasets saved.
    Empty uses the Python standard library's sources."""
    format: Literal["auto", "text", "jsonl", "parquet", "datasets", "tokens", "megatron"] = "auto"
    """What is at `path`; auto tells by names."""
    column: str = "text"
    """Field of a row that holds its text, or its token ids."""
    subset: str = ""
    """Configuration of a dataset of the datasets library."""
    split: str = "train"
    """Split of a dataset of the datasets library."""
    streaming: bool = False
    """Read a dataset as it comes instead of downloading it first: shards in random order, rows of a
    shard in theirs."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """What a row gets that is broken or has no text; skipped ones are counted."""


@dataclass(frozen=True)
class MixtureConfig(SourceConfig):
    """One source of several."""

    weight: float = 1.0
    """Share of the sequences, relative to those of the other sources."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise InputError(f"weight = {self.weight}: must be a positive number")


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    """The `[data]` table."""

    mixture: dict[str, MixtureConfig] = field(default_factory=dict)
    """Sources by name, each with a path and a weight, instead of `path`."""
    tokenizer: str = ""
    """A tokenizer.json, a SentencePiece .model, or bytes; ids:N stands for ids below N without a
    text. Empty means bytes for text, and for tokens the one that made them."""
    validation_path: str = ""
    """Held-out documents, read as `path` is (format, column and so on of [data], not of a mixture's
    sources); empty holds out a share of `path`."""
    validation_percent: int = 5
    """Share of the documents, or of a task's sequences, held out, chosen by a hash; 1 to 50."""
    document_reset: bool = True
    """State, attention and positions restart at each document; false treats a packed sequence as
    one document."""
    packing: Literal["concat", "best_fit", "whole"] = "concat"
    """concat cuts the stream of shuffled documents each seq_len tokens; best_fit cuts only
    documents that are longer, and fills sequences with pieces that fit best; whole gives each piece
    a sequence of its own. What is left of a sequence is padding, which counts in no loss."""
    shortest: int = 0
    """Tokens below which a document is left out of training."""
    long_from: int = 0
    """Tokens from which a document counts as long; 0 means that none does."""
    long_repeat: int = 1
    """How often an epoch holds each long document."""
    verify: bool = True
    """Hash every file of a folder of tokens before training; false checks their sizes only."""
    prefetch: int = 2
    """Micro-batches that a thread reads ahead; 0 reads each when it is needed."""
    task: Literal["", "mqar", "needle", "selective_copying"] = ""
    """Generate sequences instead of reading text: mqar asks for values of keys told first, needle
    at the end for values of keys hidden anywhere, selective_copying for letters between noise. Each
    sequence is one document; only answers count in the loss."""
    pairs: int = 8
    """Keys, with a value each, that a sequence of mqar or needle tells."""
    answers: int = 8
    """Answers that a sequence of a task asks for: different keys, or letters to copy."""
    vocabulary: int = 64
    """Different tokens of a task: half keys and half values, a third each of keys, values and hay,
    or noise, marker and letters."""
    skip_steps: tuple[str, ...] = ()
    """Steps whose batches are not trained on, such as 120-140; their numbers and learning rates
    pass."""

    def __post_init__(self) -> None:
        if not 1 <= self.validation_percent <= 50:
            raise InputError(
                f"data.validation_percent = {self.validation_percent}: choose 1 to 50 percent"
            )
        for name in ("shortest", "long_from", "prefetch"):
            if getattr(self, name) < 0:
                raise InputError(f"data.{name} = {getattr(self, name)}: must not be negative")
        if self.long_repeat < 1:
            raise InputError(f"data.long_repeat = {self.long_repeat}: must be at least 1")
        if self.long_repeat > 1 and not self.long_from:
            raise InputError(
                f"data.long_repeat = {self.long_repeat} repeats no document while data.long_from "
                "is 0; set both"
            )
        if self.path and self.mixture:
            raise InputError(
                f"data.path = {self.path!r} and [data.mixture]: leave one of them out; a mixture "
                "names a path for each source"
            )
        if self.mixture and not self.validation_path:
            self._check_source_unset()
        for text in self.skip_steps:
            range_of_steps(text, "data.skip_steps")
        if self.task:
            self._check_task()

    def skips(self, step: int) -> bool:
        """Whether the batch of a step, which counts from 1, is not trained on."""
        return any(step in range_of_steps(text, "data.skip_steps") for text in self.skip_steps)

    def sources(self) -> dict[str, SourceConfig]:
        """All sources by name; the only one of a table without a mixture has the name ""."""
        # Sorted, as two tables that differ in the order of their sources are equal.
        return dict(sorted(self.mixture.items())) or {"": self}

    def _check_source_unset(self) -> None:
        for setting in fields(SourceConfig):
            if getattr(self, setting.name) != setting.default:
                raise InputError(
                    f"data.{setting.name} = {getattr(self, setting.name)!r} has no effect beside "
                    f"[data.mixture]: set {setting.name} for each of its sources"
                )

    def _check_task(self) -> None:
        task, pairs, answers = self.task, self.pairs, self.answers
        if self.path or self.mixture:
            raise InputError(
                f"data.path = {self.path!r} and data.task = {task!r}: a task generates its own "
                "data; leave one of them empty"
            )
        if answers < 1:
            raise InputError(f"data.answers = {answers}: must be at least 1")
        if task != "selective_copying" and answers > pairs:
            raise InputError(
                f"data.answers = {answers} asks for more keys than data.pairs = {pairs}; "
                "lower answers or raise pairs"
            )
        least = {"mqar": 2 * pairs + 2, "needle": 3 * pairs, "selective_copying": 4}[task]
        if self.vocabulary < least:
            raise InputError(
                f"data.vocabulary = {self.vocabulary}: {task} needs at least {least}"
                + (f" for data.pairs = {pairs}" if least != 4 else "")
            )

    def check_length(self, seq_len: int) -> None:
        """Raises InputError if sequences are too short for the task."""
        is_copying = self.task == "selective_copying"
        told = self.answers if is_copying else 2 * self.pairs
        if self.task and told + self.answers > seq_len:
            pairs = "" if is_copying else f"data.pairs = {self.pairs} and "
            raise InputError(
                f"train.seq_len = {seq_len} is too short for {pairs}data.answers = "
                f"{self.answers}: {self.task} needs {told + self.answers} tokens"
            )
