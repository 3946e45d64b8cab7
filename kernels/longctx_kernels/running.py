"""Running log-sum-exp `L_t = log sum_{j <= t} exp(x_j)` within documents, for means of the past.

A mean `W_t = sum_j exp(x_j - L_t) v_j` is decay attention: at a scale s that follows L from below,
`exp(s_t - L_t) S_t` with `S_t = exp(s_{t-1} - s_t) S_{t-1} + exp(x_t - s_t) v_t`. Nothing
overflows, and s cancels, so that it has no gradient. It rises in whole steps: were it L itself,
S would be multiplied by a number just below 1 for every token, and these drift in fp32. Where a
piece begins s is that of what lies behind it, and where it ends L, so that pieces fit together.

Tokens are scanned by doubling in slabs, in fp64 whatever the input, and results rounded once. Two
custom ops, one forward and one backward.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from longctx_kernels.pieces import piece_cuts

SLAB_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 22}
"""Elements that are scanned at once: on a CPU they stay in cache, on a GPU launches must be few."""


class LogSumExp(NamedTuple):
    """Running log-sum-exps L, and logs of weights at a scale s.

    `whole` is L - s, within 0..1, `own` x - s, at most 1, and `decay` what s rose by since the
    token before, negative; it has no gradient.
    """

    total: Tensor
    whole: Tensor
    own: Tensor
    decay: Tensor


def running_log_sum_exp_reference(
    x: Tensor, initial: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The definition of `total`, token by token; differentiable by autograd."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    x_MR = wide.reshape(x.shape[0] * x.shape[1], -1)
    cuts, totals = piece_cuts(*x.shape[:2], cu_seqlens), []
    for piece, (start, stop) in enumerate(zip(cuts, cuts[1:])):
        for t in range(start, stop):
            seen_MR = x_MR[start : t + 1]
            if initial is not None:
                behind_1R = initial[piece].reshape(1, -1).to(wide.dtype)
                seen_MR = torch.cat((behind_1R, seen_MR))
            totals.append(seen_MR.logsumexp(0))
    return torch.stack(totals).view(x.shape)


def weighted_means_reference(
    log_weight_MHR: Tensor, k_MHR: Tensor, v_MHV: Tensor, cuts: tuple[int, ...]
) -> Tensor:
    """Means of k_j v_j^T over the visible tokens, weighted by softmax: `[M, H, R, V]`.

    For each token a softmax over itself and those before it in its document. `log_weight` may have
    one row for all of `k`. Products with earlier tokens are elementwise, so that counters of FLOPs
    see every token written once.
    """
    means = []
    for start, stop in zip(cuts, cuts[1:]):
        for t in range(start, stop):
            share_CHR = log_weight_MHR[start : t + 1].softmax(0)
            k_CHR1 = (share_CHR * k_MHR[start : t + 1])[..., None]
            earlier_HRV = (k_CHR1[:-1] * v_MHV[start:t, :, None]).sum(0)
            means.append(earlier_HRV + k_CHR1[-1] @ v_MHV[t, :, None])
    return torch.stack(means)


def running_log_sum_exp(
    x: Tensor, initial: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> LogSumExp:
    """The same at once, in at least fp32. `x` is `[B, T, ...]` and finite.

    `initial` `[N, ...]` is what pieces have behind them: the total of earlier tokens, or -inf.
    """
    _check(x, initial, cu_seqlens)
    B, T = x.shape[:2]
    dtype = torch.promote_types(x.dtype, torch.float32)
    cuts = torch.arange(B + 1) * T if cu_seqlens is None else cu_seqlens
    if initial is not None:
        initial = initial.to(dtype).reshape(initial.shape[0], -1)
    x_MR = x.to(dtype).reshape(B * T, -1)
    *results, decay = torch.ops.longctx.running_log_sum_exp(x_MR, initial, cuts)
    return LogSumExp(*(y.view(x.shape) for y in (*results, decay.detach())))


def _check(x: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None) -> None:
    if x.ndim < 2 or 0 in x.shape or not x.dtype.is_floating_point:
        got = f"{x.dtype} {tuple(x.shape)}"
        raise ValueError(f"x must be floats [B, T, ...] and hold at least one token, got {got}")
    pieces = x.shape[0]
    if cu_seqlens is not None:
        if cu_seqlens.ndim != 1 or cu_seqlens.dtype.is_floating_point:
            got = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
            raise ValueError(f"cu_seqlens must be a vector of ints, got {got}")
        if cu_seqlens.device.type != "cpu":
            raise ValueError("cu_seqlens must be on the CPU: reading it from the device would wait")
        if x.shape[0] != 1:
            raise ValueError(f"cu_seqlens needs B = 1 (flatten the batch), got B = {x.shape[0]}")
        pieces = cu_seqlens.shape[0] - 1
    if initial is not None and tuple(initial.shape) != (pieces, *x.shape[2:]):
        wanted, got = (pieces, *x.shape[2:]), tuple(initial.shape)
        raise ValueError(f"initial must be [N, ...] = {wanted}, got {got}")


class _Slab(NamedTuple):
    """Tokens `start..stop`; within it `firsts` begin pieces, from `piece` on, and `lasts` end some.

    `longest` is the most tokens in a row of one piece.
    """

    start: int
    stop: int
    firsts: tuple[int, ...]
    lasts: tuple[int, ...]
    piece: int
    longest: int


@lru_cache(maxsize=64)
def _slabs(cuts: tuple[int, ...], tokens: int) -> tuple[_Slab, ...]:
    slabs, piece = [], 0
    for start in range(0, cuts[-1], tokens):
        stop, begun = min(start + tokens, cuts[-1]), piece
        while cuts[piece] < stop:
            piece += 1
        firsts = tuple(cut - start for cut in cuts[begun:piece])
        lasts = tuple(cut - start - 1 for cut in cuts[begun : piece + 1] if start < cut <= stop)
        edges = sorted({0, *firsts, stop - start})
        longest = max(b - a for a, b in zip(edges, edges[1:]))
        slabs.append(_Slab(start, stop, firsts, lasts, begun, longest))
    return tuple(slabs)


def _slabs_of(x_MR: Tensor, cuts_N: Tensor) -> tuple[_Slab, ...]:
    elements = SLAB_ELEMENTS.get(x_MR.device.type, SLAB_ELEMENTS["cuda"])
    return _slabs(piece_cuts(1, x_MR.shape[0], cuts_N), max(1, elements // x_MR.shape[1]))


def _running_max(x_MR: Tensor, is_first_M1: Tensor, longest: int) -> Tensor:
    """Of each piece; `is_first` marks where pieces begin."""
    best, is_over, step = x_MR, is_first_M1, 1
    while step < longest:
        earlier = best[:-step].masked_fill(is_over[step:], -torch.inf)
        best = torch.cat((best[:step], torch.maximum(best[step:], earlier)))
        is_over = torch.cat((is_over[:step], is_over[step:] | is_over[:-step]))
        step *= 2
    return best


def _recurrence(kept_MR: Tensor, added_MR: Tensor, longest: int) -> Tensor:
    """`y_t = kept_t y_{t-1} + added_t` from 0; `kept` is 0 once in every `longest` tokens."""
    y, kept, step = added_MR, kept_MR, 1
    while step < longest:
        y = torch.cat((y[:step], torch.addcmul(y[step:], kept[step:], y[:-step])))
        kept = torch.cat((kept[:step], kept[step:] * kept[:-step]))
        step *= 2
    return y


def _behind(initial: Tensor | None, slab: _Slab, like: Tensor) -> Tensor:
    """What the pieces that begin in a slab have behind them."""
    if initial is None:
        return like.new_full((len(slab.firsts), like.shape[1]), -torch.inf)
    return initial[slab.piece : slab.piece + len(slab.firsts)].to(like.dtype)


def _shifted(x_MR: Tensor, first_1R: Tensor) -> Tensor:
    """Every token gets the row before its own."""
    return torch.cat((first_1R, x_MR[:-1]))


def _places(tokens: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.tensor(tokens, dtype=torch.long, device=like.device)


def _scan(x: Tensor, firsts: Tensor, behind: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Running log-sum-exps of a slab's pieces, and marks where they begin."""
    is_first = torch.zeros(len(x), 1, dtype=torch.bool, device=x.device).index_fill_(0, firsts, 1)
    x = x.index_copy(0, firsts, torch.logaddexp(x[firsts], behind))
    top = _running_max(x, is_first, longest)
    kept = _shifted(top, top[:1]).sub_(top).exp_().masked_fill_(is_first, 0)
    return _recurrence(kept, (x - top).exp_(), longest).log().add_(top), is_first


@torch.library.custom_op("longctx::running_log_sum_exp", mutates_args=())
def _forward(
    x_MR: Tensor, initial_NR: Tensor | None, cuts_N: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = tuple(torch.empty_like(x_MR, memory_format=torch.contiguous_format) for _ in range(4))
    total = scale = x_MR.new_empty(0, x_MR.shape[1], dtype=torch.float64)
    for slab in _slabs_of(x_MR, cuts_N):
        x = x_MR[slab.start : slab.stop].double()
        # A first token that goes on from the slab before has what was carried behind it.
        carried = int(0 not in slab.firsts)
        behind = torch.cat((total[-1:][:carried], _behind(initial_NR, slab, x)))
        firsts = _places((0,) * carried + slab.firsts, x)
        total, is_first = _scan(x, firsts, behind, slab.longest)
        anchor = torch.where(behind == -torch.inf, total[firsts], behind)
        anchor[:carried] = scale[-1:][:carried]
        anchor_MR = anchor[is_first[:, 0].cumsum(0) - 1]
        steps = (total - anchor_MR).floor_().clamp_(min=0)
        scale = _running_max(anchor_MR + steps, is_first, slab.longest)
        lasts = _places(slab.lasts, x)
        # As rounded as in the results: what goes on later begins at the scale that is known.
        scale = scale.index_copy(0, lasts, total[lasts].to(x_MR.dtype).double())
        decay = _shifted(scale, scale[:1]).index_copy_(0, firsts, anchor) - scale
        parts = total, total - scale, x - scale, decay.clamp_(max=0)
        for result, part in zip(results, parts):
            result[slab.start : slab.stop] = part
    return results


@_forward.register_fake
def _(x_MR, initial_NR, cuts_N):  # noqa: ARG001
    return tuple(x_MR.new_empty(x_MR.shape) for _ in range(4))


@torch.library.custom_op("longctx::running_log_sum_exp_backward", mutates_args=())
def _backward(
    dtotal_MR: Tensor | None,
    dwhole_MR: Tensor | None,
    down_MR: Tensor | None,
    whole_MR: Tensor,
    own_MR: Tensor,
    decay_MR: Tensor,
    initial_NR: Tensor | None,
    cuts_N: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of what was there initially (or nothing).

    With D_t the gradient of L_t, `dx_j = exp(x_j - L_j) R_j` and from the right
    `R_j = D_j + exp(L_j - L_{j+1}) R_{j+1}`.
    """
    dx_MR = torch.empty_like(whole_MR)
    dinitial_NR = whole_MR.new_zeros(0) if initial_NR is None else torch.zeros_like(initial_NR)
    arriving_1R = whole_MR.new_zeros(1, whole_MR.shape[1], dtype=torch.float64)
    for slab in reversed(_slabs_of(whole_MR, cuts_N)):
        rows = slice(slab.start, slab.stop)
        whole, own, decay = (y[rows].double() for y in (whole_MR, own_MR, decay_MR))
        dtotal, dwhole, down = (
            torch.zeros_like(whole) if d is None else d[rows].double()
            for d in (dtotal_MR, dwhole_MR, down_MR)
        )
        firsts = _places(slab.firsts, whole)
        # What lies behind a piece has the scale of its sum.
        before = _shifted(whole, whole_MR[max(0, slab.start - 1)][None].double())
        share = (decay + before.index_fill_(0, firsts, 0) - whole).exp_()
        share_first = share[firsts].masked_fill_(_behind(initial_NR, slab, whole) == -torch.inf, 0)
        share.index_fill_(0, firsts, 0)
        d = dtotal + dwhole
        d[-1:] += arriving_1R
        later = torch.cat((share[1:], torch.zeros_like(share[:1])))
        r = _recurrence(later.flip(0), d.flip(0), slab.longest).flip(0)
        arriving_1R = share[:1] * r[:1]
        dx_MR[rows] = (own - whole).exp_().mul_(r).add_(down)
        if initial_NR is not None:
            dinitial_NR[slab.piece : slab.piece + len(slab.firsts)] = share_first * r[firsts]
    return dx_MR, dinitial_NR


@_backward.register_fake
def _(dtotal_MR, dwhole_MR, down_MR, whole_MR, own_MR, decay_MR, initial_NR, cuts_N):  # noqa: ARG001
    dinitial_NR = whole_MR.new_empty(0) if initial_NR is None else torch.empty_like(initial_NR)
    return whole_MR.new_empty(whole_MR.shape), dinitial_NR


def _keep(ctx, inputs, output) -> None:
    _, initial_NR, cuts_N = inputs
    _, whole_MR, own_MR, decay_MR = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(whole_MR, own_MR, decay_MR, initial_NR, cuts_N)


def _differentiate(ctx, dtotal, dwhole, down, _):
    *saved, initial_NR, cuts_N = ctx.saved_tensors
    dx, dinitial = torch.ops.longctx.running_log_sum_exp_backward(
        dtotal, dwhole, down, *saved, initial_NR, cuts_N
    )
    return dx, None if initial_NR is None else dinitial, None


_forward.register_autograd(_differentiate, setup_context=_keep)
