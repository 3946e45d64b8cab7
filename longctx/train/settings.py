"""The whole configuration of a run, composed of tables that their owners define."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from longctx.checkpoint import Address, CheckpointConfig
from longctx.config import decode, find_config, load_table
from longctx.data import DataConfig
from longctx.errors import InputError
from longctx.model.decoder import ModelConfig
from longctx.model.memory import MemoryConfig
from longctx.parallel import ParallelConfig
from longctx.parallel.mesh import local_rank
from longctx.train.guard import FaultsConfig
from longctx.train.metrics import LogConfig
from longctx.train.optim import OptimConfig

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class RunConfig:
    """The `[run]` table."""

    name: str = "run"
    """Name in the log, the picture and W&B."""
    dir: str = ""
    """Run directory; empty means runs/<name>. A run that is found there is resumed."""
    seed: int = 0
    """Decides initial weights and the order of data."""
    init_from: str = ""
    """Run or checkpoint whose weights a new run starts from, with a fresh optimizer."""

    @property
    def path(self) -> Path:
        """The run directory."""
        return Path(self.dir or f"runs/{self.name}")

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise InputError(f"run.name = {self.name!r}: must be a plain file name")


@dataclass(frozen=True)
class TrainConfig:
    """The `[train]` table."""

    steps: int = 500
    """Optimizer steps of the whole run."""
    stop_after: int = 0
    """Stop after this step, with the schedule of `steps`; 0 goes to the end."""
    seq_len: int = 1024
    """Tokens of a sequence."""
    batch_size: int = 4
    """Sequences of a step."""
    micro_batch: int = 0
    """Sequences of one forward and backward pass; 0 means batch_size."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU if there is one."""
    precision: Literal["auto", "fp64", "fp32", "bf16"] = "auto"
    """bf16 keeps weights, states and loss in fp32; auto is bf16 on a GPU and fp32 on a CPU."""
    deterministic: bool = False
    """Two runs on the same machines are equal bit for bit; refuses what cannot be."""

    def __post_init__(self) -> None:
        for name in ("steps", "seq_len", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"train.{name} = {getattr(self, name)}: must be at least 1")
        for name in ("stop_after", "micro_batch"):
            if getattr(self, name) < 0:
                raise InputError(f"train.{name} = {getattr(self, name)}: must not be negative")

    def resolve_device(self) -> torch.device:
        """The device that `device` means on this machine."""
        has_gpu = torch.cuda.is_available()
        if self.device == "cuda" and not has_gpu:
            raise InputError("train.device = 'cuda': no GPU here; use 'cpu' or 'auto'")
        if not has_gpu or self.device == "cpu":
            return torch.device("cpu")
        return torch.device("cuda", local_rank())

    def resolve_precision(self, device: torch.device) -> str:
        """The precision that `precision` means on `device`."""
        if self.precision != "auto":
            return self.precision
        return "bf16" if device.type == "cuda" else "fp32"


@dataclass(frozen=True)
class EvalConfig:
    """The `[eval]` table."""

    every: int = 100
    """Steps between evaluations on held-out data; 0 evaluates only at the end."""
    sequences: int = 16
    """Held-out sequences of an evaluation."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise InputError(f"eval.every = {self.every}: must not be negative")
        if self.sequences < 1:
            raise InputError(f"eval.sequences = {self.sequences}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All tables of a config file."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def checkpoints(self) -> Address:
        """Where the checkpoints of the run are."""
        return self.checkpoint.folder(self.run.path)

    def __post_init__(self) -> None:
        self.data.check_length(self.train.seq_len)
        self.memory.check(self.model.letters)
        for letter, mixer in self.model.mixers.items():
            mixer.check_length(self.train.seq_len, f"model.mixers.{letter}")


IDENTITY = (
    "run.seed",
    "data",
    "model",
    "optim",
    "train.steps",
    "train.seq_len",
    "train.batch_size",
)
"""What a resumed run may not change, but for who computes it and which steps are left out."""
MAY_CHANGE = (
    "data.skip_steps",
    "data.prefetch",
    "data.verify",
    "model.backend",
    "model.mixers.*backend",
)


def load_settings(name: str) -> Settings:
    """Reads a config file, or the packaged preset of that name."""
    path = find_config(name, "preset")
    return decode(Settings, load_table(path), file=str(path))
