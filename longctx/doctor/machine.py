"""Devices, cores, memory and limits of this host."""

import os
import resource
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from longctx.doctor.findings import Finding
from longctx.host import free_memory
from longctx.parallel.surroundings import network_interfaces

GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")
SHARED_MEMORY = Path("/dev/shm")
INFINIBAND = Path("/sys/class/infiniband")
LEAST_SHARED_MEMORY = 0.5
"""GiB below which NCCL, which takes some for each pair of processes, may fail to start."""
LEAST_FILES = 4096
QUERY_SECONDS = 10


def devices(processes: int) -> list[Finding]:
    """GPUs that torch finds, or why it finds none; each process of this host needs its own."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        found = [_device(index) for index in range(count)] + _errors_and_parts()
        if processes > count:
            meaning = "start one process a GPU"
            found.append(Finding("problem", f"{processes} processes on {count} GPUs", meaning))
        return found
    names = _query("name")
    if not names:
        return [Finding("note", "no GPU", "trains on the CPU, in fp32; no Triton kernels")]
    found = f"{len(names)} x {names[0]}, which torch does not use"
    if torch.version.cuda is None:
        meaning = "this torch has no CUDA: install a build that has"
    else:
        meaning = f"torch needs a driver for CUDA {torch.version.cuda}, or devices are hidden"
    return [Finding("problem", found, meaning)]


def _device(index: int) -> Finding:
    own = torch.cuda.get_device_properties(index)
    found = f"GPU {index}: {own.name}, {own.total_memory / GIB:.0f} GiB, {own.major}.{own.minor}"
    built = torch.cuda.get_arch_list()
    if built and not any(_runs_on(arch, own.major, own.minor) for arch in built):
        return Finding("problem", found, f"torch was built for others: {', '.join(built)}")
    if (own.major, own.minor) < (8, 0):
        return Finding("warning", found, "no bf16: set train.precision = 'fp32'")
    return Finding("ok", found, "trains in bf16 with Triton kernels")


def _runs_on(arch: str, major: int, minor: int) -> bool:
    """Whether code for sm_80 (devices of its generation that are no older), sm_90a (only that one)
    or compute_80 (compiled for any that is no older) is of use to a device."""
    kind, _, number = arch.partition("_")
    own = divmod(int(number.rstrip("af")), 10)
    if kind == "compute":
        return own <= (major, minor)
    return own == (major, minor) if number.endswith("a") else own[0] == major and own[1] <= minor


def _errors_and_parts() -> list[Finding]:
    """Memory errors that ECC could not correct, and devices cut into parts."""
    found = []
    for index, line in enumerate(_query("ecc.errors.uncorrected.volatile.total,mig.mode.current")):
        errors, _, mig = (word.strip() for word in line.partition(","))
        if errors.isdigit() and int(errors):
            found.append(Finding("problem", f"GPU {index}: {errors} memory errors", "replace it"))
        if mig == "Enabled":
            meaning = "a process gets a part; NCCL does not join parts of one device"
            found.append(Finding("warning", f"GPU {index}: MIG is on", meaning))
    return found


def _query(fields: str) -> list[str]:
    """A line for each GPU that the driver has, none without nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def compiler() -> list[Finding]:
    """Triton and torch.compile build small programs with it."""
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [Finding("ok", f"C compiler {name}", "Triton and DeepSpeed can build")]
    level = "problem" if torch.cuda.is_available() else "note"
    return [Finding(level, "no C compiler", "Triton, torch.compile and DeepSpeed cannot build")]


def cores_and_memory() -> list[Finding]:
    """What the host lets this process use."""
    cores, quota = len(os.sched_getaffinity(0)), _cores_of_group()
    told = f"{cores} cores, {torch.get_num_threads()} threads a process"
    found = [Finding("ok", told, "shared by the processes of this host")]
    if quota and quota < cores:
        meaning = f"set OMP_NUM_THREADS to {max(1, int(quota))} / processes, or threads wait"
        found.append(Finding("warning", f"a control group allows {quota:g} cores", meaning))
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    free = free_memory() / GIB
    limit = _first_line(CGROUP / "memory.max")
    bound = f", {int(limit) / GIB:.1f} by its control group" if limit.isdigit() else ""
    level = "warning" if free < 2 else "ok"
    meaning = "bounds a run on the CPU, and what [memory] moves to the host"
    found.append(Finding(level, f"{total:.1f} GiB of memory{bound}, {free:.1f} free", meaning))
    return found


def _cores_of_group() -> float:
    """0 if there is no limit."""
    words = _first_line(CGROUP / "cpu.max").split()
    is_limited = len(words) == 2 and words[0].isdigit()
    return int(words[0]) / int(words[1]) if is_limited else 0.0


def _first_line(path: Path) -> str:
    try:
        return path.read_text().splitlines()[0].strip()
    except (OSError, IndexError):
        return ""


def limits() -> list[Finding]:
    """Shared memory, open files, and memory that may be locked."""
    found = []
    if SHARED_MEMORY.is_dir():
        size = shutil.disk_usage(SHARED_MEMORY).total / GIB
        small = size < LEAST_SHARED_MEMORY
        level = "note" if not small else "warning" if torch.cuda.is_available() else "note"
        meaning = "NCCL and workers may fail; raise it (docker --shm-size)" if small else "enough"
        level = level if small else "ok"
        found.append(Finding(level, f"{SHARED_MEMORY} has {size:.2f} GiB", meaning))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= soft < LEAST_FILES
    meaning = f"large crews need more: ulimit -n {hard}" if few else "enough"
    found.append(Finding("note" if few else "ok", f"{_number(soft)} open files", meaning))
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if INFINIBAND.is_dir() and any(INFINIBAND.iterdir()):
        level, meaning = "ok", "InfiniBand can be used"
        if locked != resource.RLIM_INFINITY:
            level, meaning = "warning", "InfiniBand may need more: ulimit -l unlimited"
        found.append(Finding(level, f"{_number(locked)} bytes may be locked", meaning))
    return found


def _number(limit: int) -> str:
    return "any number of" if limit == resource.RLIM_INFINITY else str(limit)


def _matches(told: str, names: Sequence[str]) -> bool:
    """Whether NCCL finds an interface: beginnings of names, whole ones after =, others after ^."""
    is_not, is_whole = told.startswith("^"), told.lstrip("^").startswith("=")
    words = [word for word in told.lstrip("^=").split(",") if word]

    def is_told(name: str) -> bool:
        return any(name == word if is_whole else name.startswith(word) for word in words)

    return any(is_told(name) != is_not for name in names)


def network() -> list[Finding]:
    """Interfaces, whether the host's own name leads to it, and a free port."""
    names = [name for _, name in socket.if_nameindex()]
    level, meaning = "ok", "through which processes of several hosts can meet"
    gloo, nccl = network_interfaces()
    if absent := [name for name in gloo.split(",") if name and name not in names]:
        level, meaning = "problem", f"GLOO_SOCKET_IFNAME names {absent[0]!r}, which is not here"
    elif nccl and not _matches(nccl, names):
        level, meaning = "problem", f"NCCL_SOCKET_IFNAME = {nccl!r} leaves none of them"
    elif set(names) <= {"lo"}:
        level, meaning = "note", "processes of this host only"
    found = [Finding(level, f"interfaces {', '.join(names)}", meaning)]
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
        local = " (set GLOO_SOCKET_IFNAME for several hosts)" if address.startswith("127.") else ""
        found.append(Finding("ok", f"{host} is {address}", f"gloo finds itself{local}"))
    except OSError:
        meaning = "processes of this host only, unless GLOO_SOCKET_IFNAME names an interface"
        found.append(Finding("ok" if gloo else "warning", f"{host} has no address", meaning))
    with socket.socket() as listening:
        listening.bind(("", 0))
        port = listening.getsockname()[1]
    found.append(Finding("ok", f"ports such as {port} are free", "processes can meet there"))
    return found
