"""What the device can do at best, and how the process uses memory."""

import contextlib
import ctypes
import resource
import sys
import time
from pathlib import Path

import torch

# Dense peak FLOP/s by a part of the device's name: (half precision, fp32 without TF32), from the
# vendors' data sheets. The first name that fits counts, so longer names come before their parts;
# None marks slower variants of a card, which are measured.
PEAKS = (
    ("A100", 312e12, 19.5e12),
    ("H100 PCIe", 756e12, 51e12),
    ("H100 NVL", 835e12, 60e12),
    ("H100", 989e12, 67e12),
    ("GH200", 989e12, 67e12),
    ("H200 NVL", 835e12, 60e12),
    ("H200", 989e12, 67e12),
    ("GB200", 2500e12, 80e12),
    ("B200", 2250e12, 75e12),
    ("MI300X", 1307e12, 163.4e12),
    ("L40S", 362e12, 91.6e12),
    ("RTX 4090 ", None, None),
    ("RTX 4090", 165e12, 82.6e12),
)
MEASURE_SECONDS = 0.1
STATUS_FILE, CLEAR_FILE = Path("/proc/self/status"), Path("/proc/self/clear_refs")
CLEAR_PEAK = "5"  # of proc(5)
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s that count as 100 % of `device` in `dtype`, and where the number comes from."""
    device = torch.device(device)
    precision = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        listed = _listed_peak(name, dtype)
        if listed is not None:
            return listed, f"data sheet of {name}, dense {precision}"
    size = 4096 if device.type == "cuda" else 1024
    rate = _matmul_rate(device, dtype, size)
    return rate, f"measured {size} x {size} {precision} matrix product on {device.type}"


def forget_peak_memory(device: torch.device) -> None:
    """Starts a new peak; where Linux does not let a process do that, the old one stands."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        CLEAR_FILE.write_text(CLEAR_PEAK)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use since the peak was forgotten: allocated on a GPU, or resident in this
    process on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in STATUS_FILE.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def keep_freed_memory() -> bool:
    """Makes glibc reuse the memory of large tensors; False where there is no glibc.

    It would hand blocks above 32 MB back to the system and fault in every page anew, which adds
    to the cost per token of long sequences only.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return False
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1))


def _listed_peak(device_name: str, dtype: torch.dtype) -> float | None:
    """The peak from the table, None where it has none for the device, the type or TF32 products."""
    if "MIG" in device_name:  # a part of a device
        return None
    for name, half, single in PEAKS:
        if name in device_name:
            if dtype in (torch.bfloat16, torch.float16):
                return half
            if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
                return single
            return None
    return None


def _matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of the fastest of a few square matrix products; leaves torch's random state alone."""
    generator = torch.Generator(device).manual_seed(0)
    matrix = torch.rand(size, size, device=device, generator=generator).to(dtype)
    _seconds_to_square(matrix)
    deadline = time.perf_counter() + MEASURE_SECONDS
    best = _seconds_to_square(matrix)
    while time.perf_counter() < deadline:
        best = min(best, _seconds_to_square(matrix))
    return 2 * size**3 / best


def _seconds_to_square(matrix: torch.Tensor) -> float:
    start = time.perf_counter()
    torch.mm(matrix, matrix)
    if matrix.is_cuda:
        torch.cuda.synchronize(matrix.device)
    return time.perf_counter() - start
