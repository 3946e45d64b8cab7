"""Clusters as TOML files: devices, links and measured rates, for what predicts times."""

import math
from dataclasses import dataclass, field
from typing import Literal

from longctx.config import decode, find_config, load_table
from longctx.config.names import suggest
from longctx.errors import InputError
from longctx.sequence.expected import WIDTHS

GIB = 2**30
LINKS = ("node", "fabric", "host")
"""Inside a node, between nodes, and between a device and its host."""
KERNELS = ("matmul", "softmax", "linear", "delta", "sparse")
"""Classes of kernels: products with weights; softmax cores; cores with a state, without and with
delta rule; cores in which a query sees chosen keys."""


@dataclass(frozen=True)
class LinkConfig:
    """A `[links.X]` table: how bytes get from one process to another, or to its host."""

    latency: float
    """Seconds that a message takes however small it is."""
    bandwidth: float
    """Bytes a second of each process, one way, in large messages."""

    def seconds(self, size: float) -> float:
        """For one message of so many bytes."""
        return self.latency + size / self.bandwidth


@dataclass(frozen=True)
class RateConfig:
    """A `[rates.X]` table: how fast a class of kernels is, forward, on one device."""

    tokens: tuple[int, ...]
    """Tokens at which it was measured, rising."""
    flops: tuple[float, ...]
    """FLOP/s of the definition at each of them; what a kernel does beyond that does not count."""

    def at(self, tokens: float) -> float:
        """FLOP/s at so many tokens: of the nearest measured, or between two by logarithms."""
        if tokens <= self.tokens[0]:
            return self.flops[0]
        for left, right, below, above in zip(
            self.tokens, self.tokens[1:], self.flops, self.flops[1:]
        ):
            if tokens <= right:
                share = math.log(tokens / left) / math.log(right / left)
                return below * (above / below) ** share
        return self.flops[-1]


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """A cluster of equal nodes; one process a device."""

    name: str
    """What tables and pictures call it."""
    source: str
    """Where its numbers come from, and which of them are assumed."""
    device: Literal["cuda", "cpu"]
    """What processes compute on."""
    processes_per_node: int
    """Devices of a node."""
    most_nodes: int = 1
    """Nodes that there are."""
    memory_gib: float
    """Of a device."""
    host_memory_gib: float
    """Of a node."""
    memory_bandwidth: float
    """Bytes a second between a device and its memory."""
    peak_flops: dict[str, float]
    """FLOP/s of a device by precision (bf16, fp32, fp64): what MFU is a share of."""
    rates_precision: str = "bf16"
    """Precision in which rates were measured; others are as much slower as their peak is lower."""
    price_per_device_hour: float = 0.0
    """In any currency; 0 is unknown."""
    fixed_seconds: float = 0.0
    """What a step takes however small it is: launching kernels, data, bookkeeping."""
    call_seconds: float = 0.0
    """What a process itself takes for each exchange, however short its message."""
    links: dict[str, LinkConfig] = field(default_factory=dict)
    """By name: node, fabric and host."""
    rates: dict[str, RateConfig]
    """By class of kernels: matmul, softmax, linear, delta and sparse."""

    def __post_init__(self) -> None:
        for name in ("name", "source"):
            if not getattr(self, name):
                raise InputError(f"{name} is empty: say it in a word or a sentence")
        for name in ("processes_per_node", "most_nodes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("memory_gib", "host_memory_gib", "memory_bandwidth"):
            _positive(name, getattr(self, name))
        for name in ("price_per_device_hour", "fixed_seconds", "call_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} = {getattr(self, name)}: must be 0 or positive")
        self._check_precisions()
        self._check_links()
        self._check_rates()

    def _check_precisions(self) -> None:
        if not self.peak_flops:
            raise InputError("peak_flops is empty: give FLOP/s of at least one precision")
        for precision, peak in self.peak_flops.items():
            _known("peak_flops", precision, tuple(WIDTHS))
            _positive(f"peak_flops.{precision}", peak)
        if self.rates_precision not in self.peak_flops:
            raise InputError(
                f"rates_precision = {self.rates_precision!r}: has no peak_flops; "
                f"there are: {', '.join(self.peak_flops)}"
            )

    def _check_links(self) -> None:
        needed = {
            "node": self.processes_per_node > 1,
            "fabric": self.most_nodes > 1,
            "host": self.device == "cuda",
        }
        for name in self.links:
            _known("links", name, LINKS)
        for name in LINKS:
            if needed[name] and name not in self.links:
                raise InputError(
                    f"links.{name} is missing: give its latency (seconds a message) and "
                    "bandwidth (bytes a second of a process, one way)"
                )
        for name, link in self.links.items():
            if not 0 <= link.latency < math.inf:
                raise InputError(f"links.{name}.latency = {link.latency}: must be 0 or positive")
            if not link.bandwidth > 0:
                raise InputError(f"links.{name}.bandwidth = {link.bandwidth}: must be positive")

    def _check_rates(self) -> None:
        for name in self.rates:
            _known("rates", name, KERNELS)
        for name in KERNELS:
            if name not in self.rates:
                raise InputError(
                    f"rates.{name} is missing: give tokens, and flops measured at each of them"
                )
        for name, rate in self.rates.items():
            if not rate.tokens or len(rate.tokens) != len(rate.flops):
                raise InputError(
                    f"rates.{name} has {len(rate.tokens)} tokens and {len(rate.flops)} flops: "
                    "give as many of both, and at least one"
                )
            if rate.tokens[0] < 1 or any(a >= b for a, b in zip(rate.tokens, rate.tokens[1:])):
                raise InputError(
                    f"rates.{name}.tokens = {list(rate.tokens)}: must rise and be positive"
                )
            for flops in rate.flops:
                _positive(f"rates.{name}.flops", flops)

    @property
    def most_processes(self) -> int:
        """Of all nodes."""
        return self.processes_per_node * self.most_nodes

    def peak(self, precision: str) -> float:
        """FLOP/s of a device at most; InputError if the file does not say."""
        if precision not in self.peak_flops:
            raise InputError(
                f"cluster {self.name!r}: peak_flops.{precision} is missing: give it, or choose "
                f"train.precision from {', '.join(self.peak_flops)}"
            )
        return self.peak_flops[precision]

    def rate(self, kernels: str, tokens: float, precision: str) -> float:
        """FLOP/s of a class of kernels on a device."""
        slower = self.peak(precision) / self.peak_flops[self.rates_precision]
        return self.rates[kernels].at(tokens) * slower


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise InputError(f"{name} = {value}: must be positive")


def _known(table: str, name: str, names: tuple[str, ...]) -> None:
    if name not in names:
        nearest = suggest(name, names)
        raise InputError(f"{table}.{name} is not a known name{nearest} (known: {', '.join(names)})")


def load_cluster(name: str) -> ClusterConfig:
    """Reads a cluster's file, or the packaged one of that name."""
    path = find_config(name, "cluster")
    return decode(ClusterConfig, load_table(path), file=str(path))
