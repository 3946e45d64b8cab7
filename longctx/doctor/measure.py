"""What this machine does a second, as the cost model of `longctx plan` counts it.

Whole layers are timed, forward and backward, and rates are those with which the cost model gives
the time that was measured. So a rate holds all that a layer does beside its products.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from longctx.doctor.layers import allow, layers_to_time
from longctx.mixers import MixerConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.block import Block
from longctx.model.decoder import Decoder, ModelConfig, build_block, draw, initialise
from longctx.model.memory import MemoryConfig
from longctx.plan.clusters import KERNELS, ClusterConfig, LinkConfig, RateConfig
from longctx.plan.costs import step_time
from longctx.plan.kernel_time import Compute
from longctx.plan.workload import Workload, workload
from longctx.sequence.local import LocalView
from longctx.train.hardware import keep_freed_memory, peak_flops
from longctx.train.optim import OptimConfig, build_optimizer
from longctx.train.settings import DTYPES, Settings, TrainConfig

MIB = 2**20
TOKENS = {"cpu": (256, 1024, 4096), "cuda": (1024, 4096, 16384, 65536)}
ITEM_SECONDS = {"cpu": 1.0, "cuda": 0.5}
"""How long one layer at one length is timed."""
LONGEST_CALL = 1.5
"""Seconds of one pass above which longer ones are left out."""
LEAST_CALLS, MOST_CALLS = 3, 20
LEAST_SHARE = 0.1
"""Of a layer's time that stays for its core, however long the rest is expected to take."""
COPIED = {"cpu": 64 * MIB, "cuda": 1024 * MIB}
PRODUCT = {"cpu": 512, "cuda": 4096}
MOST_WEIGHTS = {"cpu": 60e6, "cuda": 2e9}
"""Of a model of which a whole step is timed."""
VOCABULARY = 256
NO_MIXER = "-"
MEMORY = MemoryConfig(checkpointing="none")


@dataclass(frozen=True)
class Machine:
    """One process of this machine; all numbers are its own."""

    peak_flops: dict[str, float]
    memory_bandwidth: float
    fixed_seconds: float
    rates: dict[str, dict[str, float]]
    """FLOP/s by class of kernels and by tokens."""
    host: dict[str, float]
    """Latency and bandwidth of its link to the host; empty on a CPU."""


@dataclass
class Bench:
    """What is timed, and on what."""

    device: torch.device
    precision: str
    model: ModelConfig
    """A layer of each class of kernels, behind one without a mixer."""
    letters: dict[str, str]
    """By class of kernels."""

    def kind(self, kernels: str) -> str:
        """The mixer that stands for a class of kernels."""
        return self.model.mixers[self.letters[kernels]].kind

    def measure(self) -> Machine:
        """Takes about a minute on a CPU."""
        if self.device.type == "cpu":
            keep_freed_memory()
        peaks = {name: peak_flops(self.device, dtype)[0] for name, dtype in DTYPES.items()}
        bandwidth = copy_rate(self.device)
        cluster = provisional(self.device.type, self.precision, peaks, bandwidth)
        rates = {"matmul": self._rates(cluster, "matmul", NO_MIXER)}
        cluster = with_rates(cluster, rates)
        for kernels, letter in self.letters.items():
            rates[kernels] = self._rates(cluster, kernels, letter)
        fixed = self._fixed(with_rates(cluster, rates))
        return Machine(peaks, bandwidth, fixed, rates, host_link(self.device))

    def _rates(self, cluster: ClusterConfig, kernels: str, letter: str) -> dict[str, float]:
        """By tokens, of lengths that the layer allows, as far as one pass is short enough."""
        found: dict[str, float] = {}
        model = self._alone(letter)
        block = build_block(model, model.letters.index(letter), MEMORY)
        draw(block, model, 0, "")
        block.to(self.device, self._weights)
        for tokens in TOKENS[self.device.type]:
            if not allow(model.layers, tokens):
                continue
            try:
                seconds = self._seconds(self._pass(block, tokens))
            except torch.OutOfMemoryError:
                if not found:
                    raise
                break
            compute = Compute(work_of(model, tokens, self.precision), cluster, 0)
            found[str(tokens)] = solved(compute, kernels, letter, seconds)
            if seconds > LONGEST_CALL:
                break
        return found

    def _alone(self, letter: str) -> ModelConfig:
        """Behind a layer without a mixer, only that one."""
        if letter == NO_MIXER:
            mixers: dict[str, MixerConfig] = {"S": SoftmaxConfig(num_heads=1)}
        else:
            mixers = {letter: self.model.mixers[letter]}
        pattern = NO_MIXER + "".join(mixers)
        return replace(self.model, pattern=pattern, depth=len(pattern), mixers=mixers)

    def _pass(self, block: Block, tokens: int) -> Callable[[], Any]:
        """A forward and a backward pass of a layer."""
        view = LocalView.whole(1, tokens, self.device).keyed(0, 0, (0,)).with_shelf()
        x_BTD = torch.randn(1, tokens, self.model.width, device=self.device, dtype=self._weights)
        x_BTD.requires_grad_()

        def run() -> None:
            for weight in [x_BTD, *block.parameters()]:
                weight.grad = None
            with self.autocast():
                out_BTD, losses, _ = block(x_BTD, view.with_shelf())
            torch.autograd.backward([out_BTD, *losses.values()], [out_BTD, *losses.values()])

        return run

    @property
    def _weights(self) -> torch.dtype:
        """As the trainer keeps them."""
        return torch.float64 if self.precision == "fp64" else torch.float32

    def autocast(self) -> Any:
        """Around forward passes, as the trainer has it."""
        if self.precision != "bf16":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    def _seconds(self, work: Callable[[], Any]) -> float:
        """Median of some calls after a first one."""
        found: list[float] = []
        self._timed(work)
        limit = time.perf_counter() + ITEM_SECONDS[self.device.type]
        while len(found) < LEAST_CALLS or (time.perf_counter() < limit and len(found) < MOST_CALLS):
            found.append(self._timed(work))
            if found[-1] > LONGEST_CALL:
                break
        return median(found)

    def _timed(self, work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        synchronize(self.device)
        return time.perf_counter() - start

    @property
    def shortest(self) -> int:
        """Tokens that all layers allow; 0 if none do."""
        return next((n for n in TOKENS[self.device.type] if allow(self.model.layers, n)), 0)

    def _fixed(self, cluster: ClusterConfig) -> float:
        """What a step of the whole model takes beyond what the cost model knows of it."""
        tokens = self.shortest
        model = Decoder(self.model, VOCABULARY, MEMORY)
        if not tokens or model.num_parameters() > MOST_WEIGHTS[self.device.type]:
            return 0.0
        initialise(model, 0)
        model.to(self.device, self._weights)
        known = step_time(work_of(self.model, tokens, self.precision), cluster).total
        return max(0.0, self._seconds(self._step(model, tokens)) - known)

    def _step(self, model: Decoder, tokens: int) -> Callable[[], Any]:
        """Forward, backward and update."""
        config = OptimConfig()
        optimizer = build_optimizer(model, config)
        ids_BT = torch.randint(VOCABULARY, (1, tokens), device=self.device)
        view = LocalView.whole(1, tokens, self.device).keyed(0, 0, (0,))

        def run() -> None:
            with self.autocast():
                losses = model(ids_BT, ids_BT, view)
            terms = [losses.cross_entropy / tokens, *losses.mixers.values()]
            torch.stack(terms).sum().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm).item()
            optimizer.step()
            optimizer.zero_grad()

        return run


def bench_of(device: torch.device, settings: Settings, own: bool) -> Bench:
    """Times layers of the config where it has one of a class of kernels, if `own`; else, and for
    other classes, layers of 8 heads x 64."""
    config = settings.train
    precision = config.resolve_precision(device)
    longest = TOKENS[device.type][-1]
    width, mixers = layers_to_time(settings.model if own else None, longest)
    model = replace(
        settings.model,
        width=width,
        depth=1 + len(mixers),
        pattern=NO_MIXER + "".join(letter for letter, _ in mixers.values()),
        mixers=dict(mixers.values()),
        without_mlp="",
        dropout=0.0,
        base_width=0,
        mlp_hidden=settings.model.mlp_hidden if own else 0,
    )
    return Bench(device, precision, model, {name: letter for name, (letter, _) in mixers.items()})


def work_of(model: ModelConfig, tokens: int, precision: str) -> Workload:
    """A step of one process on one sequence."""
    train = TrainConfig(seq_len=tokens, batch_size=1)
    settings = Settings(model=model, train=train, memory=MEMORY)
    return workload(settings, 1, VOCABULARY, precision)


def provisional(
    device: str, precision: str, peaks: dict[str, float], bandwidth: float
) -> ClusterConfig:
    """A cluster of which only this is known; everything else is 1 GFLOP/s."""
    links = {"host": LinkConfig(0.0, 1e9)} if device == "cuda" else {}
    return ClusterConfig(
        name="here",
        source="being measured",
        device=device,
        processes_per_node=1,
        memory_gib=1.0,
        host_memory_gib=1.0,
        memory_bandwidth=bandwidth,
        peak_flops=peaks,
        rates_precision=precision,
        links=links,
        rates={name: RateConfig((1,), (1e9,)) for name in KERNELS},
    )


def with_rates(cluster: ClusterConfig, rates: dict[str, dict[str, float]]) -> ClusterConfig:
    """The cluster with these rates in the place of its own."""
    found = {
        name: RateConfig(tuple(map(int, own)), tuple(own.values())) for name, own in rates.items()
    }
    return replace(cluster, rates=cluster.rates | found)


def solved(compute: Compute, kernels: str, letter: str, seconds: float) -> float:
    """The rate of a class of kernels with which one of its layers takes so many seconds."""
    layer = compute.layers[letter]
    own = layer.mlp.total if kernels == "matmul" else layer.core.total
    rest = layer.forward + layer.backward - own
    left = max(seconds - rest, LEAST_SHARE * seconds)
    tokens = compute.own_tokens
    return compute.cluster.rate(kernels, tokens, compute.work.precision) * own / left


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a copy in its memory reads and writes."""
    source = torch.ones(COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = []
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / median(seconds)


def host_link(device: torch.device) -> dict[str, float]:
    """Latency and bandwidth of copies from pinned memory to a GPU."""
    if device.type == "cpu":
        return {}
    times = []
    for size in (64, COPIED["cpu"]):
        source = torch.zeros(size, dtype=torch.uint8, pin_memory=True)
        target = torch.empty_like(source, device=device)
        seconds = []
        for _ in range(10):
            synchronize(device)
            start = time.perf_counter()
            target.copy_(source, non_blocking=True)
            synchronize(device)
            seconds.append(time.perf_counter() - start)
        times.append(median(seconds))
    bandwidth = COPIED["cpu"] / max(times[1] - times[0], 1e-9)
    return {"latency": times[0], "bandwidth": bandwidth}


def product_rate(device: torch.device) -> float:
    """FLOP/s of matrix products in fp32, for comparing processes."""
    size = PRODUCT[device.type]
    x = torch.ones(size, size, device=device)
    seconds = []
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(x, x)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / median(seconds[2:])


def synchronize(device: torch.device) -> None:
    """Waits for what was started on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
