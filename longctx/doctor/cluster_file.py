"""Writes what was measured as a cluster's file, for `longctx plan --cluster FILE`."""

import platform
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

from longctx.config import to_toml
from longctx.doctor.crew import Crew
from longctx.doctor.findings import Finding
from longctx.doctor.measure import Bench, Machine
from longctx.files import write_whole
from longctx.host import total_memory
from longctx.plan.clusters import ClusterConfig, LinkConfig, RateConfig

GIB = 2**30
MEASURED = "measured"
DIGITS = 4


def merged(machines: Sequence[Machine]) -> Machine:
    """Medians over processes that were measured at the same time."""
    return Machine(**_medians([asdict(machine) for machine in machines]))


def _medians(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of what all of them have; the longest lengths may be missing in some."""
    common = [key for key in tables[0] if all(key in table for table in tables)]
    found: dict[str, Any] = {}
    for key in common:
        values = [table[key] for table in tables]
        found[key] = _medians(values) if isinstance(values[0], Mapping) else median(values)
    return found


def write_cluster(cluster: ClusterConfig, output: str) -> Finding:
    """Writes the file, and says what `longctx plan` does with it."""
    path = Path(output)
    try:
        write_whole(path, to_toml(cluster).encode())
    except OSError as error:
        return Finding("problem", f"{path}", f"cannot be written ({error.strerror})", MEASURED)
    alone = "; without links: start this under a launcher to measure them"
    links = "" if cluster.most_processes > 1 else alone
    meaning = f"longctx plan CONFIG --cluster {path}{links}"
    return Finding("ok", f"{path} describes this machine", meaning, MEASURED)


def cluster_of(machine: Machine, crew: Crew | None, bench: Bench) -> ClusterConfig:
    """The processes that were measured, as a cluster."""
    hosts = crew.hosts if crew else [socket.gethostname()]
    nodes, device = len(set(hosts)), bench.device
    per_node = max(map(hosts.count, hosts))
    host_gib = total_memory() / GIB
    memory = host_gib / per_node
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / GIB
    tiers = crew.tiers if crew else {}
    links = {name: LinkConfig(*map(as_written, link)) for name, link in tiers.items()}
    if machine.host:
        links["host"] = LinkConfig(**{name: as_written(x) for name, x in machine.host.items()})
    return ClusterConfig(
        name=f"{hosts[0]}-measured",
        source=_source(len(hosts), bench),
        device="cuda" if device.type == "cuda" else "cpu",
        processes_per_node=per_node,
        most_nodes=nodes,
        memory_gib=as_written(memory),
        host_memory_gib=as_written(host_gib),
        memory_bandwidth=as_written(machine.memory_bandwidth),
        peak_flops={name: as_written(peak) for name, peak in machine.peak_flops.items()},
        rates_precision=bench.precision,
        fixed_seconds=as_written(machine.fixed_seconds),
        links=links,
        rates={
            name: RateConfig(tuple(map(int, own)), tuple(map(as_written, own.values())))
            for name, own in machine.rates.items()
        },
    )


def as_written(number: float) -> float:
    """With as many digits as mean something."""
    return float(f"{number:.{DIGITS}g}")


def _source(processes: int, bench: Bench) -> str:
    device = platform.processor() or platform.machine()
    if bench.device.type == "cuda":
        device = torch.cuda.get_device_name(bench.device)
    crew = "1 process" if processes == 1 else f"{processes} processes"
    mixers = ", ".join(f"{name} {bench.kind(name)}" for name in bench.letters)
    return (
        f"longctx doctor --measure, {datetime.now(UTC):%Y-%m-%d}: {crew} of "
        f"{torch.get_num_threads()} threads each on {device}, torch {torch.__version__}, "
        f"{bench.precision}; layers of width {bench.model.width}, forward and backward ({mixers})"
    )
