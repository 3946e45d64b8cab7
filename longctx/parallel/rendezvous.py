"""Where the processes of a run meet, also when torchrun starts them again after a failure."""

import os
import socket
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from longctx.errors import InputError, OutsideError

KEY = "longctx/meeting"
PROBE = timedelta(seconds=5)
RETRY_SECONDS = 0.05


def join(backend: str, timeout: timedelta, field: str = "parallel.timeout_seconds") -> None:
    """Makes the group of all processes that the launcher started; `backend` is gloo or nccl, and
    `field` sets the timeout.

    torchrun's workers share a store that outlives them, with the addresses of earlier, dead workers
    in it. Its count of restarts tells attempts apart on one host only: each host counts its own. So
    the first process names every attempt, and proves by an open port that it is alive.
    """
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            dist.init_process_group(backend, timeout=timeout)
            return
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        lasting = dist.TCPStore(host, port, is_master=False, timeout=timeout)
        name = _announce(lasting, host, size) if rank == 0 else _find(lasting, rank, timeout)
        store = dist.PrefixStore(name, lasting)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except ValueError as error:
        raise InputError(
            f"the processes of this run cannot meet: {_line(error)}; start them with torchrun, "
            "launch/local.sh or a scheduler that sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR "
            "and MASTER_PORT"
        ) from error
    except RuntimeError as error:
        raise OutsideError(
            f"rank {os.environ['RANK']}: the processes of this run did not meet within "
            f"{field} ({_line(error)})"
        ) from error


def _announce(lasting: dist.Store, host: str, size: int) -> str:
    """A new name for this attempt, which all others have seen."""
    name = uuid.uuid4().hex
    beacon = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
    beacon.set(KEY, name)
    lasting.set(KEY, f"{name} {beacon.port} {host}")
    lasting.wait([f"{KEY}/{name}/{rank}" for rank in range(1, size)])
    return name


def _find(lasting: dist.Store, rank: int, timeout: timedelta) -> str:
    """The name of this attempt; the first process of an earlier one does not answer."""
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        name, port, host = lasting.get(KEY).decode().split(" ")
        try:
            socket.create_connection((host, int(port)), timeout=PROBE.total_seconds()).close()
            beacon = dist.TCPStore(host, int(port), is_master=False, timeout=PROBE)
            if beacon.get(KEY).decode() == name:
                lasting.set(f"{KEY}/{name}/{rank}", "met")
                return name
        except (OSError, dist.DistError):
            pass
        time.sleep(RETRY_SECONDS)
    raise dist.DistStoreError("the first process does not answer")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
