import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from longctx.errors import InputError, OutsideError
from longctx.launch.ports import free_port
from longctx.parallel.rendezvous import join
from tests.train.processes import exit_codes

pytestmark = pytest.mark.alone

SECONDS = timedelta(seconds=20)


def attempt(port: int, seconds_late: float) -> list[int]:
    """Exit codes of two workers of torchrun, of which the first one comes late."""
    return exit_codes([_fork(rank, port, seconds_late * (rank == 0)) for rank in range(2)])


def _fork(rank: int, port: int, late: float) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        os.environ |= {"TORCHELASTIC_RESTART_COUNT": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
        time.sleep(late)
        join("gloo", SECONDS)
        x = torch.tensor([float(rank)])
        dist.all_reduce(x)
        code = 0 if x.item() == 1 else 2
    finally:
        os._exit(code)


def test_workers_that_are_started_again_meet_in_the_launchers_store():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # Whether a dead address of an earlier attempt is used is chance: gloo compares ports.
    for late in (0, *[0.3] * 7):
        started = time.monotonic()
        assert attempt(store.port, late) == [0, 0]
        assert time.monotonic() - started < 10


def test_a_launcher_that_names_no_meeting_place_is_a_mistake(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InputError, match=r"MASTER_ADDR.*torchrun"):
        join("gloo", SECONDS)


@pytest.mark.parametrize("shared", ["True", "False"])
def test_a_first_process_that_never_comes_is_told(monkeypatch, shared):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port if shared == "True" else free_port()
    for name, value in {"WORLD_SIZE": 2, "RANK": 1, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
    with pytest.raises(OutsideError, match=r"rank 1: .* parallel\.timeout_seconds"):
        join("gloo", timedelta(seconds=1))
