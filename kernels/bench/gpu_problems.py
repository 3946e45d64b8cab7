"""Problems that every op of the GPU bench is checked by: shapes, inputs, and a call."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from longctx_kernels.blocklist import flash_blocklist
from longctx_kernels.decay_attention import decay_attention, decay_attention_reference
from longctx_kernels.delta_attention import delta_attention, delta_attention_reference
from longctx_kernels.lifetime_attention import NORMALISERS, flash_lifetime
from longctx_kernels.norm_gate import ACTIVATIONS, norm_gate, norm_gate_reference
from longctx_kernels.selected_blocks import selected_block_attention
from longctx_kernels.selected_rows import gather_rows, scatter_rows
from longctx_kernels.short_convolution import short_convolution, short_convolution_reference
from torch import Tensor

DEFINITION = "definition"
LONGEST_DEFINITION = 128
NEVER = 2**31 - 1
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """An op, inputs that have gradients, and a call from (inputs, backend) to outputs."""

    op: str
    name: str
    inputs: Tensors
    call: Callable[[Tensors, str], Tensors]
    reference: str = "torch"


def problems(device: torch.device, tiny: bool) -> list[Callable[[torch.dtype], Problem]]:
    """Makers of problems, for a dtype."""
    made: list[Callable[[torch.dtype], Problem]] = []
    cuts = (0, 1, 17, 40, 70) if tiny else (0, 1, 64, 128, 500, 517, 1000)
    T = cuts[-1]
    shapes = ((2, 33, 2, 16, 16, None), (1, T, 2, 12, 20, cuts))
    if not tiny:
        shapes = (
            (2, T, 4, 128, 128, None),
            (1, 63, 2, 64, 64, None),
            (1, T, 3, 100, 60, cuts),
            (1, 515, 2, 256, 256, None),
        )
    for gate in ("constant", "scalar", "diagonal"):
        made += [partial(_decay, gate, shape, device) for shape in shapes]
    made += [partial(_delta, gate, shapes[-1], device) for gate in ("none", "scalar", "diagonal")]
    widths = (3,) if tiny else (2, 4, 8)
    for shape in ((2, cuts[-2], 20), (1, T, 64 if tiny else 2048)):
        made += [partial(_short_convolution, shape, W, cuts, device) for W in widths]
    rows = ((2, 9, 3, 20),) if tiny else ((2, T, 4, 128), (1, 515, 3, 100), (1, 63, 1, 4096))
    made += [partial(_norm_gate, shape, name, device) for shape in rows for name in ACTIVATIONS]
    selections = ((2, 33, 3, 5, 20),) if tiny else ((1, T, 4, 300, 2048), (2, 129, 3, 50, 100))
    made += [partial(_selected_rows, shape, device) for shape in selections]
    small, sights = (16 if tiny else 64), ("causal", "window", "packed", "per-head expiry")
    sizes = (small,) if tiny else (64, 128, 256)
    wide = {(sight, "softmax"): (128, 256) for sight in (*sights, "ranges")}
    shown = ("softmax", "sigmoid") if tiny else NORMALISERS
    made += [
        partial(_lifetime, sight, normaliser, (T, D), device)
        for sight in (*sights, "sinks", "ranges", "biases", "slopes")
        for normaliser in shown
        for D in sizes
        if D in (small, *wide.get((sight, normaliser), ()))
    ]
    made += [partial(_blocklist, normaliser, (T, small), device) for normaliser in shown]
    groups = (1, 3) if tiny else (1, 3, 16)
    made += [partial(_selected_blocks, group, (T, small), device) for group in groups]
    return made if tiny else [*made, partial(_blocklist, "softmax", (T, 128), device)]


def _decay(gate: str, shape, device, dtype) -> Problem:
    B, T, H, K, V, cuts = shape
    random = partial(_random, dtype=dtype, device=device)
    inputs = {"q": random(B, T, H, K), "k": random(B, T, H, K), "v": random(B, T, H, V)}
    N = B if cuts is None else len(cuts) - 1
    inputs["initial"] = _random(N, H, K, V, dtype=torch.float32, device=device)
    gamma_H = -(2.0 ** (-8.0 * torch.arange(1, H + 1, device=device) / H))
    if gate != "constant":
        gate_shape = (B, T, H) if gate == "scalar" else (B, T, H, K)
        inputs["g"] = -torch.rand(gate_shape, device=device) * torch.rand(gate_shape, device=device)
    cu_seqlens = None if cuts is None else torch.tensor(cuts)
    name = {"constant": "g_gamma", "scalar": "g", "diagonal": "gk"}[gate]

    def call(x: Tensors, backend: str) -> Tensors:
        op = partial(decay_attention, backend=backend)
        if backend == DEFINITION:
            op = decay_attention_reference
        out, final = op(
            *(x["q"], x["k"], x["v"]),
            **{name: x.get("g", gamma_H)},
            initial_state=x["initial"],
            output_final_state=True,
            cu_seqlens=cu_seqlens,
        )
        return {"out": out, "final": final}

    about = f"B{B} T{T} H{H} K{K} V{V}" + (", packed" if cuts else "")
    reference = DEFINITION if T <= LONGEST_DEFINITION else "torch"
    return Problem(f"decay {gate}", about, inputs, call, reference)


def _delta(gate: str, shape, device, dtype) -> Problem:
    B, T, H, K, V, cuts = shape
    random = partial(_random, dtype=dtype, device=device)
    inputs = {"q": random(B, T, H, K), "v": random(B, T, H, V), "beta": random(B, T, H).sigmoid()}
    inputs["k"] = torch.nn.functional.normalize(random(B, T, H, K), dim=-1)
    if gate != "none":
        gate_shape = (B, T, H) if gate == "scalar" else (B, T, H, K)
        inputs["g"] = -torch.rand(gate_shape, device=device) * torch.rand(gate_shape, device=device)
    cu_seqlens = None if cuts is None else torch.tensor(cuts)
    name = {"none": "g", "scalar": "g", "diagonal": "gk"}[gate]

    def call(x: Tensors, backend: str) -> Tensors:
        is_definition = backend == DEFINITION
        op = delta_attention_reference if is_definition else delta_attention
        operands = (x["q"], x["k"], x["v"], x["beta"])
        out, final = op(
            *operands, **{name: x.get("g")}, output_final_state=True, cu_seqlens=cu_seqlens
        )
        return {"out": out, "final": final}

    about = f"B{B} T{T} H{H} K{K} V{V}" + (", packed" if cuts else "")
    # There is one way to compute it besides fla's: in torch, which is checked in fp64.
    reference = DEFINITION if T <= LONGEST_DEFINITION else "torch"
    return Problem(f"delta {gate}", about, inputs, call, reference)


def _short_convolution(shape, W: int, cuts, device, dtype) -> Problem:
    (B, T, C), places = shape, torch.arange(shape[1], dtype=torch.int32)
    age_BT = places.repeat(B, 1) + 1
    for start in cuts[1:-1]:
        # The first document began a token before the first one here.
        age_BT[:, start:] = places[: max(T - start, 0)]
    age_BT = age_BT.to(device)
    inputs = {
        "x": _random(B, T, C, dtype=dtype, device=device),
        "before": _random(B, W - 1, C, dtype=dtype, device=device),
        "weight": _random(C, W, dtype=torch.float32, device=device),
        "bias": _random(C, dtype=torch.float32, device=device),
    }

    def call(x: Tensors, backend: str) -> Tensors:
        op = partial(short_convolution, backend=backend)
        if backend == DEFINITION:
            op = short_convolution_reference
        fixed = {"before_BWC": x["before"], "age_BT": age_BT, "activation": "silu"}
        return {"out": op(x["x"], x["weight"], x["bias"], **fixed)}

    reference = DEFINITION if T <= LONGEST_DEFINITION else "torch"
    return Problem("short convolution", f"B{B} T{T} C{C} W{W}, packed", inputs, call, reference)


def _norm_gate(shape, activation: str, device, dtype) -> Problem:
    inputs = {name: _random(*shape, dtype=dtype, device=device) for name in ("x", "gate")}
    inputs["weight"] = _random(shape[-1], dtype=torch.float32, device=device)

    def call(x: Tensors, backend: str) -> Tensors:
        op = norm_gate_reference if backend == DEFINITION else partial(norm_gate, backend=backend)
        return {"out": op(x["x"], x["gate"], x["weight"], activation=activation)}

    about = f"{activation}, " + " ".join(f"{n}{size}" for n, size in zip("BTHV", shape))
    return Problem("norm gate", about, inputs, call, DEFINITION)


def _selected_rows(shape, device, dtype) -> Problem:
    B, T, H, E, D = shape
    index_BHE = some_tokens(B, T, H, E, device)
    index_BHE[:, :, ::3] = -1
    inputs = {
        "x": _random(B, T, D, dtype=dtype, device=device),
        "rows": _random(B, H, E, D, dtype=dtype, device=device),
        "weight": _random(B, H, E, dtype=torch.float32, device=device),
    }

    def call(x: Tensors, backend: str) -> Tensors:
        taken = gather_rows(x["x"], index_BHE, backend=backend)
        put = scatter_rows(x["rows"], index_BHE, T, x["weight"], backend=backend)
        return {"taken": taken, "put": put}

    about = " ".join(f"{letter}{size}" for letter, size in zip("BTHED", shape))
    return Problem("selected rows", about, inputs, call)


def some_tokens(B: int, T: int, H: int, E: int, device: torch.device) -> Tensor:
    """E tokens for every head, in rising order."""
    return torch.rand(B, H, T, device=device).argsort(-1)[..., :E].sort(-1).values


def _lifetime(sight: str, normaliser: str, size, device, dtype) -> Problem:
    (T, D), H, J = size, 4, 2
    B = 2 if sight == "causal" else 1
    U = T // 2 + 1 if sight == "ranges" else T
    inputs = {
        "q": _random(B, T, H, D, dtype=dtype, device=device),
        "k": _random(B, U, J, D, dtype=dtype, device=device),
        "v": _random(B, U, J, D, dtype=dtype, device=device),
    }
    if sight == "biases":
        inputs["key_bias"] = _random(B, U, H, dtype=torch.float32, device=device)
        inputs["query_bias"] = _random(B, T, H, dtype=torch.float32, device=device)
    fixed = {"normaliser": normaliser, "expiry": _expiry(sight, B, U, J, device)}
    if sight == "slopes":
        fixed["slope"] = torch.tensor([0.7, 0.5, 0.01, 0.0], device=device)
    if sight == "ranges":
        # Keys of one part of a sequence, met by queries of a later part.
        fixed["query_positions"] = torch.arange(T, dtype=torch.int32, device=device)[None] + U // 2
        fixed["key_positions"] = torch.arange(U, dtype=torch.int32, device=device)[None]

    def call(x: Tensors, backend: str) -> Tensors:
        out, lse = flash_lifetime(**x, **fixed, backend=backend)
        return {"out": out, "lse": lse.masked_fill(lse == -torch.inf, 0.0)}

    about = f"{sight}, {normaliser}, B{B} T{T} U{U} H{H}/{J} D{D}"
    return Problem("lifetime", about, inputs, call)


def _expiry(sight: str, B: int, U: int, J: int, device) -> Tensor | None:
    born = torch.arange(U, dtype=torch.int32, device=device)[None]
    window = max(U // 7, 3)
    if sight in ("window", "biases"):
        return born + window
    if sight == "sinks":
        return torch.where(born < 4, NEVER, born + window)
    if sight == "packed":
        return torch.where(born < U // 3, U // 3, U).to(torch.int32)
    if sight == "per-head expiry":
        lives = torch.randint(1, U, (B, U, J), dtype=torch.int32, device=device)
        return born[..., None] + lives
    return None


def _blocklist(normaliser: str, size, device, dtype) -> Problem:
    (T, D), H, J = size, 4, 2
    block_size = 16 if T < 128 else 64
    count = -(-T // block_size)
    inputs = {
        name: _random(1, T, heads, D, dtype=dtype, device=device)
        for name, heads in (("q", H), ("k", J), ("v", J))
    }
    own = torch.arange(count, device=device)[None, :, None].expand(J, -1, 1)
    others = torch.randint(-1, count, (J, count, 3), device=device)
    blocks = torch.cat([own, others], -1).to(torch.int32)

    def call(x: Tensors, backend: str) -> Tensors:
        out, lse = flash_blocklist(
            **x, blocks=blocks, block_size=block_size, normaliser=normaliser, backend=backend
        )
        return {"out": out, "lse": lse.masked_fill(lse == -torch.inf, 0.0)}

    return Problem("blocklist", f"{normaliser}, T{T} H{H}/{J} D{D}", inputs, call)


def _selected_blocks(group: int, size, device, dtype) -> Problem:
    (T, D), J = size, 2
    block_size = 16 if T < 128 else 64
    count = -(-T // block_size)
    inputs = {
        name: _random(tokens, heads, D, dtype=dtype, device=device)
        for name, tokens, heads in (
            ("q", T, J * group),
            ("k", count * block_size, J),
            ("v", count * block_size, J),
        )
    }
    position = torch.arange(count * block_size, dtype=torch.int32, device=device)
    blocks = torch.randint(-1, count, (T, J, 3), device=device)
    blocks = torch.cat((blocks, (position[:T] // block_size)[:, None, None].expand(-1, J, 1)), -1)

    def call(x: Tensors, backend: str) -> Tensors:
        out, lse = selected_block_attention(
            *(x["q"], x["k"], x["v"], blocks, block_size),
            query_positions_N=position[:T],
            key_positions_U=torch.where(position < T, position, NEVER),
            backend=backend,
        )
        return {"out": out, "lse": lse}

    return Problem("selected blocks", f"T{T} H{J * group}/{J} D{D}", inputs, call)


def _random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)
