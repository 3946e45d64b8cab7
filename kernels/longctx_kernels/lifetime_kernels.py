"""Triton kernels of lifetime attention and attention to listed blocks.

Key j is seen by query i iff key_position[j] <= query_position[i] < expiry[head, j]. A program goes
twice over key (or query) blocks: over those that need the mask, then over those seen by all. Which
these are is in `ranges`; with LISTED, then the size of listed blocks, they come from lists, and all
are masked. Offsets within a tile are of 32 bits; names of tiles end in their shape.
"""

import triton
import triton.language as tl

SOFTMAX = tl.constexpr(0)
SIGMOID = tl.constexpr(1)
RELU = tl.constexpr(2)
SOFTPLUS = tl.constexpr(3)
SIGNED = tl.constexpr(4)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FIELDS = tl.constexpr(6)
"""Numbers per query block in `ranges`: sink start, stop; start, whole start, whole stop, stop."""
KEY_FIELDS = tl.constexpr(4)
"""Numbers per key block in `key_ranges`: start, whole start, whole stop, stop."""


@triton.jit
def _load_tile(
    base, first, limit, STRIDE: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """Rows from `first` on of one head, [ROWS, PADDED]; zero outside, rows only if CHECKED."""
    # One wide number a tile, and offsets of 32 bits within it, take few registers.
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, PADDED)
    pointers = (
        base + tl.cast(first, tl.int64) * STRIDE + (rows[:, None] * STRIDE + columns[None, :])
    )
    if CHECKED and PADDED != SIZE:
        inside = (rows[:, None] < limit - first) & (columns[None, :] < SIZE)
        return tl.load(pointers, mask=inside, other=0.0)
    elif CHECKED:
        return tl.load(pointers, mask=rows[:, None] < limit - first, other=0.0)
    elif PADDED != SIZE:
        return tl.load(pointers, mask=columns[None, :] < SIZE, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _store_tile(
    base, x, first, limit, STRIDE: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, PADDED)
    pointers = (
        base + tl.cast(first, tl.int64) * STRIDE + (rows[:, None] * STRIDE + columns[None, :])
    )
    inside = rows[:, None] < limit - first
    if PADDED != SIZE:
        inside = inside & (columns[None, :] < SIZE)
    tl.store(pointers, x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _load_numbers(
    base, first, limit, other, STRIDE: tl.constexpr, ROWS: tl.constexpr, CHECKED: tl.constexpr
):
    """Numbers [ROWS] of one head, from row `first` on; `other` outside if CHECKED."""
    rows = tl.arange(0, ROWS)
    pointers = base + tl.cast(first, tl.int64) * STRIDE + rows * STRIDE
    if CHECKED:
        return tl.load(pointers, mask=rows < limit - first, other=other)
    else:
        return tl.load(pointers)


@triton.jit
def _store_numbers(base, x, first, limit, STRIDE: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    pointers = base + tl.cast(first, tl.int64) * STRIDE + rows * STRIDE
    tl.store(pointers, x, mask=rows < limit - first)


@triton.jit
def _unit(NORM: tl.constexpr):
    """Factor of scores: exponential normalisers work in powers of two."""
    return 1.4426950408889634 if NORM == SOFTMAX or NORM == SIGNED else 1.0  # noqa: SIM109


@triton.jit
def _softplus(x):
    """max(x, 0) + log(1 + y), y = exp(-|x|), as 2 atanh(y / (2 + y)): exact for small y."""
    y = tl.exp(-tl.abs(x))
    z = y / (2.0 + y)
    w = z * z
    series = 1.0 / 11 + w * (1.0 / 13)
    series = 1.0 / 7 + w * (1.0 / 9 + w * series)
    series = 1.0 + w * (1.0 / 3 + w * (1.0 / 5 + w * series))
    return tl.maximum(x, 0.0) + 2.0 * z * series


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def _weights(x, lse, NORM: tl.constexpr):
    """Weights of the values, and what else their gradient needs; lse is +inf for empty queries."""
    slope = x
    if NORM == SOFTMAX:
        weight = tl.exp2(x - lse)
    elif NORM == SIGNED:
        weight = _sign(x) * tl.exp2(tl.abs(x) - lse)
    elif NORM == SOFTPLUS:
        share = tl.exp(-lse)
        weight = _softplus(x) * share
        slope = _sigmoid(x) * share
    elif NORM == SIGMOID:
        weight = _sigmoid(x)
    else:
        weight = tl.maximum(x, 0.0)
    return weight, slope


@triton.jit
def _score_gradient(weight, slope, dweight, delta, NORM: tl.constexpr):
    """Gradient of the natural score; 0 where weight and slope are."""
    if NORM == SOFTMAX:
        dscore = weight * (dweight - delta)
    elif NORM == SIGNED:
        dscore = tl.abs(weight) * dweight - weight * delta
    elif NORM == SOFTPLUS:
        dscore = slope * (dweight - delta)
    elif NORM == SIGMOID:
        dscore = weight * (1.0 - weight) * dweight
    else:
        dscore = tl.where(weight > 0, dweight, 0.0)
    return dscore


@triton.jit
def _backward_lse(
    lse, first, T, H: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, CHECKED: tl.constexpr
):
    """In the unit of scores; +inf, which makes weights 0, where a query saw nothing."""
    x = _load_numbers(lse, first, T, float("inf"), H, ROWS, CHECKED)
    return tl.where(x == float("-inf"), float("inf"), x * _unit(NORM))


@triton.jit
def _is_unbounded(pointer, NORM: tl.constexpr):
    """Whether factors of products may leave the range of the operands' dtype, 6e-5 to 65504."""
    is_half: tl.constexpr = pointer.dtype.element_ty == tl.float16
    return is_half and NORM != SOFTMAX and NORM != SIGNED


@triton.jit
def _biased(x, key_bias, query_bias, NORM: tl.constexpr, KEY: tl.constexpr, QUERY: tl.constexpr):
    """Scores with biases, which are added to each other first: large ones may cancel."""
    if KEY and QUERY:
        x += (key_bias + query_bias) * _unit(NORM)
    elif KEY:
        x += key_bias * _unit(NORM)
    elif QUERY:
        x += query_bias * _unit(NORM)
    return x


@triton.jit
def _sloped(x, rate, key_positions, query_positions):
    """Scores with distances, exact up to 2^24 as integers are subtracted, times a rate."""
    return x + (key_positions - query_positions).to(tl.float32) * rate


@triton.jit
def _rescale(acc, total, top, factor):
    """Factors over the largest of their row so far, and sums of such (acc, total)."""
    top_next = tl.maximum(top, tl.max(tl.abs(factor), 1))
    keep = top / top_next
    return acc * keep[:, None], total * keep, top_next, factor / top_next[:, None]


@triton.jit
def _masked_block(i, near, mid, sink_start, start, whole_stop):
    """The i-th block that needs the mask: of the sinks, before, or after the whole blocks."""
    return i + tl.where(i < near, sink_start, tl.where(i < mid, start - near, whole_stop - mid))


@triton.jit
def _forward_step(
    acc, top, total, q, block, k, v, query_positions, key_positions, expiry, key_bias, row_bias,
    rate, U, scale, H: tl.constexpr, J: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, PADDED_K: tl.constexpr, PADDED_V: tl.constexpr,
    BLOCK_N: tl.constexpr, NORM: tl.constexpr, MASKED: tl.constexpr, EXPIRES: tl.constexpr,
    KEY_BIAS: tl.constexpr, QUERY_BIAS: tl.constexpr, SLOPED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Online sums over one key block; all head pointers are those of the head."""
    first = block * BLOCK_N
    k_NK = _load_tile(k, first, U, J * K, K, PADDED_K, BLOCK_N, MASKED)
    x = tl.dot(q, tl.trans(k_NK), input_precision=PRECISION) * (scale * _unit(NORM))
    bias = row_bias
    if KEY_BIAS:
        bias = _load_numbers(key_bias, first, U, 0.0, H, BLOCK_N, MASKED)
    x = _biased(x, bias[None, :], row_bias[:, None], NORM, KEY_BIAS, QUERY_BIAS)
    if SLOPED:
        born = _load_numbers(key_positions, first, U, 2147483647, 1, BLOCK_N, MASKED)
        x = _sloped(x, rate, born[None, :], query_positions[:, None])
    if MASKED:
        seen = _seen(query_positions, key_positions, expiry, first, U, BLOCK_N, EXPIRES)
    if NORM == SOFTMAX or NORM == SIGNED:  # noqa: SIM109
        size = tl.abs(x) if NORM == SIGNED else x
        if MASKED:
            size = tl.where(seen, size, float("-inf"))
        top_next = tl.maximum(top, tl.max(size, 1))
        # Nothing seen so far leaves -inf, and -inf - -inf is NaN.
        finite = tl.where(top_next == float("-inf"), 0.0, top_next)
        keep = tl.exp2(top - finite)
        weight = tl.exp2(size - finite[:, None])
        total = total * keep + tl.sum(weight, 1)
        acc = acc * keep[:, None]
        if NORM == SIGNED:
            weight = weight * _sign(x)
        top = top_next
    else:
        if NORM == SIGMOID:
            weight = _sigmoid(x)
        elif NORM == RELU:
            weight = tl.maximum(x, 0.0)
        else:
            weight = _softplus(x)
        # Keys beyond U have a score too; only masked blocks hold such.
        if MASKED:
            weight = tl.where(seen, weight, 0.0)
        if _is_unbounded(v, NORM):
            acc, total, top, weight = _rescale(acc, total, top, weight)
        if NORM == SOFTPLUS:
            total += tl.sum(weight, 1)
    v_NV = _load_tile(v, first, U, J * V, V, PADDED_V, BLOCK_N, MASKED)
    acc = tl.dot(weight.to(v_NV.dtype), v_NV, acc, input_precision=PRECISION)
    return acc, top, total


@triton.jit
def _seen(
    query_positions, key_positions, expiry, first, U, BLOCK_N: tl.constexpr, EXPIRES: tl.constexpr
):
    """[M, N]: which keys of the block each query sees; query positions are loaded values."""
    columns = first + tl.arange(0, BLOCK_N)
    inside = columns < U
    born = tl.load(key_positions + columns, mask=inside, other=2147483647)
    seen = (born[None, :] <= query_positions[:, None]) & inside[None, :]
    if EXPIRES:
        dies = tl.load(expiry + columns, mask=inside, other=-2147483648)
        seen = seen & (query_positions[:, None] < dies[None, :])
    return seen


@triton.jit
def _plan(ranges, plan, block, query_blocks, listed_count, listed_row, parts, LISTED: tl.constexpr):
    """Ranges of a query block; with a list, all its blocks count as ones before the whole."""
    if LISTED:
        count = tl.load(listed_count + listed_row) * parts
        return count * 0, count * 0, count * 0, count, count, count
    else:
        base = ranges + (plan * query_blocks + block) * FIELDS
        return (
            tl.load(base), tl.load(base + 1), tl.load(base + 2),
            tl.load(base + 3), tl.load(base + 4), tl.load(base + 5),
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "T", "U", "scale", "plan_stride", "query_blocks", "key_blocks", "listed_width"
    ]
)  # fmt: skip
def lifetime_forward_kernel(
    q, k, v, query_positions, key_positions, expiry, key_bias, query_bias, slope,
    ranges, block_expiry, listed, listed_count, out, lse,
    T, U, scale, plan_stride, query_blocks, key_blocks, listed_width,
    H: tl.constexpr, J: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, PADDED_K: tl.constexpr, PADDED_V: tl.constexpr,
    NORM: tl.constexpr, EXPIRES: tl.constexpr, EXPIRY_BY_HEAD: tl.constexpr, SKIP: tl.constexpr,
    KEY_BIAS: tl.constexpr, QUERY_BIAS: tl.constexpr, SLOPED: tl.constexpr,
    LISTED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One query block of one head. `plan_stride` is 1 if plans differ by key head, else 0."""
    # The last queries see most keys; they start first.
    block = query_blocks - 1 - tl.program_id(0)
    head = tl.program_id(1)
    key_head = head // (H // J)
    plan = tl.cast(key_head * plan_stride, tl.int64)
    start_row = block * BLOCK_M
    q_MK = _load_tile(q + head * K, start_row, T, H * K, K, PADDED_K, BLOCK_M, True)
    positions = _load_numbers(query_positions, start_row, T, -2147483648, 1, BLOCK_M, True)
    first = tl.load(query_positions + start_row)
    k += key_head * K
    v += key_head * V
    row_bias = positions * 0.0
    if KEY_BIAS:
        key_bias += head
    if QUERY_BIAS:
        row_bias = _load_numbers(query_bias + head, start_row, T, 0.0, H, BLOCK_M, True)
    rate = scale
    if SLOPED:
        rate = tl.load(slope + head) * _unit(NORM)
    if EXPIRY_BY_HEAD:
        expiry += tl.cast(key_head, tl.int64) * U
    if SKIP:
        block_expiry += plan * key_blocks
    # Listed blocks may be of several tiles.
    parts = LISTED // BLOCK_N
    listed_row = plan
    if LISTED:
        listed_row = plan * tl.cdiv(T, LISTED) + start_row // LISTED
        listed += listed_row * listed_width
    sink_start, sink_stop, start, whole_start, whole_stop, stop = _plan(
        ranges, plan, block, query_blocks, listed_count, listed_row, parts, LISTED
    )
    acc = tl.zeros((BLOCK_M, PADDED_V), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if NORM == SOFTMAX or NORM == SIGNED:  # noqa: SIM109
        top = total - float("inf")
    elif _is_unbounded(v, NORM):
        top = total + 1e-30
    else:
        top = total + 1.0
    near = sink_stop - sink_start
    mid = near + whole_start - start
    for i in range(0, mid + stop - whole_stop):
        if LISTED:
            b = tl.load(listed + i // parts) * parts + i % parts
        else:
            b = _masked_block(i, near, mid, sink_start, start, whole_stop)
        is_needed = True
        if SKIP:
            is_needed = tl.load(block_expiry + b) > first
        if is_needed:
            acc, top, total = _forward_step(
                acc, top, total, q_MK, b, k, v, positions, key_positions, expiry, key_bias,
                row_bias, rate, U, scale, H, J, K, V, PADDED_K, PADDED_V, BLOCK_N, NORM, True,
                EXPIRES, KEY_BIAS, QUERY_BIAS, SLOPED, PRECISION,
            )  # fmt: skip
    if not LISTED:
        for i in range(whole_start, whole_stop):
            acc, top, total = _forward_step(
                acc, top, total, q_MK, i, k, v, positions, key_positions, expiry, key_bias,
                row_bias, rate, U, scale, H, J, K, V, PADDED_K, PADDED_V, BLOCK_N, NORM, False,
                EXPIRES, KEY_BIAS, QUERY_BIAS, SLOPED, PRECISION,
            )  # fmt: skip
    log_sum = total * 0.0
    if NORM == SOFTMAX or NORM == SIGNED or NORM == SOFTPLUS:  # noqa: SIM109
        some = total > 0
        acc = acc / tl.where(some, total, 1.0)[:, None]
        log_sum = tl.log(tl.where(some, total, 1.0))
        log_sum += tl.log(top) if NORM == SOFTPLUS else top * LN2
        log_sum = tl.where(some, log_sum, float("-inf"))
    else:
        acc = acc * top[:, None]
    _store_tile(out + head * V, acc, start_row, T, H * V, V, PADDED_V, BLOCK_M)
    _store_numbers(lse + head, log_sum, start_row, T, H, BLOCK_M)


@triton.jit(do_not_specialize=["N"])
def lifetime_delta_kernel(
    dout, out, dlse, delta, N,
    V: tl.constexpr, PADDED_V: tl.constexpr, HAS_DLSE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = sum of dout * out over the value size, less dlse; N = T * H rows."""
    first = tl.cast(tl.program_id(0), tl.int64) * BLOCK_M
    dout_MV = _load_tile(dout, first, N, V, V, PADDED_V, BLOCK_M, True).to(tl.float32)
    out_MV = _load_tile(out, first, N, V, V, PADDED_V, BLOCK_M, True).to(tl.float32)
    sums = tl.sum(dout_MV * out_MV, 1)
    if HAS_DLSE:
        sums -= _load_numbers(dlse, first, N, 0.0, 1, BLOCK_M, True)
    _store_numbers(delta, sums, first, N, 1, BLOCK_M)


@triton.jit
def _query_step(
    dq, drow, top, q, dout, lse, delta, block, k, v, query_positions, key_positions, expiry,
    key_bias, row_bias, rate, U, scale, H: tl.constexpr, J: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, PADDED_K: tl.constexpr, PADDED_V: tl.constexpr,
    BLOCK_N: tl.constexpr, NORM: tl.constexpr, MASKED: tl.constexpr, EXPIRES: tl.constexpr,
    KEY_BIAS: tl.constexpr, QUERY_BIAS: tl.constexpr, SLOPED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what one key block gives to the gradients of queries and of their bias."""
    first = block * BLOCK_N
    k_NK = _load_tile(k, first, U, J * K, K, PADDED_K, BLOCK_N, MASKED)
    v_NV = _load_tile(v, first, U, J * V, V, PADDED_V, BLOCK_N, MASKED)
    x = tl.dot(q, tl.trans(k_NK), input_precision=PRECISION) * (scale * _unit(NORM))
    bias = row_bias
    if KEY_BIAS:
        bias = _load_numbers(key_bias, first, U, 0.0, H, BLOCK_N, MASKED)
    x = _biased(x, bias[None, :], row_bias[:, None], NORM, KEY_BIAS, QUERY_BIAS)
    if SLOPED:
        born = _load_numbers(key_positions, first, U, 2147483647, 1, BLOCK_N, MASKED)
        x = _sloped(x, rate, born[None, :], query_positions[:, None])
    weight, slope = _weights(x, lse[:, None], NORM)
    if MASKED:
        seen = _seen(query_positions, key_positions, expiry, first, U, BLOCK_N, EXPIRES)
        weight = tl.where(seen, weight, 0.0)
        slope = tl.where(seen, slope, 0.0)
    dweight = tl.dot(dout, tl.trans(v_NV), input_precision=PRECISION)
    dscore = _score_gradient(weight, slope, dweight, delta[:, None], NORM)
    if QUERY_BIAS:
        drow += tl.sum(dscore, 1)
    if _is_unbounded(k, NORM):
        dq, _, top, dscore = _rescale(dq, top, top, dscore)
    dq = tl.dot(dscore.to(k_NK.dtype), k_NK, dq, input_precision=PRECISION)
    return dq, drow, top


@triton.jit(
    do_not_specialize=[
        "T", "U", "scale", "plan_stride", "query_blocks", "key_blocks", "listed_width"
    ]
)  # fmt: skip
def lifetime_dq_kernel(
    q, k, v, dout, lse, delta, query_positions, key_positions, expiry, key_bias, query_bias, slope,
    ranges, block_expiry, listed, listed_count, dq, dquery_bias,
    T, U, scale, plan_stride, query_blocks, key_blocks, listed_width,
    H: tl.constexpr, J: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, PADDED_K: tl.constexpr, PADDED_V: tl.constexpr,
    NORM: tl.constexpr, EXPIRES: tl.constexpr, EXPIRY_BY_HEAD: tl.constexpr, SKIP: tl.constexpr,
    KEY_BIAS: tl.constexpr, QUERY_BIAS: tl.constexpr, SLOPED: tl.constexpr,
    LISTED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of one query block of one head."""
    block = query_blocks - 1 - tl.program_id(0)
    head = tl.program_id(1)
    key_head = head // (H // J)
    plan = tl.cast(key_head * plan_stride, tl.int64)
    start_row = block * BLOCK_M
    q_MK = _load_tile(q + head * K, start_row, T, H * K, K, PADDED_K, BLOCK_M, True)
    dout_MV = _load_tile(dout + head * V, start_row, T, H * V, V, PADDED_V, BLOCK_M, True)
    positions = _load_numbers(query_positions, start_row, T, -2147483648, 1, BLOCK_M, True)
    first = tl.load(query_positions + start_row)
    lse_M = _backward_lse(lse + head, start_row, T, H, BLOCK_M, NORM, True)
    delta_M = _load_numbers(delta + head, start_row, T, 0.0, H, BLOCK_M, True)
    k += key_head * K
    v += key_head * V
    row_bias = positions * 0.0
    if KEY_BIAS:
        key_bias += head
    if QUERY_BIAS:
        row_bias = _load_numbers(query_bias + head, start_row, T, 0.0, H, BLOCK_M, True)
    rate = scale
    if SLOPED:
        rate = tl.load(slope + head) * _unit(NORM)
    if EXPIRY_BY_HEAD:
        expiry += tl.cast(key_head, tl.int64) * U
    if SKIP:
        block_expiry += plan * key_blocks
    # Listed blocks may be of several tiles.
    parts = LISTED // BLOCK_N
    listed_row = plan
    if LISTED:
        listed_row = plan * tl.cdiv(T, LISTED) + start_row // LISTED
        listed += listed_row * listed_width
    sink_start, sink_stop, start, whole_start, whole_stop, stop = _plan(
        ranges, plan, block, query_blocks, listed_count, listed_row, parts, LISTED
    )
    dq_MK = tl.zeros((BLOCK_M, PADDED_K), tl.float32)
    drow = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), 1e-30, tl.float32)
    near = sink_stop - sink_start
    mid = near + whole_start - start
    for i in range(0, mid + stop - whole_stop):
        if LISTED:
            b = tl.load(listed + i // parts) * parts + i % parts
        else:
            b = _masked_block(i, near, mid, sink_start, start, whole_stop)
        is_needed = True
        if SKIP:
            is_needed = tl.load(block_expiry + b) > first
        if is_needed:
            dq_MK, drow, top = _query_step(
                dq_MK, drow, top, q_MK, dout_MV, lse_M, delta_M, b, k, v, positions, key_positions,
                expiry, key_bias, row_bias, rate, U, scale, H, J, K, V, PADDED_K, PADDED_V,
                BLOCK_N, NORM, True, EXPIRES, KEY_BIAS, QUERY_BIAS, SLOPED, PRECISION,
            )  # fmt: skip
    if not LISTED:
        for i in range(whole_start, whole_stop):
            dq_MK, drow, top = _query_step(
                dq_MK, drow, top, q_MK, dout_MV, lse_M, delta_M, i, k, v, positions, key_positions,
                expiry, key_bias, row_bias, rate, U, scale, H, J, K, V, PADDED_K, PADDED_V,
                BLOCK_N, NORM, False, EXPIRES, KEY_BIAS, QUERY_BIAS, SLOPED, PRECISION,
            )  # fmt: skip
    if _is_unbounded(k, NORM):
        dq_MK = dq_MK * top[:, None]
    _store_tile(dq + head * K, dq_MK * scale, start_row, T, H * K, K, PADDED_K, BLOCK_M)
    if QUERY_BIAS:
        _store_numbers(dquery_bias + head, drow, start_row, T, H, BLOCK_M)


@triton.jit
def _key_step(
    dk, dv, dcolumn, dk_top, dv_top, k, v, born, dies, column_bias, block, q, dout, lse, delta,
    query_positions, query_bias, rate, T, scale, H: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, PADDED_K: tl.constexpr, PADDED_V: tl.constexpr,
    BLOCK_M: tl.constexpr, NORM: tl.constexpr, MASKED: tl.constexpr, EXPIRES: tl.constexpr,
    KEY_BIAS: tl.constexpr, QUERY_BIAS: tl.constexpr, SLOPED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what one query block of one head gives to the gradients of keys; tiles are [N, M]."""
    first = block * BLOCK_M
    q_MK = _load_tile(q, first, T, H * K, K, PADDED_K, BLOCK_M, MASKED)
    dout_MV = _load_tile(dout, first, T, H * V, V, PADDED_V, BLOCK_M, MASKED)
    lse_M = _backward_lse(lse, first, T, H, BLOCK_M, NORM, MASKED)
    delta_M = _load_numbers(delta, first, T, 0.0, H, BLOCK_M, MASKED)
    x = tl.dot(k, tl.trans(q_MK), input_precision=PRECISION) * (scale * _unit(NORM))
    bias = lse_M
    if QUERY_BIAS:
        bias = _load_numbers(query_bias, first, T, 0.0, H, BLOCK_M, MASKED)
    x = _biased(x, column_bias[:, None], bias[None, :], NORM, KEY_BIAS, QUERY_BIAS)
    if SLOPED:
        positions = _load_numbers(query_positions, first, T, -2147483648, 1, BLOCK_M, MASKED)
        x = _sloped(x, rate, born[:, None], positions[None, :])
    weight, slope = _weights(x, lse_M[None, :], NORM)
    if MASKED:
        positions = _load_numbers(query_positions, first, T, -2147483648, 1, BLOCK_M, True)
        inside = tl.arange(0, BLOCK_M) < T - first
        seen = (born[:, None] <= positions[None, :]) & inside[None, :]
        if EXPIRES:
            seen = seen & (positions[None, :] < dies[:, None])
        weight = tl.where(seen, weight, 0.0)
        slope = tl.where(seen, slope, 0.0)
    # Before the gradient of scores, so that fewer tiles live at once.
    factor = weight
    if _is_unbounded(q, NORM):
        dv, _, dv_top, factor = _rescale(dv, dv_top, dv_top, weight)
    dv = tl.dot(factor.to(dout_MV.dtype), dout_MV, dv, input_precision=PRECISION)
    dweight = tl.dot(v, tl.trans(dout_MV), input_precision=PRECISION)
    dscore = _score_gradient(weight, slope, dweight, delta_M[None, :], NORM)
    if KEY_BIAS:
        dcolumn += tl.sum(dscore, 1)
    if _is_unbounded(q, NORM):
        dk, _, dk_top, dscore = _rescale(dk, dk_top, dk_top, dscore)
    dk = tl.dot(dscore.to(q_MK.dtype), q_MK, dk, input_precision=PRECISION)
    return dk, dv, dcolumn, dk_top, dv_top


@triton.jit(do_not_specialize=["T", "U", "scale", "plan_stride", "key_blocks"])
def lifetime_dkdv_kernel(
    q, k, v, dout, lse, delta, query_positions, key_positions, expiry, key_bias, query_bias, slope,
    key_ranges, listed_offsets, listed_queries, dk, dv, dkey_bias,
    T, U, scale, plan_stride, key_blocks, H: tl.constexpr, J: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, PADDED_K: tl.constexpr, PADDED_V: tl.constexpr,
    NORM: tl.constexpr, EXPIRES: tl.constexpr, EXPIRY_BY_HEAD: tl.constexpr,
    KEY_BIAS: tl.constexpr, QUERY_BIAS: tl.constexpr, SLOPED: tl.constexpr,
    LISTED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of one key block of one key head: sums over the query heads that share it."""
    # The first keys are seen by most queries; they start first.
    block = tl.program_id(0)
    key_head = tl.program_id(1)
    plan = tl.cast(key_head * plan_stride, tl.int64)
    start_row = block * BLOCK_N
    k_NK = _load_tile(k + key_head * K, start_row, U, J * K, K, PADDED_K, BLOCK_N, True)
    v_NV = _load_tile(v + key_head * V, start_row, U, J * V, V, PADDED_V, BLOCK_N, True)
    born = _load_numbers(key_positions, start_row, U, 2147483647, 1, BLOCK_N, True)
    dies = born
    if EXPIRY_BY_HEAD:
        expiry += tl.cast(key_head, tl.int64) * U
    if EXPIRES:
        dies = _load_numbers(expiry, start_row, U, -2147483648, 1, BLOCK_N, True)
    # Listed blocks may be of several tiles.
    parts = LISTED // BLOCK_M
    if LISTED:
        base = listed_offsets + plan * tl.cdiv(U, LISTED) + start_row // LISTED
        start = tl.load(base) * parts
        whole_start = tl.load(base + 1) * parts
        whole_stop = whole_start
        stop = whole_start
    else:
        base = key_ranges + (plan * key_blocks + block) * KEY_FIELDS
        start = tl.load(base)
        whole_start = tl.load(base + 1)
        whole_stop = tl.load(base + 2)
        stop = tl.load(base + 3)
    near = whole_start - start
    dk_NK = tl.zeros((BLOCK_N, PADDED_K), tl.float32)
    dv_NV = tl.zeros((BLOCK_N, PADDED_V), tl.float32)
    dk_top = tl.full((BLOCK_N,), 1e-30, tl.float32)
    dv_top = dk_top
    for g in range(0, H // J):
        head = key_head * (H // J) + g
        column_bias = born * 0.0
        if KEY_BIAS:
            column_bias = _load_numbers(key_bias + head, start_row, U, 0.0, H, BLOCK_N, True)
        row_bias = lse
        if QUERY_BIAS:
            row_bias = query_bias + head
        rate = scale
        if SLOPED:
            rate = tl.load(slope + head) * _unit(NORM)
        dcolumn = tl.zeros((BLOCK_N,), tl.float32)
        for i in range(0, near + stop - whole_stop):
            if LISTED:
                b = tl.load(listed_queries + (start + i) // parts) * parts + i % parts
            else:
                b = i + tl.where(i < near, start, whole_stop - near)
            dk_NK, dv_NV, dcolumn, dk_top, dv_top = _key_step(
                dk_NK, dv_NV, dcolumn, dk_top, dv_top, k_NK, v_NV, born, dies, column_bias, b,
                q + head * K, dout + head * V, lse + head, delta + head, query_positions,
                row_bias, rate, T, scale, H, K, V, PADDED_K, PADDED_V, BLOCK_M, NORM, True,
                EXPIRES, KEY_BIAS, QUERY_BIAS, SLOPED, PRECISION,
            )  # fmt: skip
        if not LISTED:
            for i in range(whole_start, whole_stop):
                dk_NK, dv_NV, dcolumn, dk_top, dv_top = _key_step(
                    dk_NK, dv_NV, dcolumn, dk_top, dv_top, k_NK, v_NV, born, dies, column_bias, i,
                    q + head * K, dout + head * V, lse + head, delta + head, query_positions,
                    row_bias, rate, T, scale, H, K, V, PADDED_K, PADDED_V, BLOCK_M, NORM, False,
                    EXPIRES, KEY_BIAS, QUERY_BIAS, SLOPED, PRECISION,
                )  # fmt: skip
        if KEY_BIAS:
            _store_numbers(dkey_bias + head, dcolumn, start_row, U, H, BLOCK_N)
    if _is_unbounded(q, NORM):
        dk_NK = dk_NK * dk_top[:, None]
        dv_NV = dv_NV * dv_top[:, None]
    _store_tile(dk + key_head * K, dk_NK * scale, start_row, U, J * K, K, PADDED_K, BLOCK_N)
    _store_tile(dv + key_head * V, dv_NV, start_row, U, J * V, V, PADDED_V, BLOCK_N)
