"""Decay attention in torch, by chunks in slabs that stay in cache; any device, fp64 too.

Tokens are flat: q, k `[T, H, K]`, v `[T, H, V]`. The rank of the gate says its kind: `[H]`
constant per head, `[T, H]` scalar or `[T, H, K]` diagonal per token; it is in the dtype of states.
G is its running sum within a piece. No exponential is ever taken of a positive number, and with
gates per token none of a difference of sums, in which strong decays would drown weak ones.
"""

import torch
from torch import Tensor

from longctx_kernels.pieces import Slab, plan_slabs

CHUNK = 64
"""A power of two."""
SLAB_ELEMENTS = 1 << 18


def state_pass(k, v, g, cuts, initial_state=None):
    """(nothing, state `[N, H, K, V]` after each piece); `output_pass` finds states by itself."""
    finals = []
    for n, (start, stop) in enumerate(zip(cuts, cuts[1:])):
        gate = gate_of(g, start, stop)
        final_HKV = final_state(k[start:stop], v[start:stop], gate)
        if initial_state is not None:
            final_HKV += total_decay(gate, stop - start) * initial_state[n].to(final_HKV.dtype)
        finals.append(final_HKV)
    return g.new_empty(0), torch.stack(finals)


def output_pass(q, k, v, g, scale, cuts, starts, initial_state=None):  # noqa: ARG001
    """Output `[T, H, V]`, and the states between slabs that `gradient_pass` wants."""
    return decay_forward(q, k, v, g, scale, cuts, initial_state)[:2]


def dstate_pass(q, dout, g, scale, cuts, dfinal=None):
    """(nothing, gradient of the state entering each piece)."""
    entering = []
    for n, (start, stop) in enumerate(zip(cuts, cuts[1:])):
        gate = gate_of(g, start, stop)
        dinitial_HKV = read_state_backward(dout[start:stop], q[start:stop], gate, scale)
        if dfinal is not None:
            dinitial_HKV += total_decay(gate, stop - start) * dfinal[n]
        entering.append(dinitial_HKV)
    return g.new_empty(0), torch.stack(entering)


def gradient_pass(
    q,
    k,
    v,
    g,
    scale,
    cuts,
    dout,
    saved,
    ends,  # noqa: ARG001
    initial_state=None,
    dfinal=None,
):
    """Gradients of q, k, v and G, without what `dfinal` adds to G at the end of a piece."""
    operands = (q, k, v, g)
    return decay_backward(dout, operands, scale, cuts, saved, initial_state, dfinal)[:4]


def add_at_ends(dG: Tensor, cuts: tuple[int, ...], x_NHK: Tensor) -> None:
    """Adds to the gradient of running sums what the ends of pieces give."""
    last = torch.tensor(cuts[1:], device=dG.device) - 1
    dG[last] += x_NHK.sum(-1) if dG.ndim == 2 else x_NHK


def log_decay_gradient(dG: Tensor, cuts: tuple[int, ...]) -> Tensor:
    """Gradient of the gate from that of its running sums within pieces."""
    dg = torch.empty_like(dG)
    for start, stop in zip(cuts, cuts[1:]):
        dg[start:stop] = dG[start:stop].flip(0).cumsum(0).flip(0)
    return dg


def saved_rows(tokens: int, pieces: int, row: int) -> int:
    """At least the number of slabs, whatever the cuts; `row` is H max(K, V)."""
    per_slab = max(1, max(CHUNK, SLAB_ELEMENTS // row) // CHUNK)
    return (tokens // CHUNK + pieces + per_slab - 1) // per_slab


def decay_forward(q, k, v, g, scale, cuts, initial_state=None, output_final_state=False):
    """Output, the states between slabs that `decay_backward` wants, and final states if asked."""
    slabs = slabs_of(cuts, q, v)
    out_THV = torch.empty_like(v, memory_format=torch.contiguous_format)
    state_HKV = g.new_zeros(*q.shape[1:], v.shape[-1])
    rows = saved_rows(q.shape[0], len(cuts) - 1, row_of(q, v))
    boundary_SHKV = state_HKV.new_empty(rows, *state_HKV.shape)
    boundary_SHKV[len(slabs) :] = 0
    final_NHKV = None
    if output_final_state:
        final_NHKV = state_HKV.new_empty(len(cuts) - 1, *state_HKV.shape)
    with torch.autocast(q.device.type, enabled=False):
        for i, slab in enumerate(slabs):
            boundary_SHKV[i] = state_HKV
            decay = decay_factors(slab, g)
            queries = slab.load(q, g.dtype) * scale
            keys, values = slab.load(k, g.dtype), slab.load(v, g.dtype)
            starts, state_HKV = _states(
                slab, decay, keys, values, state_HKV, initial_state, final_NHKV
            )
            out = decay.scores(queries, keys) @ values
            out.add_((queries * decay.since_start) @ starts)
            slab.store(out_THV, out.to(out_THV.dtype))
    return out_THV, boundary_SHKV, final_NHKV


def decay_backward(
    dout_THV, operands, scale, cuts, boundary_SHKV, initial_state=None, dfinal_NHKV=None
):
    """Gradients of q, k, v, G and the initial states, slab after slab from the right."""
    q_THK, k_THK, v_THV, g = operands
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in operands[:3]]
    dG = None if g.ndim == 1 else torch.empty_like(g, memory_format=torch.contiguous_format)
    dinitial = None if initial_state is None else torch.empty_like(initial_state)
    dstate_HKV = torch.zeros_like(boundary_SHKV[0])
    slabs = slabs_of(cuts, q_THK, v_THV)
    with torch.autocast(q_THK.device.type, enabled=False):
        for i, slab in reversed(list(enumerate(slabs))):
            decay = decay_factors(slab, g)
            q = slab.load(q_THK, g.dtype) * scale
            k, v, dout = (slab.load(x, g.dtype) for x in (k_THK, v_THV, dout_THV))
            starts, _ = _states(slab, decay, k, v, boundary_SHKV[i], initial_state, None)
            ends, dstate_HKV = _state_gradients(
                slab, decay, (q * decay.since_start).mT @ dout, dstate_HKV, dfinal_NHKV, dinitial
            )
            dq, dk = decay.score_gradients(dout @ v.mT, q, k)
            dq.add_((dout @ starts.mT).mul_(decay.since_start))
            dk.add_((v @ ends.mT).mul_(decay.until_end))
            dv = (decay.scores(q, k).mT @ dout).add_((k * decay.until_end) @ ends)
            if dG is not None:
                store_gate(slab, dG, q * dq - k * dk)
            # Pairs of a token with itself have no decay; in dG they would only cancel.
            own = (dout * v).sum(-1, keepdim=True)
            dq.addcmul_(own, k)
            dk.addcmul_(own, q)
            for x_THD, x in zip(grads, (dq.mul_(scale), dk, dv)):
                slab.store(x_THD, x.to(x_THD.dtype))
    return *grads, dG, dinitial


def store_gate(slab: Slab, dG: Tensor, x_NHCK: Tensor) -> None:
    """Writes the gradient of a gate's running sums, a scalar gate's summed over keys."""
    if dG.ndim == 2:
        dG, x_NHCK = dG[..., None], x_NHCK.sum(-1, keepdim=True)
    slab.store(dG, x_NHCK)


def gate_of(g: Tensor, start: int, stop: int) -> Tensor:
    """The gate of a range of tokens; a constant one is that of all."""
    return g if g.ndim == 1 else g[start:stop]


def final_state(k_THK: Tensor, v_THV: Tensor, g: Tensor) -> Tensor:
    """State `[H, K, V]` after one range of tokens that starts from zero."""
    return (_by_head(k_THK, g) * _until_end(k_THK, g)).mT @ _by_head(v_THV, g)


def final_state_backward(
    dstate_HKV: Tensor, k_THK: Tensor, v_THV: Tensor, g: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `final_state` with respect to k and v, in the dtype of states."""
    k_HTK, v_HTV, decay = _by_head(k_THK, g), _by_head(v_THV, g), _until_end(k_THK, g)
    dk_HTK = (v_HTV @ dstate_HKV.mT).mul_(decay)
    return dk_HTK.transpose(0, 1), ((k_HTK * decay) @ dstate_HKV).transpose(0, 1)


def read_state(q_THK: Tensor, state_HKV: Tensor, g: Tensor, scale: float) -> Tensor:
    """What one range of tokens reads from the state that precedes it: `[T, H, V]`."""
    q_HTK = _by_head(q_THK, g) * _since_start(q_THK, g).mul_(scale)
    return (q_HTK @ state_HKV).transpose(0, 1)


def read_state_backward(dout_THV: Tensor, q_THK: Tensor, g: Tensor, scale: float) -> Tensor:
    """Gradient of `read_state` with respect to the state."""
    q_HTK = _by_head(q_THK, g) * _since_start(q_THK, g).mul_(scale)
    return q_HTK.mT @ _by_head(dout_THV, g)


def read_query_gradient(dout_THV: Tensor, state_HKV: Tensor, g: Tensor, scale: float) -> Tensor:
    """Gradient of `read_state` with respect to q: `[T, H, K]`, in the dtype of states."""
    dq_HTK = _by_head(dout_THV, g) @ state_HKV.mT
    return dq_HTK.mul_(_since_start(dout_THV, g).mul_(scale)).transpose(0, 1)


def total_decay(g: Tensor, length: int) -> Tensor:
    """`[H, 1 or K, 1]`: how much of a state a range of `length` tokens keeps."""
    total = g * length if g.ndim == 1 else g.sum(0)
    return total.exp().view(total.shape[0], -1, 1)


def _by_head(x_THD: Tensor, g: Tensor) -> Tensor:
    return x_THD.to(g.dtype).transpose(0, 1)


def _since_start(x_THD: Tensor, g: Tensor) -> Tensor:
    if g.ndim > 1:
        return _running(g).exp_()
    steps_T = torch.arange(1, x_THD.shape[0] + 1, dtype=g.dtype, device=g.device)
    return (g[:, None] * steps_T).exp()[..., None]


def _until_end(x_THD: Tensor, g: Tensor) -> Tensor:
    if g.ndim > 1:
        # Sums from the end, not differences of sums from the start.
        later = _running(g[1:].flip(0)).exp_().flip(1)
        return torch.cat((later, later.new_ones(later.shape[0], 1, later.shape[2])), 1)
    steps_T = torch.arange(x_THD.shape[0] - 1, -1, -1, dtype=g.dtype, device=g.device)
    return (g[:, None] * steps_T).exp()[..., None]


def _running(g: Tensor) -> Tensor:
    """G of one range of tokens, `[H, T, 1 or K]`."""
    return (g if g.ndim == 3 else g[..., None]).cumsum(0).transpose(0, 1)


def row_of(q_THK: Tensor, v_THV: Tensor) -> int:
    """Elements of a token that say how many fit in a slab."""
    return q_THK.shape[1] * max(q_THK.shape[2], v_THV.shape[2])


def slabs_of(cuts: tuple[int, ...], q_THK: Tensor, v_THV: Tensor) -> tuple[Slab, ...]:
    """Tokens cut into pieces, chunks and slabs that stay in cache."""
    return plan_slabs(cuts, CHUNK, max(CHUNK, SLAB_ELEMENTS // row_of(q_THK, v_THV)))


class _Even:
    """Decay that is the same for all key dimensions: a factor for every pair of tokens.

    `since_start` and `until_end` are factors of tokens, `[.., H, C, 1]`.
    """

    between: Tensor
    since_start: Tensor
    until_end: Tensor

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Weights of the values within chunks, `[N, H, C, C]`."""
        return (q @ k.mT).mul_(self.between)

    def score_gradients(self, dscores: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of q and k by way of `scores`, without own pairs; overwrites `dscores`."""
        dscores.mul_(self.between)
        dscores.diagonal(dim1=2, dim2=3).zero_()
        return dscores @ k, dscores.mT @ q


class _Constant(_Even):
    """A constant gate: factors of all chunks at once."""

    def __init__(self, slab: Slab, g_H: Tensor):
        offset_C = torch.arange(slab.chunk_size, dtype=g_H.dtype, device=g_H.device)
        lengths = [float(chunk.length) for chunk in slab.chunks]
        length_N = torch.tensor([lengths[0]] if slab.is_full else lengths).to(g_H)
        # Masked before the exponential: that of what lies above the diagonal may overflow.
        distance_CC = (offset_C[:, None] - offset_C).clamp(min=0)
        self.between = (g_H[:, None, None] * distance_CC).exp().tril_()
        self.since_start = (g_H[:, None] * (offset_C + 1)).exp()[:, :, None]
        remaining_NC = (length_N[:, None] - 1 - offset_C).clamp(min=0)
        self.until_end = (g_H[:, None] * remaining_NC[:, None, :]).exp()[..., None]
        self._whole = {n: (g_H * n).exp()[:, None, None] for n in set(lengths)}
        self._lengths = lengths

    def whole(self, index: int) -> Tensor:
        """Decay over a whole chunk, `[H, 1, 1]`."""
        return self._whole[self._lengths[index]]


class _Doubling:
    """Factors of a gate per token, of blocks of 2, 4 .. C rows, each from those of half its size.

    `levels` has for each size what the rows of every block's second half keep since its middle,
    and those of its first half until there, `[N, H, blocks, half, 1 or K]`. A pair of rows on both
    sides of a middle keeps the product. They are products, so nothing cancels.
    """

    def __init__(self, slab: Slab, g: Tensor):
        since = slab.load(g if g.ndim == 3 else g[..., None], g.dtype).exp()
        until, self.levels = torch.ones_like(since), []
        while (half := 1 << len(self.levels)) < slab.chunk_size:
            first, second = since.unflatten(2, (-1, 2, half)).unbind(3)
            first_until, second_until = until.unflatten(2, (-1, 2, half)).unbind(3)
            self.levels.append((second, first_until))
            since = torch.stack((first, second * first[..., -1:, :]), 3).flatten(2, 4)
            until = torch.stack((first_until * second[..., -1:, :], second_until), 3).flatten(2, 4)
        self.since_start, self.until_end = since, until

    def whole(self, index: int) -> Tensor:
        """Decay over a whole chunk, `[H, 1 or K, 1]`."""
        return self.since_start[index, :, -1, :, None]


def _across(scores: Tensor, half: int) -> Tensor:
    """Of `[N, H, C, C]` the second halves' rows at the first halves' columns, of each block."""
    blocks = scores.unflatten(3, (-1, 2, half)).unflatten(2, (-1, 2, half))
    return blocks[:, :, :, 1, :, :, 0].diagonal(dim1=2, dim2=4).movedim(-1, 2)


class _Scalar(_Doubling, _Even):
    """A gate per token and head."""

    def __init__(self, slab: Slab, g_TH: Tensor):
        super().__init__(slab, g_TH)
        ones = self.since_start.new_ones(self.since_start.shape[:3])
        self.between = torch.diag_embed(ones)
        for since, until in self.levels:
            torch.mul(since, until.mT, out=_across(self.between, since.shape[3]))


class _Diagonal(_Doubling):
    """A gate per token, head and key dimension: factors go with the rows of q and of k."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Weights of the values within chunks, `[N, H, C, C]`."""
        scores = torch.diag_embed((q * k).sum(-1))
        for since, until in self.levels:
            second, first = _halves(q, k, since, until)
            _across(scores, since.shape[3]).copy_(second @ first.mT)
        return scores

    def score_gradients(self, dscores: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of q and k by way of `scores`, without own pairs."""
        dq, dk = torch.zeros_like(q), torch.zeros_like(k)
        for since, until in self.levels:
            half = since.shape[3]
            second, first = _halves(q, k, since, until)
            part = _across(dscores, half).contiguous()
            dq.unflatten(2, (-1, 2, half))[:, :, :, 1].addcmul_(part @ first, since)
            dk.unflatten(2, (-1, 2, half))[:, :, :, 0].addcmul_(part.mT @ second, until)
        return dq, dk


def _halves(q: Tensor, k: Tensor, since: Tensor, until: Tensor) -> tuple[Tensor, Tensor]:
    """Queries of second halves since the middle of their block, keys of first halves until it."""
    size = (-1, 2, since.shape[3])
    return (
        q.unflatten(2, size)[:, :, :, 1] * since,
        k.unflatten(2, size)[:, :, :, 0] * until,
    )


def decay_factors(slab: Slab, g: Tensor) -> _Constant | _Scalar | _Diagonal:
    """Decay factors of a slab's chunks."""
    return (_Constant, _Scalar, _Diagonal)[g.ndim - 1](slab, g)


def _states(slab, decay, k, v, state_HKV, initial_state, final_NHKV):
    """State entering each chunk, and the one leaving the slab; fills `final_NHKV` if given."""
    starts = (k * decay.until_end).mT @ v
    for i, chunk in enumerate(slab.chunks):
        if chunk.first:
            state_HKV = (
                torch.zeros_like(state_HKV)
                if initial_state is None
                else initial_state[chunk.piece].to(state_HKV.dtype)
            )
        leaving = torch.addcmul(starts[i], decay.whole(i), state_HKV)
        starts[i] = state_HKV
        state_HKV = leaving
        if chunk.last and final_NHKV is not None:
            final_NHKV[chunk.piece] = state_HKV
    return starts, state_HKV


def _state_gradients(slab, decay, dstarts, dstate_HKV, dfinal_NHKV, dinitial):
    """Gradient of the state leaving each chunk, and of the one entering the slab."""
    ends = dstarts
    for i, chunk in reversed(list(enumerate(slab.chunks))):
        if chunk.last:
            dstate_HKV = (
                torch.zeros_like(dstate_HKV) if dfinal_NHKV is None else dfinal_NHKV[chunk.piece]
            )
        entering = torch.addcmul(dstarts[i], decay.whole(i), dstate_HKV)
        ends[i] = dstate_HKV
        dstate_HKV = entering
        if chunk.first and dinitial is not None:
            dinitial[chunk.piece] = dstate_HKV
    return ends, dstate_HKV
