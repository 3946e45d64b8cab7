"""What DeepSpeed's ZeRO is asked for: its configuration, and what must hold before it starts."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from longctx.errors import InputError

Place = Literal["device", "cpu", "nvme"]
"""Where weights or optimizer state lie between uses."""
BUCKET = 50_000_000
"""Elements that DeepSpeed reduces or gathers at a time."""
PERSISTENT = 10_000
"""Elements below which stage 3 keeps a weight whole on every process."""


@dataclass(frozen=True)
class Zero:
    """What is spread over processes, and where it lies."""

    stage: int = 2
    """1 spreads optimizer state, 2 also gradients, 3 also weights."""
    optimizer: Place = "device"
    weights: Place = "device"
    nvme_path: str = ""
    """Folder for what lies on NVMe."""
    micro_batches: int = 1
    """Backward passes of a step."""
    clip_norm: float = 0.0
    """Largest norm of the gradient; 0 does not clip."""
    bf16: bool = False
    """Whether products are rounded to bf16; weights, gradients and optimizer state stay in fp32."""
    universal: bool = False
    """Whether DeepSpeed's own checkpoints are read in their universal form."""

    def __post_init__(self) -> None:
        if self.weights != "device" and self.stage < 3:
            raise InputError(
                f"memory.weights = {self.weights!r} with parallel.zero_stage = {self.stage}: only "
                "stage 3 takes weights off the device; set zero_stage = 3"
            )
        if self.optimizer == "nvme" and self.stage < 3:
            raise InputError(
                f"memory.optimizer = 'nvme' with parallel.zero_stage = {self.stage}: set "
                "zero_stage = 3, or optimizer = 'cpu'"
            )
        if self.on_nvme and not self.nvme_path:
            raise InputError("memory.nvme_path is empty: give a folder on an NVMe drive")
        if self.on_nvme and not Path(self.nvme_path).is_dir():
            raise InputError(
                f"memory.nvme_path = {self.nvme_path!r}: no such folder; give one on an NVMe drive"
            )

    @property
    def on_nvme(self) -> bool:
        """Whether anything lies on NVMe."""
        return "nvme" in (self.optimizer, self.weights)


def deepspeed_config(zero: Zero, processes: int, on_gpu: bool) -> dict[str, Any]:
    """DeepSpeed's configuration; everything it could decide by itself is decided here."""
    spread: dict[str, Any] = {
        "stage": zero.stage,
        "overlap_comm": on_gpu,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    if zero.stage == 3:
        spread["stage3_prefetch_bucket_size"] = BUCKET
        spread["stage3_param_persistence_threshold"] = PERSISTENT
        spread["memory_efficient_linear"] = False
    for name, place in (("offload_optimizer", zero.optimizer), ("offload_param", zero.weights)):
        if place != "device":
            spread[name] = {"device": place, "pin_memory": on_gpu}
        if place == "nvme":
            spread[name]["nvme_path"] = zero.nvme_path
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": zero.micro_batches,
        "train_batch_size": zero.micro_batches * processes,
        "gradient_clipping": zero.clip_norm,
        "zero_optimization": spread,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {
            "enabled": zero.bf16,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "checkpoint": {"load_universal": zero.universal},
    }


def check_installed() -> None:
    """InputError without DeepSpeed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise InputError(
            "parallel.engine = 'deepspeed': DeepSpeed is not installed; "
            "pip install 'longctx[deepspeed]', or choose engine 'fsdp2'"
        )
