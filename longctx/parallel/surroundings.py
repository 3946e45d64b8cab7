"""What schedulers and trackers have put into this process's environment; never a secret."""

import netrc
import os
from contextlib import suppress
from typing import NamedTuple

import torch

VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"


class SlurmJob(NamedTuple):
    """The job that this process runs in."""

    number: str
    partition: str
    nodes: str


def slurm_job() -> SlurmJob | None:
    """None outside of SLURM."""
    number = os.environ.get("SLURM_JOB_ID")
    if not number:
        return None
    return SlurmJob(
        number,
        os.environ.get("SLURM_JOB_PARTITION", "unknown"),
        os.environ.get("SLURM_JOB_NUM_NODES", "unknown"),
    )


def wandb_mode() -> str:
    """WANDB_MODE, empty if it is not set."""
    return os.environ.get("WANDB_MODE", "")


def has_wandb_key() -> bool:
    """Whether W&B would find a key, in the environment or where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    with suppress(OSError, netrc.NetrcParseError):
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
        return any("wandb" in host for host in hosts)
    return False


def network_interfaces() -> tuple[str, str]:
    """Through which gloo and NCCL are told to speak, empty if they are not."""
    return os.environ.get("GLOO_SOCKET_IFNAME", ""), os.environ.get("NCCL_SOCKET_IFNAME", "")


def visible_gpus() -> tuple[str, ...]:
    """What VISIBLE_GPUS calls the GPUs that this process may use."""
    count = torch.cuda.device_count()
    given = os.environ.get(VISIBLE_GPUS)
    return tuple(given.split(",") if given else map(str, range(count)))[:count]
