"""Milliseconds and memory of one call on a GPU; on a CPU only that the call works."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

SHORT = 1.5
"""Milliseconds below which a call is also timed as a CUDA graph, without its launches."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median and the quantiles 0.2 and 0.8."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Cost:
    """Of one op: forward, forward and backward, that as a graph, and peak memory in MiB."""

    forward: Timing
    both: Timing
    graph: Timing | None
    peak: float | None
    note: str = ""


def cost(forward: Callable[[], object], both: Callable[[], object], device: torch.device) -> Cost:
    """Times both calls; memory is what a pass needs beyond its inputs."""
    both()
    if device.type != "cuda":
        return Cost(_on_cpu(forward), _on_cpu(both), None, None)
    peak = _peak(both)
    timings = _on_cuda(forward), _on_cuda(both)
    graph, note = _graph(both) if timings[1].median < SHORT else (None, "")
    return Cost(*timings, graph, peak, note)


def _on_cpu(run: Callable[[], object]) -> Timing:
    samples = []
    for _ in range(3):
        started = time.perf_counter()
        run()
        samples.append((time.perf_counter() - started) * 1e3)
    return Timing(median(samples), min(samples), max(samples))


def _on_cuda(run: Callable[[], object]) -> Timing:
    from triton.testing import do_bench

    return Timing(*do_bench(run, warmup=25, rep=100, quantiles=[0.5, 0.2, 0.8]))


def _graph(run: Callable[[], object]) -> tuple[Timing | None, str]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return _on_cuda(graph.replay), ""
    except RuntimeError as error:
        torch.cuda.synchronize()
        return None, f"no graph: {str(error).splitlines()[0][:120]}"


def _peak(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def ceilings(device: torch.device) -> str:
    """What this card reaches at most, as a sentence: the measure of the numbers that follow."""
    bytes_each = 2**31
    source, target = (torch.ones(bytes_each, dtype=torch.uint8, device=device) for _ in range(2))
    copied = _on_cuda(lambda: target.copy_(source)).median
    size = 8192
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    multiplied = _on_cuda(lambda: a @ b).median
    return (
        f"Copy on the card: {2 * bytes_each / copied / 1e9:.2f} TB/s read and written; bf16 matrix "
        f"product: {2 * size**3 / multiplied / 1e9:.0f} TFLOP/s."
    )
