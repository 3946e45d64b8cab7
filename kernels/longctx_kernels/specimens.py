"""Calls that make every launch there is: to compile them ahead of time, and to tune them."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from longctx_kernels import decay_triton as decay
from longctx_kernels import lifetime_attention as lifetime
from longctx_kernels import norm_gate_kernels as norms
from longctx_kernels import selected_blocks_triton as blocks
from longctx_kernels import selected_rows_kernels as selections
from longctx_kernels import short_convolution_kernels as convolutions
from longctx_kernels.launch import Launch, Options, recording
from longctx_kernels.norm_gate import ACTIVATIONS
from longctx_kernels.score import NORMALISERS, Score
from longctx_kernels.selected_blocks_lists import Selection, listed_once
from longctx_kernels.sight import Sight

SIZES = {torch.bfloat16: (64, 128, 256), torch.float32: (64,)}
"""Head sizes that are compiled, by dtype of the operands."""

TOKENS, H, J, SCALE = 16384, 16, 4, 0.125
WINDOW, BLOCK, EPS = 4096, 64, 1e-6


@dataclass(frozen=True)
class Call:
    """Forward and backward of one op; `prepare(head size, dtype, device, tokens)` gives a run."""

    name: str
    prepare: Callable[[int, torch.dtype, torch.device, int], Callable[[], None]]


@dataclass(frozen=True)
class Specimen:
    """A launch that some call makes."""

    call: str
    size: int
    dtype: torch.dtype
    launch: Launch


def calls() -> Iterator[Call]:
    """All of them."""
    for gate in decay.GATES:
        yield Call(f"decay {gate}", lambda *a, gate=gate: _decay(gate, *a))
    for width, is_full in ((4, True), (4, False), (8, True)):
        name = f"short convolution {width}{'' if is_full else ' bare'}"
        yield Call(name, lambda *a, w=width, f=is_full: _short_convolution(w, f, *a))
    for activation in (*ACTIVATIONS, None):
        name = f"norm gate {activation}"
        yield Call(name, lambda *a, activation=activation: _norm_gate(activation, 1, *a))
    yield Call("selected rows", _selected_rows)
    yield Call("norm gate of all heads", lambda *a: _norm_gate("silu", H, *a))
    for group in (1, 4, 16):
        yield Call(f"selected blocks of {group}", lambda *a, g=group: _selected_blocks(g, *a))
    for sight in ("causal", "window", "per-head expiry", "blocks"):
        yield Call(f"lifetime {sight}", lambda *a, sight=sight: _lifetime(sight, "softmax", *a))
    for normaliser in NORMALISERS[1:]:
        yield Call(f"lifetime {normaliser}", lambda *a, n=normaliser: _lifetime("causal", n, *a))
    for terms in ("biases", "slopes"):
        yield Call(f"lifetime {terms}", lambda *a, t=terms: _lifetime("window", "softmax", *a, t))


@cache
def specimens(architecture: str) -> tuple[Specimen, ...]:
    """Launches that differ in machine code, with the options of the architecture's tables."""
    from longctx_kernels.ahead import launch_key

    found: dict[str, Specimen] = {}
    for dtype, sizes in SIZES.items():
        for size in sizes:
            for call in calls():
                run = call.prepare(size, dtype, torch.device("meta"), TOKENS)
                with recording(architecture) as launches:
                    run()
                for launch in launches:
                    found.setdefault(launch_key(launch), Specimen(call.name, size, dtype, launch))
    return tuple(found.values())


@dataclass(frozen=True)
class Subject:
    """A call that stands for an entry of the tables."""

    call: Call
    size: int
    dtype: torch.dtype

    def on(self, device: str) -> Callable[[], None]:
        """A run on that device."""
        return self.call.prepare(self.size, self.dtype, torch.device(device), TOKENS)


def subject_of(
    architecture: str, kernels: dict[str, dict[str, Options]], kernel: str, size: str
) -> Subject:
    """The first call with heads of that size that reads the entry."""
    read = []

    class Watched(dict):
        def __getitem__(self, key):
            read.append(key)
            return super().__getitem__(key)

    kept = kernels[kernel]
    try:
        kernels[kernel] = Watched(kept)
        for call, dtype in itertools.product(calls(), SIZES):
            subject = Subject(call, int(size), dtype)
            with recording(architecture):
                subject.on("meta")()
            if size in read:
                return subject
    finally:
        kernels[kernel] = kept
    raise LookupError(f"no call reads {kernel} {size} for {architecture}")


def _decay(
    gate: str, D: int, dtype: torch.dtype, device: torch.device, T: int
) -> Callable[[], None]:
    cuts = (0, T)
    q, k, v, dout = (_random(T, H, D, dtype=dtype, device=device) for _ in range(4))
    shape = {"constant": (H,), "scalar": (T, H), "diagonal": (T, H, D)}[gate]
    g = -torch.rand(shape, device=device) / 8
    edge = _random(1, H, D, D, dtype=torch.float32, device=device)
    # With an edge, only the scan is another kernel: on a GPU, where runs are timed, it is left out.
    edges = (None, edge) if device.type == "meta" else (None,)

    def run() -> None:
        for state in edges:
            starts, _ = decay.state_pass(k, v, g, cuts, state)
            _, saved = decay.output_pass(q, k, v, g, SCALE, cuts, starts)
            ends, _ = decay.dstate_pass(q, dout, g, SCALE, cuts, state)
            decay.gradient_pass(q, k, v, g, SCALE, cuts, dout, saved, ends)

    return run


def _lifetime(
    sight: str,
    normaliser: str,
    D: int,
    dtype: torch.dtype,
    device: torch.device,
    T: int,
    terms: str = "",
) -> Callable[[], None]:
    q, dout = (_random(T, H, D, dtype=dtype, device=device) for _ in range(2))
    k, v = (_random(T, J, D, dtype=dtype, device=device) for _ in range(2))
    shapes = {"biases": ((T, H), (T, H)), "slopes": (None, None, (H,)), "": ()}[terms]
    added = (s and _random(*s, dtype=torch.float32, device=device) for s in shapes)
    score = Score(SCALE, normaliser, *added)

    def run() -> None:
        seen = _sight(sight, T, device)
        results = lifetime.lifetime_forward(q, k, v, seen, score, backend="triton")
        dlse = results[1] if terms == "biases" else None
        lifetime.lifetime_backward(dout, dlse, (q, k, v), results, seen, score, backend="triton")

    return run


def _short_convolution(
    width: int, is_full: bool, D: int, dtype: torch.dtype, device: torch.device, T: int
) -> Callable[[], None]:
    x, dout = (_random(1, T, H * D, dtype=dtype, device=device) for _ in range(2))
    weight = _random(H * D, width, dtype=torch.float32, device=device)
    bias = before = age = None
    if is_full:
        bias, before = weight[:, 0].clone(), x[:, : width - 1].clone()
        age = torch.arange(T, dtype=torch.int32, device=device)[None]

    def run() -> None:
        operands = (x, weight, bias, before, age, is_full)
        convolutions.convolve(*operands)
        convolutions.convolve_backward(dout, *operands)

    return run


def _norm_gate(
    activation: str | None, heads: int, D: int, dtype: torch.dtype, device: torch.device, T: int
) -> Callable[[], None]:
    V = heads * D
    x, gate, dout = (_random(T, H // heads, V, dtype=dtype, device=device) for _ in range(3))
    weight = _random(V, dtype=torch.float32, device=device)
    operands = (x, None, None) if activation is None else (x, gate, weight)

    def run() -> None:
        norms.forward(*operands, EPS, activation or "none")
        norms.backward(dout, *operands, EPS, activation or "none")

    return run


def _selected_rows(D: int, dtype: torch.dtype, device: torch.device, T: int) -> Callable[[], None]:
    width, count = H * D, T // H
    rows, x = (
        _random(1, *shape, width, dtype=dtype, device=device) for shape in ((H, count), (T,))
    )
    index = torch.stack([torch.arange(count, device=device) * H + h for h in range(H)])[None]
    weight = torch.rand(1, H, count, device=device)

    def run() -> None:
        selections.gather(x, index)
        for factor in (weight, None):
            selections.scatter(rows, index, factor, T)
            selections.scatter_backward(x, rows, index, factor)

    return run


def _selected_blocks(
    group: int, D: int, dtype: torch.dtype, device: torch.device, T: int
) -> Callable[[], None]:
    q, dout = (_random(T, H, D, dtype=dtype, device=device) for _ in range(2))
    k, v = (_random(T, H // group, D, dtype=dtype, device=device) for _ in range(2))
    positions = torch.arange(T, dtype=torch.int32, device=device)
    back = torch.arange(16, dtype=torch.int32, device=device)
    listed = (positions[:, None, None] // BLOCK - back).expand(T, H // group, -1)
    selection = Selection(listed_once(listed, T // BLOCK), positions, positions, BLOCK)

    def run() -> None:
        results = blocks.forward((q, k, v), selection, SCALE)
        blocks.backward((dout, results[1]), (q, k, v), results, selection, SCALE)

    return run


def _sight(kind: str, T: int, device: torch.device) -> Sight:
    positions = torch.arange(T, dtype=torch.int32, device=device)
    if kind == "causal":
        return Sight(positions, positions)
    if kind == "window":
        return Sight(positions, positions, positions + WINDOW)
    if kind == "per-head expiry":
        lives = torch.arange(1, J + 1, dtype=torch.int32, device=device)[:, None] * (WINDOW // J)
        return Sight(positions, positions, positions + lives)
    own = torch.arange(T // BLOCK, dtype=torch.int32, device=device)
    back = torch.arange(16, dtype=torch.int32, device=device)
    return Sight(positions, positions, None, (own[:, None] - back)[None], BLOCK)


def _random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)
