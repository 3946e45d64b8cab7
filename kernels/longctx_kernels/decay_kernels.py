"""Triton kernels of decay attention; `decay_triton.py` launches them.

Per head `S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T` and `o_t = scale S_t^T q_t`. A chunk is a row
(start, stop, row of its state) of `chunks`; a program walks it in tiles of BLOCK_T tokens. GATE: 0
is a constant `[H]`, 1 a scalar `[T, H]`, 2 a diagonal `[T, H, K]`. Every exponent is the sum of the
log decays of consecutive tokens of one tile, so none is positive. H, K and V are constants: offsets
in a tile then fold into instructions, where they would else hold most registers.
"""

import triton
import triton.language as tl


@triton.jit
def _dot(a, b, c):
    if a.dtype == tl.float32:
        return tl.dot(a, b, c, input_precision="ieee")
    else:
        return tl.dot(a, b, c)


@triton.jit
def _inside(row, length, d, D: tl.constexpr):
    """Mask of rows below `length` and columns below D."""
    # Nothing compares columns where none can be outside: D is a multiple of the power of two.
    if ((d.shape[0] - 1) & D) == 0:
        return (row < length)[:, None]
    else:
        return (row < length)[:, None] & (d < D)[None, :]


@triton.jit
def _load(x, row, length, d, H: tl.constexpr, D: tl.constexpr):
    """Rows and columns of one head, zeros outside; x points at the chunk's first row."""
    at = x + row[:, None] * (H * D) + d[None, :]
    return tl.load(at, mask=_inside(row, length, d, D), other=0.0)


@triton.jit
def _store(x, value, row, length, d, H: tl.constexpr, D: tl.constexpr):
    at = x + row[:, None] * (H * D) + d[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=_inside(row, length, d, D))


@triton.jit
def _load_state(x, k, v, K: tl.constexpr, V: tl.constexpr, TRANSPOSED: tl.constexpr):
    """State `[K, V]`, or `[V, K]` if TRANSPOSED; x points at its first element."""
    if TRANSPOSED:
        mask = (k < K)[None, :] & (v < V)[:, None]
        return tl.load(x + k[None, :] * V + v[:, None], mask=mask, other=0.0)
    else:
        mask = (k < K)[:, None] & (v < V)[None, :]
        return tl.load(x + k[:, None] * V + v[None, :], mask=mask, other=0.0)


@triton.jit
def _gate_of(g, head, h, K: tl.constexpr, GATE: tl.constexpr):
    """A constant gate itself, loaded once; else where the chunk's first one is."""
    if GATE == 0:
        return tl.load(g + h)
    elif GATE == 1:
        return g + head
    else:
        return g + head * K


@triton.jit
def _tile_logs(g, first, length, GATE: tl.constexpr, H: tl.constexpr, BLOCK_T: tl.constexpr):
    """Log decays of a tile: from its start `[C]` in two parts, to its end `[C]`, and in all.

    g is a constant gate itself, or points at the chunk's first one.
    """
    i = tl.arange(0, BLOCK_T)
    if GATE == 0:
        count = tl.minimum(length - first, BLOCK_T)
        from_start = g * (i + 1).to(tl.float32)
        to_end = g * tl.maximum(count - 1 - i, 0).to(tl.float32)
        return from_start, from_start * 0.0, to_end, g * count.to(tl.float32)
    else:
        # In two parts: sixteenths, whose sums and differences are exact, and small rests. Else a
        # mild decay after a strong one would be the rounding error of a difference of large sums.
        each = tl.load(g + (first + i) * H, mask=first + i < length, other=0.0)
        sixteenths = tl.floor(each * 16.0) * 0.0625
        coarse, fine = tl.cumsum(sixteenths, 0), tl.cumsum(each - sixteenths, 0)
        all_coarse, all_fine = tl.sum(sixteenths, 0), tl.sum(each - sixteenths, 0)
        to_end = tl.minimum((all_coarse - coarse) + (all_fine - fine), 0.0)
        return coarse, fine, to_end, all_coarse + all_fine


@triton.jit
def _between(g, coarse, fine, GATE: tl.constexpr, REVERSE: tl.constexpr, BLOCK_T: tl.constexpr):
    """Decay between tokens of a tile: a row for the later of two, or, in REVERSE, the earlier."""
    i = tl.arange(0, BLOCK_T)
    if GATE == 0:
        log = g * (i[:, None] - i[None, :]).to(tl.float32)
    else:
        log = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    if REVERSE:
        return tl.exp(tl.where(i[:, None] <= i[None, :], -log, float("-inf")))
    else:
        return tl.exp(tl.where(i[:, None] >= i[None, :], log, float("-inf")))


@triton.jit
def _diagonal_logs(g, row, length, k, H: tl.constexpr, K: tl.constexpr):
    """As `_tile_logs` under diagonal gates, `[C, K]` and in all `[K]`."""
    each = _load(g, row, length, k, H, K)
    sixteenths = tl.floor(each * 16.0) * 0.0625
    coarse, fine = tl.cumsum(sixteenths, 0), tl.cumsum(each - sixteenths, 0)
    all_coarse, all_fine = tl.sum(sixteenths, 0), tl.sum(each - sixteenths, 0)
    to_end = tl.minimum((all_coarse[None, :] - coarse) + (all_fine[None, :] - fine), 0.0)
    return coarse, fine, to_end, all_coarse + all_fine


@triton.jit
def _walk(
    a_THW, b_THW, c_THN, g, out_THN, other_THN, products_TH, state_WN, start, length, h, w, n,
    scale, GATE: tl.constexpr, REVERSE: tl.constexpr, BLOCK_T: tl.constexpr, H: tl.constexpr,
    W: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """out = decayed a (state + b^T c over earlier tokens), times scale: any of o, dq, dk and dv.

    o from (q, k, v) and dq from (dout, v, k) walk right; dk from (v, dout, q) and dv from
    (k, q, dout) are REVERSE. If asked, `products_TH` gets out * other, summed over N. Returns the
    state behind the last tile.
    """
    i = tl.arange(0, BLOCK_T)
    head = start * H + h
    a_THW, b_THW = a_THW + head * W, b_THW + head * W
    c_THN, out_THN = c_THN + head * N, out_THN + head * N
    g = _gate_of(g, head, h, W, GATE)
    tiles = tl.cdiv(length, BLOCK_T)
    for step in range(tiles):
        first = (tiles - 1 - step if REVERSE else step) * BLOCK_T
        row = first + i
        a_CW = _load(a_THW, row, length, w, H, W)
        b_CW = _load(b_THW, row, length, w, H, W)
        zero_CC = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
        zero_CN = tl.zeros([BLOCK_T, n.shape[0]], tl.float32)
        # Decays weigh products in fp32. Scores are rounded alike for dq and dk, so that their
        # errors cancel in the gradient of the gate.
        out_CN = _dot(a_CW, state_WN.to(a_CW.dtype), zero_CN)
        scores_CC = _dot(a_CW, tl.trans(b_CW), zero_CC)
        coarse, fine, to_end, total = _tile_logs(g, first, length, GATE, H, BLOCK_T)
        scores_CC *= _between(g, coarse, fine, GATE, REVERSE, BLOCK_T) * scale
        scores_CC = scores_CC.to(a_CW.dtype)
        starts, ends = tl.exp(coarse + fine), tl.exp(to_end)
        read, write = (ends, starts * scale) if REVERSE else (starts * scale, ends)
        c_CN = _load(c_THN, row, length, n, H, N)
        out_CN = _dot(scores_CC, c_CN, out_CN * read[:, None])
        state_WN *= tl.exp(total)
        c_CN = (c_CN * write[:, None]).to(c_CN.dtype)
        _store(out_THN, out_CN, row, length, n, H, N)
        if products_TH is not None:
            product_CN = out_CN * _load(other_THN + head * N, row, length, n, H, N)
            tl.store(products_TH + row * H, tl.sum(product_CN, 1), mask=row < length)
        state_WN = _dot(tl.trans(b_CW), c_CN, state_WN)
    return state_WN


@triton.jit(do_not_specialize=["scale"])
def decay_states(
    k_THK,
    v_THV,
    g,
    states_RHKV,
    totals,
    chunks,
    scale,
    GATE: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
):
    """Each chunk's own state, from zero; REVERSE: the gradient of the state entering it."""
    tiles_v: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    parts: tl.constexpr = ((K + BLOCK_K - 1) // BLOCK_K) * tiles_v
    # Tiles of one chunk are neighbours in time: they read the same tokens.
    chunk = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    h = tl.program_id(1)
    k = (part // tiles_v) * BLOCK_K + tl.arange(0, BLOCK_K)
    v = (part % tiles_v) * BLOCK_V + tl.arange(0, BLOCK_V)
    start = tl.load(chunks + chunk * 3)
    length = tl.load(chunks + chunk * 3 + 1) - start
    row = tl.load(chunks + chunk * 3 + 2).to(tl.int64) * H + h
    head = start.to(tl.int64) * H + h
    k_THK, v_THV = k_THK + head * K, v_THV + head * V
    g = _gate_of(g, head, h, K, GATE)
    i = tl.arange(0, BLOCK_T)
    state_KV = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    log_decay = tl.zeros([BLOCK_K if GATE == 2 else 1], tl.float32)
    tiles = tl.cdiv(length, BLOCK_T)
    for step in range(tiles):
        first = (tiles - 1 - step if REVERSE else step) * BLOCK_T
        k_CK = _load(k_THK, first + i, length, k, H, K)
        v_CV = _load(v_THV, first + i, length, v, H, V)
        if GATE < 2:
            coarse, fine, to_end, total = _tile_logs(g, first, length, GATE, H, BLOCK_T)
            weight = tl.exp(coarse + fine if REVERSE else to_end)
            v_CV = (v_CV * weight[:, None]).to(v_CV.dtype)
            state_KV *= tl.exp(total)
        else:
            coarse, fine, to_end, total = _diagonal_logs(g, first + i, length, k, H, K)
            weight = tl.exp(coarse + fine if REVERSE else to_end)
            k_CK = (k_CK * weight).to(k_CK.dtype)
            state_KV *= tl.exp(total)[:, None]
        state_KV = _dot(tl.trans(k_CK), v_CV, state_KV)
        log_decay += total
    at = states_RHKV + row * (K * V) + k[:, None] * V + v[None, :]
    tl.store(at, state_KV * scale, mask=(k < K)[:, None] & (v < V)[None, :])
    # Programs of several tiles write the same totals.
    if GATE == 1:
        tl.store(totals + row + tl.arange(0, 1), log_decay)
    if GATE == 2:
        tl.store(totals + row * K + k, log_decay, mask=k < K)


@triton.jit
def _total_of(g, totals, row, length, h, H, k, K, mask, GATE: tl.constexpr):
    if GATE == 0:
        return tl.exp(tl.load(g + h) * length.to(tl.float32))
    elif GATE == 1:
        return tl.exp(tl.load(totals + row * H + h))
    else:
        return tl.exp(tl.load(totals + (row * H + h) * K + k, mask=mask, other=0.0))


@triton.jit(do_not_specialize=["chunk_size"])
def decay_scan(
    states_RHKV,
    totals,
    g,
    edge_NHKV,
    starts_RHKV,
    out_NHKV,
    pieces,
    chunk_size,
    GATE: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_EDGE: tl.constexpr,
    BLOCK: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
):
    """State entering every chunk and leaving the piece; REVERSE: the gradients, from the end."""
    piece = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    e = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    mask = e < K * V
    k = e // V
    size = H * K * V
    first = tl.load(pieces + piece * 2).to(tl.int64)
    length = tl.load(pieces + piece * 2 + 1)
    count = tl.cdiv(length, chunk_size)
    at = h * K * V + e
    carry = tl.zeros([BLOCK], tl.float32)
    if HAS_EDGE:
        carry = tl.load(edge_NHKV + piece * size + at, mask=mask, other=0.0)
    # Four loads are in flight before the first is needed: the chain itself is only arithmetic.
    for n in range(0, count, 4):
        c0 = count - 1 - n if REVERSE else n
        step = -1 if REVERSE else 1
        c1, c2, c3 = c0 + step, c0 + 2 * step, c0 + 3 * step
        m1, m2, m3 = mask & (n + 1 < count), mask & (n + 2 < count), mask & (n + 3 < count)
        r0, r1, r2, r3 = first + c0, first + c1, first + c2, first + c3
        x0 = tl.load(states_RHKV + r0 * size + at, mask=mask, other=0.0)
        x1 = tl.load(states_RHKV + r1 * size + at, mask=m1, other=0.0)
        x2 = tl.load(states_RHKV + r2 * size + at, mask=m2, other=0.0)
        x3 = tl.load(states_RHKV + r3 * size + at, mask=m3, other=0.0)
        # Rows past the last chunk are read nowhere: their decay is that of a chunk in range.
        s1 = tl.where(n + 1 < count, r1, r0)
        s2 = tl.where(n + 2 < count, r2, r0)
        s3 = tl.where(n + 3 < count, r3, r0)
        t0 = tl.minimum(tl.maximum(length - c0 * chunk_size, 0), chunk_size)
        t1 = tl.minimum(tl.maximum(length - c1 * chunk_size, 0), chunk_size)
        t2 = tl.minimum(tl.maximum(length - c2 * chunk_size, 0), chunk_size)
        t3 = tl.minimum(tl.maximum(length - c3 * chunk_size, 0), chunk_size)
        a0 = _total_of(g, totals, r0, t0, h, H, k, K, mask, GATE)
        a1 = tl.where(m1, _total_of(g, totals, s1, t1, h, H, k, K, mask, GATE), 1.0)
        a2 = tl.where(m2, _total_of(g, totals, s2, t2, h, H, k, K, mask, GATE), 1.0)
        a3 = tl.where(m3, _total_of(g, totals, s3, t3, h, H, k, K, mask, GATE), 1.0)
        y1 = a0 * carry + x0
        y2 = a1 * y1 + x1
        y3 = a2 * y2 + x2
        tl.store(starts_RHKV + r0 * size + at, carry.to(starts_RHKV.dtype.element_ty), mask=mask)
        tl.store(starts_RHKV + r1 * size + at, y1.to(starts_RHKV.dtype.element_ty), mask=m1)
        tl.store(starts_RHKV + r2 * size + at, y2.to(starts_RHKV.dtype.element_ty), mask=m2)
        tl.store(starts_RHKV + r3 * size + at, y3.to(starts_RHKV.dtype.element_ty), mask=m3)
        carry = a3 * y3 + x3
    tl.store(out_NHKV + piece * size + at, carry, mask=mask)


@triton.jit(do_not_specialize=["scale"])
def decay_outputs(
    q_THK,
    k_THK,
    v_THV,
    g,
    starts_RHKV,
    out_THV,
    chunks,
    scale,
    GATE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    WHOLE_K: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
):
    """Outputs of a chunk: what its tokens read from the running state and from their tile."""
    parts: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    chunk = tl.program_id(0) // parts
    h = tl.program_id(1)
    start = tl.load(chunks + chunk * 3)
    length = tl.load(chunks + chunk * 3 + 1) - start
    row = tl.load(chunks + chunk * 3 + 2).to(tl.int64) * H + h
    k = tl.arange(0, WHOLE_K)
    v = (tl.program_id(0) % parts) * BLOCK_V + tl.arange(0, BLOCK_V)
    state_KV = _load_state(starts_RHKV + row * (K * V), k, v, K, V, False).to(tl.float32)
    _walk(
        q_THK, k_THK, v_THV, g, out_THV, None, None, state_KV, start.to(tl.int64), length, h,
        k, v, scale, GATE, False, BLOCK_T, H, K, V,
    )  # fmt: skip


@triton.jit(do_not_specialize=["scale", "T"])
def decay_gradients(
    q_THK,
    k_THK,
    v_THV,
    g,
    dout_THV,
    starts_RHKV,
    ends_RHKV,
    dq_THK,
    dk_THK,
    dv_THV,
    qdq,
    kdk,
    at_start_JHK,
    at_stop_JHK,
    chunks,
    T,
    scale,
    GATE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    WHOLE_K: tl.constexpr,
    WHOLE_V: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
):
    """Gradients of a chunk: a program makes BLOCK_K columns of dq or of dk, or BLOCK_V of dv.

    For a scalar gate `at_start_JHK` and `at_stop_JHK` get the product of the state and its gradient
    at the edges of each chunk.
    """
    tiles_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    parts: tl.constexpr = 2 * tiles_k + ((V + BLOCK_V - 1) // BLOCK_V)
    chunk = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    h = tl.program_id(1)
    start = tl.load(chunks + chunk * 3).to(tl.int64)
    length = tl.load(chunks + chunk * 3 + 1) - tl.load(chunks + chunk * 3)
    row = tl.load(chunks + chunk * 3 + 2).to(tl.int64) * H + h
    starts_RHKV, ends_RHKV = starts_RHKV + row * (K * V), ends_RHKV + row * (K * V)
    tile = part % tiles_k
    k_N = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    v_W = tl.arange(0, WHOLE_V)
    if GATE == 1:
        at = (tile.to(tl.int64) * T + start) * H + h
        qdq, kdk = qdq + at, kdk + at
        at_start_JHK += (chunk.to(tl.int64) * H + h) * K
        at_stop_JHK += (chunk.to(tl.int64) * H + h) * K
    # Not a chain of else: shared memory of one branch would be kept apart from another's.
    if part < tiles_k:
        state_VK = _load_state(starts_RHKV, k_N, v_W, K, V, True).to(tl.float32)
        leaving_VK = _walk(
            dout_THV, v_THV, k_THK, g, dq_THK, q_THK, qdq, state_VK, start, length, h,
            v_W, k_N, scale, GATE, False, BLOCK_T, H, V, K,
        )  # fmt: skip
        if GATE == 1:
            edge_VK = leaving_VK * _load_state(ends_RHKV, k_N, v_W, K, V, True)
            tl.store(at_stop_JHK + k_N, tl.sum(edge_VK, 0), mask=k_N < K)
    if (part >= tiles_k) & (part < 2 * tiles_k):
        state_VK = _load_state(ends_RHKV, k_N, v_W, K, V, True).to(tl.float32)
        entering_VK = _walk(
            v_THV, dout_THV, q_THK, g, dk_THK, k_THK, kdk, state_VK, start, length, h,
            v_W, k_N, scale, GATE, True, BLOCK_T, H, V, K,
        )  # fmt: skip
        if GATE == 1:
            edge_VK = entering_VK * _load_state(starts_RHKV, k_N, v_W, K, V, True)
            tl.store(at_start_JHK + k_N, tl.sum(edge_VK, 0), mask=k_N < K)
    if part >= 2 * tiles_k:
        k_W = tl.arange(0, WHOLE_K)
        v_N = (part - 2 * tiles_k) * BLOCK_V + tl.arange(0, BLOCK_V)
        state_KV = _load_state(ends_RHKV, k_W, v_N, K, V, False).to(tl.float32)
        _walk(
            k_THK, q_THK, dout_THV, g, dv_THV, None, None, state_KV, start, length, h,
            k_W, v_N, scale, GATE, True, BLOCK_T, H, K, V,
        )  # fmt: skip
