"""Checks between real processes, some of which pretend to be on other hosts."""

import contextlib
import io
import json
import os
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from longctx.doctor import command, crew, crew_step, measure
from longctx.doctor.command import run
from longctx.doctor.findings import Finding
from longctx.parallel import links
from longctx.plan.clusters import load_cluster
from tests.dist import run_gloo

pytestmark = pytest.mark.cluster

CPU = torch.device("cpu")
LOCAL = [Finding("ok", "a disk", "fine", "storage")]
SMALL = {"LARGE": {"cpu": 2**16}, "GATHERED": {"cpu": (4096, 8192)}}


@contextlib.contextmanager
def on_host(rank, ranks, host):
    """This process as a launcher would have started it, in the group that is there already."""
    own = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": 2, "LOCAL_RANK": rank % 2, "RANK": rank}
    with (
        mock.patch.dict(os.environ, {name: str(value) for name, value in own.items()}),
        mock.patch.object(socket, "gethostname", return_value=host),
        mock.patch.object(links, "join"),
        mock.patch.object(links.Peers, "close"),
        mock.patch.multiple(links, **SMALL),
    ):
        yield


def examined(rank, folder, local=(), seconds=30, products=lambda: 1e9, device=CPU):
    with on_host(rank, 4, "ab"[rank // 2]):
        peers = links.Peers(CPU, seconds)
        peers.device = device
        return crew.examine(peers, [*LOCAL, *local], Path(folder), products)


def healthy_and_not(rank, folder):
    """Four ranks on two hosts: all well, then one fault after another."""
    found = {"healthy": examined(rank, folder)}
    elsewhere = Path(folder, str(rank))
    elsewhere.mkdir()
    with mock.patch.object(crew, "SEEN_SECONDS", 0.2):
        found["folder"] = examined(rank, elsewhere if rank == 3 else folder)
    other = {"torch": "2.12"} if rank == 2 else {"torch": "2.13"}
    with mock.patch.object(crew, "versions_here", return_value=other):
        found["versions"] = examined(rank, folder)
    ahead = time.time
    shift = 60.0 * (rank == 3)
    with mock.patch.object(links.time, "time", side_effect=lambda: ahead() + shift):
        found["clock"] = examined(rank, folder)
    trouble = [Finding("problem", "a disk", "full", "storage")] if rank == 2 else []
    found["host"] = examined(rank, folder, trouble)
    broken = mock.patch.object(links.Peers, "collectives", side_effect=RuntimeError("NCCL error"))
    with broken if rank == 1 else contextlib.nullcontext():
        found["failure"] = examined(rank, folder, seconds=2)
    found["products"] = examined(rank, folder, products=lambda: 1e9 if rank != 2 else [][0])
    found["device"] = examined(rank, folder, device=CPU if rank == 3 else torch.device("cuda"))
    shut = Path(folder, "shut")
    refuse = mock.patch.object(crew, "nearest_folder", side_effect=PermissionError(13, "denied"))
    with refuse if rank == 1 else contextlib.nullcontext():
        found["shut"] = examined(rank, shut)
    return found


def text(crew_found):
    return {f"{finding.level} {finding}" for finding in crew_found.findings}


def starts(found, words):
    return any(line.startswith(words) for line in text(found))


def test_four_processes_on_two_hosts_agree_or_the_fault_is_named(tmp_path):
    ranks = run_gloo(4, healthy_and_not, str(tmp_path))
    for name in ("healthy", "versions", "clock", "host", "failure", "products", "device", "shut"):
        assert all(text(found[name]) == text(ranks[0][name]) for found in ranks), name
    healthy = ranks[0]["healthy"]
    assert {finding.level for finding in healthy.findings} <= {"ok", "warning"}
    assert set(healthy.tiers) == {"node", "fabric"}
    assert all(link.latency > 0 and link.bandwidth > 0 for link in healthy.tiers.values())
    assert starts(healthy, "ok 4 processes on 2 hosts")
    assert starts(healthy, "ok all-reduce: ")
    assert starts(healthy, "ok clocks differ by 0.0")
    found = ranks[0]
    assert starts(found["folder"], f"problem {tmp_path} is not shared: rank")
    assert starts(found["versions"], "problem torch differs: 2.13 on rank 0, 2.12 on rank 2")
    assert starts(found["clock"], "warning the clock of b is 60.0 s off")
    assert starts(found["host"], "problem b: a disk: full")
    assert starts(found["failure"], "problem measuring collectives: failed: rank 1: NCCL error")
    assert starts(found["products"], "problem measuring matrix products: failed: rank 2: list")
    assert starts(found["device"], "problem GPUs on some ranks only: rank 3 on b has none")
    assert not any("within a node" in line for line in text(found["device"]))
    assert starts(found["shut"], f"problem {tmp_path}/shut cannot be written by all: rank 1: ")
    assert not list(tmp_path.glob(".doctor-*"))


def measured(rank, file):
    quick = {
        "TOKENS": {"cpu": (64,)},
        "ITEM_SECONDS": {"cpu": 0.0},
        "COPIED": {"cpu": 2**16},
        "peak_flops": lambda *_: (1e11, ""),
    }
    said = io.StringIO()
    with (
        on_host(rank, 2, "a"),
        mock.patch.multiple(measure, **quick),
        mock.patch.object(command, "local_checks", return_value={"x": [lambda: LOCAL]}),
        # A plan of a machine that was measured so quickly may be longer than its steps.
        mock.patch.object(crew_step, "step_time", return_value=SimpleNamespace(total=0.0)),
        contextlib.redirect_stdout(said),
    ):
        code = run(["tiny", "--measure", "--json", "--output", file])
    return code, said.getvalue()


def test_two_processes_write_one_cluster_with_links_and_one_report(tmp_path):
    file = tmp_path / "cluster.toml"
    (code, said), (other, silent) = run_gloo(2, measured, str(file))
    assert (code, other, silent) == (0, 0, "")
    assert json.loads(said)["worst"] in ("ok", "warning")
    cluster = load_cluster(str(file))
    assert cluster.processes_per_node == 2
    assert set(cluster.links) == {"node"}
    assert "2 processes" in cluster.source
    assert 0 < cluster.call_seconds < 1
