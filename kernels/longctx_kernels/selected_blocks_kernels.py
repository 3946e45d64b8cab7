"""Triton kernels of attention to listed key blocks.

The rows of all products are keys or channels, of which there are many, and their columns the heads
of one query that share keys, of which there may be few: so matrix units are filled. Gradients of
keys are sums over the queries that list their block, in a fixed order; what many list is cut into
parts, which other programs sum before. U is a multiple of every tile of keys.
"""

import triton
import triton.language as tl

from longctx_kernels.lifetime_kernels import _load_tile, _store_tile

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _heads(base, heads, inside, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Rows of heads as columns, [PADDED, M]; zero where not inside."""
    rows = tl.arange(0, PADDED)[:, None]
    pointers = base + heads[None, :] * SIZE + rows
    return tl.load(pointers, mask=inside[None, :] & (rows < SIZE), other=0.0)


@triton.jit
def _store_heads(base, x, heads, inside, SIZE: tl.constexpr, PADDED: tl.constexpr):
    rows = tl.arange(0, PADDED)[:, None]
    pointers = base + heads[None, :] * SIZE + rows
    tl.store(pointers, x.to(base.dtype.element_ty), mask=inside[None, :] & (rows < SIZE))


@triton.jit
def _finite_lse(lse, inside):
    """In powers of two; +inf, which makes weights 0, where a query sees nothing or is none."""
    x = tl.load(lse, mask=inside, other=float("inf"))
    return tl.where(x == float("-inf"), float("inf"), x * LOG2E)


@triton.jit(do_not_specialize=["scale", "L"])
def selected_forward_kernel(
    q, k, v, blocks, counts, query_positions, key_positions, out, lse, scale, L,
    H: tl.constexpr, J: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    PADDED_K: tl.constexpr, PADDED_V: tl.constexpr, LISTED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M heads of one query that share a key head."""
    group: tl.constexpr = H // J
    parts: tl.constexpr = LISTED // BLOCK_N
    n = tl.cast(tl.program_id(0), tl.int64)
    j = tl.program_id(1)
    heads = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = heads < group
    first_head = n * H + j * group
    q_KM = _heads(q + first_head * K, heads, inside, K, PADDED_K)
    position = tl.load(query_positions + n)
    count = tl.load(counts + n * J + j) * parts
    blocks += (n * J + j) * L
    acc_VM = tl.zeros((PADDED_V, BLOCK_M), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = total - float("inf")
    for i in range(0, count):
        first = (tl.load(blocks + i // parts) * parts + i % parts) * BLOCK_N
        k_NK = _load_tile(k + j * K, first, 0, J * K, K, PADDED_K, BLOCK_N, False)
        v_NV = _load_tile(v + j * V, first, 0, J * V, V, PADDED_V, BLOCK_N, False)
        seen = tl.load(key_positions + first + tl.arange(0, BLOCK_N)) <= position
        x = tl.dot(k_NK, q_KM, input_precision=PRECISION) * (scale * LOG2E)
        x = tl.where(seen[:, None], x, float("-inf"))
        top_next = tl.maximum(top, tl.max(x, 0))
        # Nothing seen so far leaves -inf, and -inf - -inf is NaN.
        finite = tl.where(top_next == float("-inf"), 0.0, top_next)
        keep = tl.exp2(top - finite)
        weight = tl.exp2(x - finite[None, :])
        total = total * keep + tl.sum(weight, 0)
        acc_VM = acc_VM * keep[None, :]
        weight = weight.to(v_NV.dtype)
        acc_VM = tl.dot(tl.trans(v_NV), weight, acc_VM, input_precision=PRECISION)
        top = top_next
    some = total > 0
    safe = tl.where(some, total, 1.0)
    log_sum = tl.where(some, tl.log(safe) + top * LN2, float("-inf"))
    _store_heads(out + first_head * V, acc_VM / safe[None, :], heads, inside, V, PADDED_V)
    tl.store(lse + first_head + heads, log_sum, mask=inside)


@triton.jit(do_not_specialize=["scale", "L"])
def selected_dq_kernel(
    q, k, v, dout, lse, delta, blocks, counts, query_positions, key_positions, dq, scale, L,
    H: tl.constexpr, J: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    PADDED_K: tl.constexpr, PADDED_V: tl.constexpr, LISTED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_M heads of one query that share a key head."""
    group: tl.constexpr = H // J
    parts: tl.constexpr = LISTED // BLOCK_N
    n = tl.cast(tl.program_id(0), tl.int64)
    j = tl.program_id(1)
    heads = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = heads < group
    first_head = n * H + j * group
    q_KM = _heads(q + first_head * K, heads, inside, K, PADDED_K)
    dout_VM = _heads(dout + first_head * V, heads, inside, V, PADDED_V)
    lse_M = _finite_lse(lse + first_head + heads, inside)
    delta_M = tl.load(delta + first_head + heads, mask=inside, other=0.0)
    position = tl.load(query_positions + n)
    count = tl.load(counts + n * J + j) * parts
    blocks += (n * J + j) * L
    dq_KM = tl.zeros((PADDED_K, BLOCK_M), tl.float32)
    for i in range(0, count):
        first = (tl.load(blocks + i // parts) * parts + i % parts) * BLOCK_N
        k_NK = _load_tile(k + j * K, first, 0, J * K, K, PADDED_K, BLOCK_N, False)
        v_NV = _load_tile(v + j * V, first, 0, J * V, V, PADDED_V, BLOCK_N, False)
        seen = tl.load(key_positions + first + tl.arange(0, BLOCK_N)) <= position
        x = tl.dot(k_NK, q_KM, input_precision=PRECISION) * (scale * LOG2E)
        weight = tl.exp2(x - lse_M[None, :])
        dweight = tl.dot(v_NV, dout_VM, input_precision=PRECISION)
        dscore = tl.where(seen[:, None], weight * (dweight - delta_M[None, :]), 0.0)
        dscore = dscore.to(k_NK.dtype)
        dq_KM = tl.dot(tl.trans(k_NK), dscore, dq_KM, input_precision=PRECISION)
    _store_heads(dq + first_head * K, dq_KM * scale, heads, inside, K, PADDED_K)


@triton.jit
def _rows(base, rows, inside, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Rows by number, [M, PADDED]; zero where not inside."""
    columns = tl.arange(0, PADDED)[None, :]
    pointers = base + rows[:, None] * SIZE + columns
    return tl.load(pointers, mask=inside[:, None] & (columns < SIZE), other=0.0)


@triton.jit
def _key_sums(
    q, k, v, dout, lse, delta, queries, query_positions, key_positions, first, j, scale,
    start, stop, H: tl.constexpr, J: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    PADDED_K: tl.constexpr, PADDED_V: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_N keys of one key head, over all heads of queries[start : stop]."""
    group: tl.constexpr = H // J
    k_NK = _load_tile(k + j * K, first, 0, J * K, K, PADDED_K, BLOCK_N, False)
    v_NV = _load_tile(v + j * V, first, 0, J * V, V, PADDED_V, BLOCK_N, False)
    born = tl.load(key_positions + first + tl.arange(0, BLOCK_N))
    queries += start
    # Heads of all queries behind one another leave no column of a product unused.
    count = (stop - start) * group
    dk_NK = tl.zeros((BLOCK_N, PADDED_K), tl.float32)
    dv_NV = tl.zeros((BLOCK_N, PADDED_V), tl.float32)
    for i in range(0, tl.cdiv(count, BLOCK_M)):
        listed = i * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = listed < count
        n = tl.load(queries + listed // group, mask=inside, other=0)
        rows = tl.cast(n, tl.int64) * H + j * group + listed % group
        q_MK = _rows(q, rows, inside, K, PADDED_K)
        dout_MV = _rows(dout, rows, inside, V, PADDED_V)
        lse_M = _finite_lse(lse + rows, inside)
        delta_M = tl.load(delta + rows, mask=inside, other=0.0)
        position = tl.load(query_positions + n, mask=inside, other=-2147483648)
        seen = born[:, None] <= position[None, :]
        x = tl.dot(k_NK, tl.trans(q_MK), input_precision=PRECISION) * (scale * LOG2E)
        weight = tl.where(seen, tl.exp2(x - lse_M[None, :]), 0.0)
        # Before the gradient of scores, so that fewer tiles live at once.
        dv_NV = tl.dot(weight.to(dout_MV.dtype), dout_MV, dv_NV, input_precision=PRECISION)
        dweight = tl.dot(v_NV, tl.trans(dout_MV), input_precision=PRECISION)
        dscore = tl.where(seen, weight * (dweight - delta_M[None, :]), 0.0)
        dk_NK = tl.dot(dscore.to(q_MK.dtype), q_MK, dk_NK, input_precision=PRECISION)
    return dk_NK * scale, dv_NV


@triton.jit(do_not_specialize=["scale", "key_blocks", "chunk"])
def selected_parts_kernel(
    q, k, v, dout, lse, delta, offsets, queries, query_positions, key_positions, owners, firsts,
    dk_parts, dv_parts, scale, key_blocks, chunk, H: tl.constexpr, J: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, PADDED_K: tl.constexpr, PADDED_V: tl.constexpr,
    LISTED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What one chunk of queries, not the first of its block, gives to BLOCK_N keys; fp32."""
    part = tl.program_id(0)
    owner = tl.load(owners + part)
    if owner < J * key_blocks:
        inner = tl.program_id(1) * BLOCK_N
        first = owner % key_blocks * LISTED + inner
        start = tl.load(offsets + owner) + (part - tl.load(firsts + owner) + 1) * chunk
        stop = tl.minimum(start + chunk, tl.load(offsets + owner + 1))
        dk_NK, dv_NV = _key_sums(
            q, k, v, dout, lse, delta, queries, query_positions, key_positions, first,
            owner // key_blocks, scale, start, stop, H, J, K, V, PADDED_K, PADDED_V, PRECISION,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
        row = part * LISTED + inner
        _store_tile(dk_parts, dk_NK, row, row + BLOCK_N, K, K, PADDED_K, BLOCK_N)
        _store_tile(dv_parts, dv_NV, row, row + BLOCK_N, V, V, PADDED_V, BLOCK_N)


@triton.jit(do_not_specialize=["scale", "key_blocks", "chunk"])
def selected_dkdv_kernel(
    q, k, v, dout, lse, delta, offsets, queries, query_positions, key_positions, firsts,
    dk_parts, dv_parts, dk, dv, scale, key_blocks, chunk, H: tl.constexpr, J: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, PADDED_K: tl.constexpr, PADDED_V: tl.constexpr,
    LISTED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_N keys of one key head: of the first chunk of queries, and of parts."""
    first = tl.program_id(0) * BLOCK_N
    j = tl.program_id(1)
    owner = j * key_blocks + first // LISTED
    start = tl.load(offsets + owner)
    stop = tl.minimum(start + chunk, tl.load(offsets + owner + 1))
    dk_NK, dv_NV = _key_sums(
        q, k, v, dout, lse, delta, queries, query_positions, key_positions, first, j, scale, start,
        stop, H, J, K, V, PADDED_K, PADDED_V, PRECISION, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    some, end = tl.load(firsts + owner), tl.load(firsts + owner + 1)
    # One after the other, so that fewer tiles live at once.
    for part in range(some, end):
        row = part * LISTED + first % LISTED
        dk_NK += _load_tile(dk_parts, row, 0, K, K, PADDED_K, BLOCK_N, False)
    _store_tile(dk + j * K, dk_NK, first, first + BLOCK_N, J * K, K, PADDED_K, BLOCK_N)
    for part in range(some, end):
        row = part * LISTED + first % LISTED
        dv_NV += _load_tile(dv_parts, row, 0, V, V, PADDED_V, BLOCK_N, False)
    _store_tile(dv + j * V, dv_NV, first, first + BLOCK_N, J * V, V, PADDED_V, BLOCK_N)
