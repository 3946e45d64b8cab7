"""Decay attention in Triton: the state pass, the output pass and their mirrors.

Tokens are flattened, `[T, H, D]`; `cuts` bound the pieces. The gate's rank says its kind: `[H]`
constant, `[T, H]` scalar, `[T, H, K]` diagonal. Chunks of C tokens never cross a piece; the state
entering each is kept, at row `cuts[n] // C + n + i` for chunk i of piece n.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from longctx_kernels.decay_diagonal_kernels import (
    decay_gradients_diagonal,
    decay_outputs_diagonal,
    decay_scores_diagonal,
)
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
    if g.dim() == 3:
        tile = _diagonal_scores(q_THK, k_THK, v_THV, g, scale, cuts)
        roles = tile.queries_THK, tile.keys_THK, v_THV, tile.scores_THC
        return _diagonal_outputs(tile, roles, starts, cuts, reverse=False), starts
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
    q_THK, k_THK, v_THV, g, dout_THV = operands
    C, device = chunk_size(K, V, q_THK.device), q_THK.device
    edges = _edge_table(cuts, C, device)
    if g.dim() == 3:
        dq_THK, dk_THK, dv_THV, dG, sums = _diagonal_gradients(operands, scale, saved, ends, cuts)
        return dq_THK, dk_THK, dv_THV, _pinned(dG, sums, edges)
    options = _options("decay_gradients", q_THK, v_THV, g)
    options |= {"WHOLE_K": _padded(K), "WHOLE_V": _padded(V)}
    chunks = _chunk_table(cuts, C, device)
    tiles_k, tiles_v = cdiv(K, options["BLOCK_K"]), cdiv(V, options["BLOCK_V"])
    grads = [torch.empty_like(x) for x in operands[:3]]
    qdq, kdk, at_start, at_stop = _gate_products(g, tiles_k, (len(chunks), H, K))
    grid = (len(chunks) * (2 * tiles_k + tiles_v), H)
    arguments = *operands, saved, ends, *grads, qdq, kdk, at_start, at_stop, chunks, T, float(scale)
    launch(decay_gradients, grid, *arguments, options=options)
    if g.dim() == 1:
        return *grads, None
    dG = qdq.sub_(kdk).sum(0)
    sums = torch.segment_reduce(dG, "sum", lengths=edges[1] - edges[0] + 1)
    return *grads, _pinned(dG, (sums, at_start.sum(-1), at_stop.sum(-1)), edges)


class Tiles(NamedTuple):
    """Of tiles under diagonal gates the decayed scores and what meets the states around them."""

    queries_THK: Tensor
    keys_THK: Tensor
    scores_THC: Tensor
    totals_IHK: Tensor
    per_chunk: int


def _diagonal_scores(q_THK, k_THK, v_THV, g_THK, scale, cuts) -> Tiles:
    (T, H, K), V, device = q_THK.shape, v_THV.shape[2], q_THK.device
    options = _options("decay_scores", q_THK, v_THV, g_THK)
    del options["V"]
    C = chunk_size(K, V, device)
    chunks, per_chunk = _chunk_table(cuts, C, device), cdiv(C, options["BLOCK_T"])
    scores_THC = q_THK.new_empty(T, H, options["BLOCK_T"])
    totals_IHK = g_THK.new_empty(len(chunks) * per_chunk, H, K)
    tiles = Tiles(
        torch.empty_like(q_THK), torch.empty_like(k_THK), scores_THC, totals_IHK, per_chunk
    )
    grid = (len(chunks) * per_chunk, H)
    arguments = q_THK, k_THK, g_THK, scores_THC, *tiles[:2], totals_IHK, chunks, float(scale)
    launch(decay_scores_diagonal, grid, *arguments, options=options | {"TILES": per_chunk})
    return tiles


def _diagonal_outputs(tiles, roles, states, cuts, reverse, edges=None, products=None) -> Tensor:
    """`decay_outputs_diagonal` of a, b, c and scores, or of transposed states without scores."""
    a_THW, _, c_THN, _ = roles
    (_, H, W), N, device = a_THW.shape, c_THN.shape[2], a_THW.device
    options = _options("decay_outputs", a_THW, c_THN, tiles.totals_IHK)
    del options["K"], options["V"]
    options |= {"W": W, "N": N, "WHOLE": _padded(W), "BLOCK_T": tiles.scores_THC.shape[2]}
    options |= {"BLOCK_N": min(options["BLOCK_N"], _padded(N)), "TILES": tiles.per_chunk}
    chunks, out_THN = _chunk_table(cuts, chunk_size(W, N, device), device), torch.empty_like(c_THN)
    grid = (len(chunks) * cdiv(N, options["BLOCK_N"]), H)
    arguments = *roles, tiles.totals_IHK, states, out_THN, edges, products, chunks
    launch(decay_outputs_diagonal, grid, *arguments, options=options | {"REVERSE": reverse})
    return out_THN


def _diagonal_gradients(operands, scale, saved, ends, cuts) -> tuple[Tensor, ...]:
    """dq, dk, dv, the gradient of the gate's running sum, and what `_pinned` wants to know."""
    q_THK, k_THK, v_THV, g_THK, dout_THV = operands
    (_, H, K), V = q_THK.shape, v_THV.shape[2]
    chunks = _chunk_table(cuts, chunk_size(K, V, q_THK.device), q_THK.device)
    tiles = _diagonal_scores(q_THK, k_THK, v_THV, g_THK, scale, cuts)
    at_stop, at_start = (g_THK.new_empty(len(chunks), H, K) for _ in range(2))
    of_v = tiles.keys_THK, tiles.queries_THK, dout_THV, tiles.scores_THC
    dv_THV = _diagonal_outputs(tiles, of_v, ends, cuts, True)
    of_q, of_k = (dout_THV, v_THV, tiles.keys_THK, None), (v_THV, dout_THV, tiles.queries_THK, None)
    dq_states_THK = _diagonal_outputs(tiles, of_q, saved, cuts, False, ends, at_stop)
    dk_states_THK = _diagonal_outputs(tiles, of_k, ends, cuts, True, saved, at_start)
    dq_THK, dk_THK, dG_THK = (torch.empty_like(x) for x in (q_THK, k_THK, g_THK))
    # Tiles behind the end of a piece add nothing.
    sums_IHK = torch.zeros_like(tiles.totals_IHK)
    options = _options("decay_gradients", q_THK, v_THV, g_THK) | {"WHOLE_V": _padded(V)}
    options |= {"TILES": tiles.per_chunk, "BLOCK_T": tiles.scores_THC.shape[2]}
    results = dq_THK, dk_THK, dG_THK, sums_IHK
    arguments = *operands, dq_states_THK, dk_states_THK, *results, chunks, float(scale)
    grid = (len(chunks) * tiles.per_chunk * cdiv(K, options["BLOCK_K"]), H)
    launch(decay_gradients_diagonal, grid, *arguments, options=options)
    sums = sums_IHK.unflatten(0, (-1, tiles.per_chunk)).sum(1), at_start, at_stop
    return dq_THK, dk_THK, dv_THV, dG_THK, sums


def _gate_products(g: Tensor, parts: int, edges: tuple[int, ...]) -> tuple[Tensor | None, ...]:
    """Room for q dq and k dk of a scalar gate, and for products at both edges of chunks."""
    if g.dim() == 1:
        return None, None, None, None
    shapes = (parts, *g.shape), (parts, *g.shape), edges, edges
    return tuple(torch.empty(s, dtype=torch.float32, device=g.device) for s in shapes)


def _pinned(dG: Tensor, sums: tuple[Tensor, Tensor, Tensor], edges: Tensor) -> Tensor:
    """Makes dG add up over each chunk to what the states at its edges say.

    q dq and k dk each have rounding errors of their own, which a running sum over a long sequence
    would gather. At an edge of chunks that sum is the product of the state and its gradient: half
    of what is missing goes to the first token of a chunk, half to the last.
    """
    summed, at_start, at_stop = sums
    first, last, ends_piece = edges
    is_last = ends_piece.bool().view(-1, *[1] * (summed.dim() - 1))
    after = torch.where(is_last, at_stop, at_start.roll(-1, 0))
    missing = (at_start - after - summed) / 2
    dG[first] += missing
    dG[last] += missing
    return dG


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
    if g.dim() < 3 or kernel in ("decay_states", "decay_scan"):
        options["GATE"] = g.dim() - 1
    return options | {"H": H, "K": K, "V": V}


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
def _edge_table(cuts: Cuts, C: int, device: torch.device) -> Tensor:
    """First and last token of every chunk, and whether it ends its piece, int64 `[3, chunks]`."""
    start, stop, _ = _chunk_table(cuts, C, torch.device("cpu")).long().T
    return torch.stack((start, stop - 1, torch.isin(stop, torch.tensor(cuts)))).to(device)


@lru_cache(maxsize=64)
def _piece_table(cuts: Cuts, C: int, device: torch.device) -> Tensor:
    """First row and length of every piece, int32 `[N, 2]`."""
    rows = [(a // C + n, b - a) for n, (a, b) in enumerate(zip(cuts, cuts[1:]))]
    return torch.tensor(rows, dtype=torch.int32, device=device)
