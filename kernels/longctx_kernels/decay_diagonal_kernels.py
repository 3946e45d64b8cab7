"""Triton kernels of decay attention under diagonal gates `[T, H, K]`, which matrix units compute.

The rows of a tile are blocks of 2, 4 .. BLOCK_T, each cut into two halves. Of two tokens in
different halves of one block, the later has kept some since the middle and the earlier until
there: a pair decays by the product of both, so all pairs of one block size are one product of
matrices. These factors are products of those of smaller blocks: at most 1, so nothing overflows,
and nothing cancels.
"""

import triton
import triton.language as tl

from longctx_kernels.decay_kernels import _dot, _load, _load_state, _store


@triton.jit
def _row_of_blocks(x_CD, at, SIZE: tl.constexpr):
    """Row `at` of each block of SIZE rows, in all rows of the block."""
    C: tl.constexpr = x_CD.shape[0]
    D: tl.constexpr = x_CD.shape[1]
    blocks = tl.reshape(x_CD, [C // SIZE, SIZE, D])
    is_there = (tl.arange(0, SIZE) == at)[None, :, None]
    rows = tl.sum(tl.where(is_there, blocks, 0.0), 1)
    return tl.reshape(tl.broadcast_to(rows[:, None, :], [C // SIZE, SIZE, D]), [C, D])


@triton.jit
def _joined(since_CD, until_CD, HALF: tl.constexpr):
    """Decay since the start and until the end of blocks, from that of their halves."""
    is_second = ((tl.arange(0, since_CD.shape[0]) & HALF) != 0)[:, None]
    first = _row_of_blocks(since_CD, HALF - 1, 2 * HALF)
    second = _row_of_blocks(since_CD, 2 * HALF - 1, 2 * HALF)
    return tl.where(is_second, since_CD * first, since_CD), tl.where(
        is_second, until_CD, until_CD * second
    )


@triton.jit
def _across(since_CD, until_CD, HALF: tl.constexpr):
    """Decay between each row and the middle of its block."""
    is_second = ((tl.arange(0, since_CD.shape[0]) & HALF) != 0)[:, None]
    return tl.where(is_second, since_CD, until_CD)


@triton.jit
def _is_pair(i, HALF: tl.constexpr, REVERSE: tl.constexpr):
    """Mask `[C, C]` of pairs in both halves of a block; a row is the later or, in REVERSE, not.

    i numbers rows from any multiple of C. Where that varies in a loop, masks of all sizes are not
    computed before it, which would take most registers.
    """
    apart = i[:, None] ^ i[None, :]
    is_second = (i & HALF) != 0
    later = (is_second[None, :] if REVERSE else is_second[:, None]) & (apart < 2 * HALF)
    return later & (apart >= HALF)


@triton.jit
def _weighed(scores_CC, c_CK, since_CK, until_CK, REVERSE: tl.constexpr):
    """Sum over j of scores[i, j] c[j] decayed between i and j, and the decay of the tile."""
    i = tl.arange(0, c_CK.shape[0])
    own_C = tl.sum(tl.where(i[:, None] == i[None, :], scores_CC, 0.0), 1)
    out_CK = own_C[:, None] * c_CK
    scores_CC = scores_CC.to(c_CK.dtype)
    for level in tl.static_range(8):
        if (1 << level) < c_CK.shape[0]:
            factor_CK = _across(since_CK, until_CK, 1 << level)
            pairs_CC = tl.where(_is_pair(i, 1 << level, REVERSE), scores_CC, 0.0)
            c = (c_CK * factor_CK).to(c_CK.dtype)
            pairs_CK = _dot(pairs_CC.to(c_CK.dtype), c, tl.zeros(c_CK.shape, tl.float32))
            out_CK += factor_CK * pairs_CK
            since_CK, until_CK = _joined(since_CK, until_CK, 1 << level)
    return out_CK, since_CK, until_CK


@triton.jit
def _gates(g_THK, row, length, k, H: tl.constexpr, K: tl.constexpr):
    """What a block of one token keeps since its start and until its end."""
    since_CK = tl.exp(_load(g_THK, row, length, k, H, K))
    return since_CK, tl.full(since_CK.shape, 1.0, tl.float32)


@triton.jit
def _last_row(x_CD, C: tl.constexpr):
    return tl.sum(tl.where((tl.arange(0, C) == C - 1)[:, None], x_CD, 0.0), 0)


@triton.jit(do_not_specialize=["scale"])
def decay_scores_diagonal(
    q_THK,
    k_THK,
    g_THK,
    scores_THC,
    read_THK,
    written_THK,
    totals_IHK,
    chunks,
    scale,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
):
    """Of each tile the decayed scores, and all that has to do with the states around it.

    Queries are decayed since its start, keys until its end; a tile is one of TILES of a chunk, and
    keeps `totals_IHK` of a state. Scores and queries are scaled.
    """
    chunk = tl.program_id(0) // TILES
    h = tl.program_id(1)
    start = tl.load(chunks + chunk * 3)
    first = (tl.program_id(0) % TILES) * BLOCK_T
    length = tl.load(chunks + chunk * 3 + 1) - start - first
    head = (start + first).to(tl.int64) * H + h
    i = tl.arange(0, BLOCK_T)
    if length > 0:
        scores_CC = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
        for block in range(0, K, BLOCK_K):
            k = block + tl.arange(0, BLOCK_K)
            q_CK = _load(q_THK + head * K, i, length, k, H, K)
            k_CK = _load(k_THK + head * K, i, length, k, H, K)
            since_CK, until_CK = _gates(g_THK + head * K, i, length, k, H, K)
            added_CC = _dot(q_CK, tl.trans(k_CK), scores_CC)
            scores_CC = tl.where(i[:, None] == i[None, :], added_CC, scores_CC)
            for level in tl.static_range(8):
                if (1 << level) < BLOCK_T:
                    factor_CK = _across(since_CK, until_CK, 1 << level)
                    later_CK = (q_CK * factor_CK).to(q_CK.dtype)
                    earlier_CK = (k_CK * factor_CK).to(k_CK.dtype)
                    added_CC = _dot(later_CK, tl.trans(earlier_CK), scores_CC)
                    is_pair = _is_pair(i + block * BLOCK_T, 1 << level, False)
                    scores_CC = tl.where(is_pair, added_CC, scores_CC)
                    since_CK, until_CK = _joined(since_CK, until_CK, 1 << level)
            _store(read_THK + head * K, q_CK * (since_CK * scale), i, length, k, H, K)
            _store(written_THK + head * K, k_CK * until_CK, i, length, k, H, K)
            at = totals_IHK + (tl.program_id(0).to(tl.int64) * H + h) * K + k
            tl.store(at, _last_row(since_CK, BLOCK_T), mask=k < K)
        _store(scores_THC + head * BLOCK_T, scores_CC * scale, i, length, i, H, BLOCK_T)


@triton.jit
def decay_outputs_diagonal(
    a_THW,
    b_THW,
    c_THN,
    scores_THC,
    totals_IHK,
    states_RHKV,
    out_THN,
    edges_RHKV,
    products_JHN,
    chunks,
    REVERSE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    N: tl.constexpr,
):
    """out = a (state + b^T c over earlier tiles), plus scores times c of its own tile, of a chunk.

    o from (queries, keys, v) and, in REVERSE, dv from (keys, queries, dout), where W is K. Without
    scores, from transposed states, what dq and dk get from other tiles: from (dout, v, keys) and,
    in REVERSE, (v, dout, queries). Then `products_JHN` gets of each chunk the product of state and
    gradient where the walk ends.
    """
    KEYS_WIDE: tl.constexpr = scores_THC is not None
    parts: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    chunk = tl.program_id(0) // parts
    h = tl.program_id(1)
    start = tl.load(chunks + chunk * 3)
    length = tl.load(chunks + chunk * 3 + 1) - start
    row = tl.load(chunks + chunk * 3 + 2).to(tl.int64) * H + h
    head = start.to(tl.int64) * H + h
    a_THW, b_THW = a_THW + head * W, b_THW + head * W
    c_THN, out_THN = c_THN + head * N, out_THN + head * N
    i = tl.arange(0, BLOCK_T)
    w = tl.arange(0, WHOLE)
    n = (tl.program_id(0) % parts) * BLOCK_N + tl.arange(0, BLOCK_N)
    if KEYS_WIDE:
        scores_THC += head * BLOCK_T
        state_WN = _load_state(states_RHKV + row * (W * N), w, n, W, N, False).to(tl.float32)
    else:
        state_WN = _load_state(states_RHKV + row * (W * N), n, w, N, W, True).to(tl.float32)
    tiles = tl.cdiv(length, BLOCK_T)
    for step in range(tiles):
        tile = tiles - 1 - step if REVERSE else step
        t = tile * BLOCK_T + i
        a_CW = _load(a_THW, t, length, w, H, W)
        b_CW = _load(b_THW, t, length, w, H, W)
        c_CN = _load(c_THN, t, length, n, H, N)
        zero_CN = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        out_CN = _dot(a_CW, state_WN.to(a_CW.dtype), zero_CN)
        total = totals_IHK + (chunk.to(tl.int64) * TILES + tile) * (H * (W if KEYS_WIDE else N))
        if KEYS_WIDE:
            if REVERSE:
                at = scores_THC + t[None, :] * (H * BLOCK_T) + i[:, None]
                scores_CC = tl.load(at, mask=(t < length)[None, :], other=0.0)
            else:
                scores_CC = _load(scores_THC, t, length, i, H, BLOCK_T)
            out_CN = _dot(scores_CC, c_CN, out_CN)
            state_WN *= tl.load(total + h * W + w, mask=w < W, other=0.0)[:, None]
        else:
            state_WN *= tl.load(total + h * N + n, mask=n < N, other=0.0)[None, :]
        _store(out_THN, out_CN, t, length, n, H, N)
        state_WN = _dot(tl.trans(b_CW), c_CN, state_WN)
    if not KEYS_WIDE:
        state_WN *= _load_state(edges_RHKV + row * (W * N), n, w, N, W, True)
        at = products_JHN + (chunk.to(tl.int64) * H + h) * N + n
        tl.store(at, tl.sum(state_WN, 0), mask=n < N)


@triton.jit(do_not_specialize=["scale"])
def decay_gradients_diagonal(
    q_THK,
    k_THK,
    v_THV,
    g_THK,
    dout_THV,
    dq_states_THK,
    dk_states_THK,
    dq_THK,
    dk_THK,
    dG_THK,
    sums_IHK,
    chunks,
    scale,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_V: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
):
    """dq and dk from what they get from states and from their tile, and q dq - k dk of a tile.

    `sums_IHK` gets the sum of the latter over the tile.
    """
    tiles_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tile = tl.program_id(0) // tiles_k
    h = tl.program_id(1)
    start = tl.load(chunks + (tile // TILES) * 3)
    first = (tile % TILES) * BLOCK_T
    length = tl.load(chunks + (tile // TILES) * 3 + 1) - start - first
    head = (start + first).to(tl.int64) * H + h
    i = tl.arange(0, BLOCK_T)
    k = (tl.program_id(0) % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    v = tl.arange(0, WHOLE_V)
    if length > 0:
        dout_CV = _load(dout_THV + head * V, i, length, v, H, V)
        v_CV = _load(v_THV + head * V, i, length, v, H, V)
        q_CK = _load(q_THK + head * K, i, length, k, H, K)
        k_CK = _load(k_THK + head * K, i, length, k, H, K)
        zero_CC = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
        scores_CC = _dot(dout_CV, tl.trans(v_CV), zero_CC) * scale
        since_CK, until_CK = _gates(g_THK + head * K, i, length, k, H, K)
        out_CK, since_CK, until_CK = _weighed(scores_CC, k_CK, since_CK, until_CK, False)
        out_CK += since_CK * scale * _load(dq_states_THK + head * K, i, length, k, H, K)
        _store(dq_THK + head * K, out_CK, i, length, k, H, K)
        dG_CK = out_CK * q_CK
        # Again with a row for the earlier token, as no product is transposed; loaded again, gates
        # and factors take no registers in between.
        scores_CC = _dot(v_CV, tl.trans(dout_CV), zero_CC) * scale
        since_CK, until_CK = _gates(g_THK + head * K, i, length, k, H, K)
        out_CK, since_CK, until_CK = _weighed(scores_CC, q_CK, since_CK, until_CK, True)
        out_CK += until_CK * _load(dk_states_THK + head * K, i, length, k, H, K)
        _store(dk_THK + head * K, out_CK, i, length, k, H, K)
        dG_CK -= out_CK * k_CK
        _store(dG_THK + head * K, dG_CK, i, length, k, H, K)
        tl.store(sums_IHK + (tile.to(tl.int64) * H + h) * K + k, tl.sum(dG_CK, 0), mask=k < K)
