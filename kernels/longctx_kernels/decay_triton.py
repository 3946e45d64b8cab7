"""Decay attention in Triton: the state pass, the output pass and their mirrors.

Tokens are flattened, `[T, H, D]`; `cuts` bound the pieces. The gate's rank says its kind: `[H]`
constant, `[T, H]` scalar, `[T, H, K]` diagonal. Chunks of C tokens never cross a piece; the state
entering each is kept, at row `cuts[n] // C + n + i` for chunk i of piece n.
"""

from functools import lru_cache

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from longctx_kernels.decay_kernels import decay_gradients, decay_outputs, decay_scan, decay_states
from longctx_kernels.launch import Options, launch, launch_options

Cuts = tuple[int, ...]
GATES = ("constant", "scalar", "diagonal")


def state_pass(
    k_THK: Tensor, v_THV: Tensor, g: Tensor, cuts: Cuts, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """States entering every chunk, and fp32 states `[N, H, K, V]` leaving every piece."""
    return _scanned(k_THK, v_THV, g, 1.0, cuts, initial_state, reverse=False)


def dstate_pass(
    q_THK: Tensor,
    dout_THV: Tensor,
    g: Tensor,
    scale: float,
    cuts: Cuts,
    dfinal: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the states leaving every chunk, and of those entering every piece (fp32)."""
    return _scanned(q_THK, dout_THV, g, scale, cuts, dfinal, reverse=True)


def output_pass(
    q_THK,
    k_THK,
    v_THV,
    g,
    scale,
    cuts,
    starts,
    initial_state=None,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    """Outputs `[T, H, V]`, and `starts` for the gradients; these hold the initial state."""
    (_, H, K), V = _checked(q_THK, v_THV, g, cuts), v_THV.shape[2]
    q_THK, k_THK, v_THV, g = (x.contiguous() for x in (q_THK, k_THK, v_THV, g))
    options = _options("decay_outputs", q_THK, v_THV, g) | {"WHOLE_K": _padded(K)}
    chunks = _chunk_table(cuts, chunk_size(K, V, q_THK.device), q_THK.device)
    out_THV = torch.empty_like(v_THV)
    grid = (len(chunks) * cdiv(V, options["BLOCK_V"]), H)
    arguments = q_THK, k_THK, v_THV, g, starts, out_THV, chunks, float(scale)
    launch(decay_outputs, grid, *arguments, options=options)
    return out_THV, starts


def gradient_pass(
    q_THK,
    k_THK,
    v_THV,
    g,
    scale,
    cuts,
    dout_THV,
    saved,
    ends,
    initial_state=None,  # noqa: ARG001
    dfinal=None,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv and, for gates per token, the gradient of their running sum in fp32."""
    (T, H, K), V = _checked(q_THK, v_THV, g, cuts), v_THV.shape[2]
    operands = [x.contiguous() for x in (q_THK, k_THK, v_THV, g, dout_THV)]
    q_THK, k_THK, v_THV, g, _ = operands
    options = _options("decay_gradients", q_THK, v_THV, g)
    options |= {"WHOLE_K": _padded(K), "WHOLE_V": _padded(V)}
    tiles_k, tiles_v = cdiv(K, options["BLOCK_K"]), cdiv(V, options["BLOCK_V"])
    dq_THK, dk_THK, dv_THV = (torch.empty_like(x) for x in (q_THK, k_THK, v_THV))
    chunks = _chunk_table(cuts, chunk_size(K, V, q_THK.device), q_THK.device)
    qdq, kdk = _gate_products(g, tiles_k)
    grid = (len(chunks) * (2 * tiles_k + tiles_v), H)
    arguments = *operands, saved, ends, dq_THK, dk_THK, dv_THV, qdq, kdk, chunks
    launch(decay_gradients, grid, *arguments, T, float(scale), options=options)
    if g.dim() == 1:
        return dq_THK, dk_THK, dv_THV, None
    dG = qdq.sub_(kdk)
    return dq_THK, dk_THK, dv_THV, dG.sum(0) if g.dim() == 2 else dG


def _gate_products(g: Tensor, parts: int) -> tuple[Tensor | None, Tensor | None]:
    """Room for q dq and k dk, whose difference is the gradient of the gate's running sum."""
    if g.dim() == 1:
        return None, None
    shape = (parts, *g.shape) if g.dim() == 2 else g.shape
    first, second = (torch.empty(shape, dtype=torch.float32, device=g.device) for _ in range(2))
    return first, second


def chunk_size(K: int, V: int, device: torch.device) -> int:
    """Tokens between the states that are kept."""
    return launch_options("decay_states", max(K, V), device)["CHUNK"]


def _scanned(k_THK, v_THV, g, scale, cuts, edge_NHKV, reverse) -> tuple[Tensor, Tensor]:
    """The state pass, or its mirror with (q, dout) for (k, v)."""
    (T, H, K), V = _checked(k_THK, v_THV, g, cuts), v_THV.shape[2]
    k_THK, v_THV, g = (x.contiguous() for x in (k_THK, v_THV, g))
    device, C = k_THK.device, chunk_size(K, V, k_THK.device)
    flags = {"REVERSE": reverse}
    options = _options("decay_states", k_THK, v_THV, g) | flags
    rows = T // C + len(cuts) - 1
    states = torch.empty(rows, H, K, V, dtype=torch.float32, device=device)
    totals = None
    if g.dim() > 1:
        totals = torch.empty(rows, *g.shape[1:], dtype=torch.float32, device=device)
    chunks = _chunk_table(cuts, C, device)
    grid = (len(chunks) * cdiv(K, options["BLOCK_K"]) * cdiv(V, options["BLOCK_V"]), H)
    arguments = k_THK, v_THV, g, states, totals, chunks, float(scale)
    launch(decay_states, grid, *arguments, options=options)
    starts = torch.empty(rows, H, K, V, dtype=k_THK.dtype, device=device)
    out_NHKV = torch.empty(len(cuts) - 1, H, K, V, dtype=torch.float32, device=device)
    if edge_NHKV is not None:
        edge_NHKV = edge_NHKV.float().contiguous()
    flags["HAS_EDGE"] = edge_NHKV is not None
    options = _options("decay_scan", k_THK, v_THV, g) | flags
    grid = (len(cuts) - 1, H, cdiv(K * V, options["BLOCK"]))
    arguments = states, totals, g, edge_NHKV, starts, out_NHKV, _piece_table(cuts, C, device)
    launch(decay_scan, grid, *arguments, C, options=options)
    return starts, out_NHKV


def _checked(k_THK: Tensor, v_THV: Tensor, g: Tensor, cuts: Cuts) -> torch.Size:
    """Shape of k; refuses what the kernels cannot read."""
    T, H, K = k_THK.shape
    if v_THV.shape[:2] != (T, H) or v_THV.dtype != k_THK.dtype:
        raise ValueError(f"v must be [{T}, {H}, V] in {k_THK.dtype}, got {v_THV.shape}")
    if g.shape not in ((H,), (T, H), (T, H, K)) or g.dtype != torch.float32:
        raise ValueError(f"g must be fp32 [H], [T, H] or [T, H, K], got {g.dtype} {g.shape}")
    if k_THK.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"q, k, v must be fp16, bf16 or fp32, got {k_THK.dtype}: use 'torch'")
    if cuts[0] != 0 or cuts[-1] != T or any(a >= b for a, b in zip(cuts, cuts[1:])):
        raise ValueError(f"cuts must rise strictly from 0 to T = {T}")
    return k_THK.shape


def _options(kernel: str, k_THK: Tensor, v_THV: Tensor, g: Tensor) -> Options:
    """Options from the table, which has entries for gates per token and for fp32, and sizes."""
    (_, H, K), V = k_THK.shape, v_THV.shape[2]
    kinds = ("", "_scalar", "_diagonal")
    if k_THK.dtype == torch.float32:
        kinds = ("_fp32", "_fp32", "_diagonal_fp32")
    kind = "" if kernel == "decay_scan" else kinds[g.dim() - 1]
    options = launch_options(kernel + kind, max(K, V), k_THK.device)
    options.pop("CHUNK", None)
    for block, size in (("BLOCK_K", K), ("BLOCK_V", V)):
        if block in options:
            options[block] = min(options[block], _padded(size))
    return options | {"GATE": g.dim() - 1, "H": H, "K": K, "V": V}


def _padded(size: int) -> int:
    return max(16, next_power_of_2(size))


@lru_cache(maxsize=64)
def _chunk_table(cuts: Cuts, C: int, device: torch.device) -> Tensor:
    """Start, stop and row of every chunk, int32 `[chunks, 3]`."""
    rows = [
        (start, min(start + C, stop), begin // C + piece + i)
        for piece, (begin, stop) in enumerate(zip(cuts, cuts[1:]))
        for i, start in enumerate(range(begin, stop, C))
    ]
    return torch.tensor(rows, dtype=torch.int32, device=device)


@lru_cache(maxsize=64)
def _piece_table(cuts: Cuts, C: int, device: torch.device) -> Tensor:
    """First row and length of every piece, int32 `[N, 2]`."""
    rows = [(a // C + n, b - a) for n, (a, b) in enumerate(zip(cuts, cuts[1:]))]
    return torch.tensor(rows, dtype=torch.int32, device=device)
