"""Running log-sum-exp: of the tokens so far, and the shares that the past and a token have in it.

`L_t = log sum_{j <= t} exp(x_j)` within a document. Weighted means of the past obey
`W_t = exp(kept_t) W_{t-1} + exp(added_t) v_t` with `kept_t = L_{t-1} - L_t` and
`added_t = x_t - L_t`, which are never positive: decay attention, and nothing overflows. Tokens are
scanned by doubling in slabs, in fp64 whatever the input, and each result is rounded once. Two
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
    """Running log-sum-exps, and logs of the shares of earlier tokens and of the token itself.

    A first token has no earlier ones: `kept` is 0 there, as a state that is zero needs no decay.
    """

    total: Tensor
    kept: Tensor
    added: Tensor


def running_log_sum_exp_reference(
    x: Tensor, initial: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> LogSumExp:
    """The definition, token by token; differentiable by autograd."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    x_MR = wide.reshape(x.shape[0] * x.shape[1], -1)
    cuts, totals, kept = piece_cuts(*x.shape[:2], cu_seqlens), [], []
    for piece, (start, stop) in enumerate(zip(cuts, cuts[1:])):
        seen_MR, first = x_MR[start:stop], 1
        if initial is not None:
            before_1R = initial[piece].reshape(1, -1).to(wide.dtype)
            seen_MR, first = torch.cat((before_1R, seen_MR)), 2
        own = [seen_MR[: first + t].logsumexp(0) for t in range(stop - start)]
        before = [torch.zeros_like(own[0])] if first == 1 else [seen_MR[0] - own[0]]
        totals += own
        kept += before + [a - b for a, b in zip(own, own[1:])]
    total_MR = torch.stack(totals)
    results = (total_MR, torch.stack(kept), x_MR - total_MR)
    return LogSumExp(*(y.view(x.shape) for y in results))


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
    return LogSumExp(
        *(y.view(x.shape) for y in torch.ops.longctx.running_log_sum_exp(x_MR, initial, cuts))
    )


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
    """Tokens `start..stop`; `firsts` begin a piece each, from `piece` on, within the slab."""

    start: int
    stop: int
    firsts: tuple[int, ...]
    piece: int
    continues: bool
    """Whether its first token goes on with a piece."""
    longest: int
    """Most tokens in a row of one piece."""


@lru_cache(maxsize=64)
def _slabs(cuts: tuple[int, ...], tokens: int) -> tuple[_Slab, ...]:
    slabs, piece = [], 0
    for start in range(0, cuts[-1], tokens):
        stop, begins = min(start + tokens, cuts[-1]), piece
        while piece + 1 < len(cuts) and cuts[piece] < stop:
            piece += 1
        firsts = tuple(cut - start for cut in cuts[begins:piece])
        edges = sorted({0, *firsts, stop - start})
        longest = max(b - a for a, b in zip(edges, edges[1:]))
        continues = not firsts or firsts[0] > 0
        slabs.append(_Slab(start, stop, firsts, begins, continues, longest))
    return tuple(slabs)


def _slabs_of(x_MR: Tensor, cuts_N: Tensor) -> tuple[_Slab, ...]:
    elements = SLAB_ELEMENTS.get(x_MR.device.type, SLAB_ELEMENTS["cuda"])
    return _slabs(piece_cuts(1, x_MR.shape[0], cuts_N), max(1, elements // x_MR.shape[1]))


def _running_max(x_MR: Tensor, is_first_M1: Tensor, longest: int) -> Tensor:
    """Of each piece; `is_first` marks where pieces begin."""
    best, is_over, step = x_MR.clone(), is_first_M1, 1
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


def _earlier(initial: Tensor | None, slab: _Slab, like: Tensor) -> Tensor:
    """What the pieces that begin in a slab have behind them."""
    if initial is None:
        return like.new_full((len(slab.firsts), like.shape[1]), -torch.inf)
    return initial[slab.piece : slab.piece + len(slab.firsts)].to(like.dtype)


@torch.library.custom_op("longctx::running_log_sum_exp", mutates_args=())
def _forward(
    x_MR: Tensor, initial_NR: Tensor | None, cuts_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    results = tuple(torch.empty_like(x_MR, memory_format=torch.contiguous_format) for _ in range(3))
    carried_1R = x_MR.new_empty(0, x_MR.shape[1], dtype=torch.float64)
    for slab in _slabs_of(x_MR, cuts_N):
        x = x_MR[slab.start : slab.stop].double()
        firsts, before = slab.firsts, _earlier(initial_NR, slab, x)
        if slab.continues:
            firsts, before = (0, *firsts), torch.cat((carried_1R, before))
        at = torch.tensor(firsts, device=x.device)
        is_first = torch.zeros(len(x), 1, dtype=torch.bool, device=x.device).index_fill_(0, at, 1)
        from_first = x.index_copy(0, at, torch.logaddexp(x[at], before))
        scale = _running_max(from_first, is_first, slab.longest)
        kept = torch.cat((scale[:1], scale[:-1])).sub_(scale).exp_().masked_fill_(is_first, 0)
        total = _recurrence(kept, (from_first - scale).exp_(), slab.longest).log_().add_(scale)
        carried_1R = total[-1:]
        earlier = torch.cat((total[:1], total[:-1])).index_copy_(0, at, before)
        log_kept = (earlier - total).masked_fill_(earlier == -torch.inf, 0)
        # Rounding may have put a sum an ulp below one of its parts.
        parts = total, log_kept.clamp_(max=0), (x - total).clamp_(max=0)
        for result, part in zip(results, parts):
            result[slab.start : slab.stop] = part
    return results


@_forward.register_fake
def _(x_MR, initial_NR, cuts_N):  # noqa: ARG001
    return tuple(x_MR.new_empty(x_MR.shape) for _ in range(3))


@torch.library.custom_op("longctx::running_log_sum_exp_backward", mutates_args=())
def _backward(
    dtotal_MR: Tensor | None,
    dkept_MR: Tensor | None,
    dadded_MR: Tensor | None,
    kept_MR: Tensor,
    added_MR: Tensor,
    initial_NR: Tensor | None,
    cuts_N: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of what was there initially (or nothing).

    With D_t that of L_t by all ways, `dx_j = exp(x_j - L_j) R_j` and
    `R_j = D_j + exp(L_j - L_{j+1}) R_{j+1}` from the right.
    """
    dx_MR = torch.empty_like(kept_MR)
    dinitial_NR = kept_MR.new_zeros(0) if initial_NR is None else torch.zeros_like(initial_NR)
    # What the tokens right of a slab give to its last one: of L there, and of their `kept`.
    arriving_1R = kept_MR.new_zeros(1, kept_MR.shape[1], dtype=torch.float64)
    for slab in reversed(_slabs_of(kept_MR, cuts_N)):
        rows = slice(slab.start, slab.stop)
        kept, added = kept_MR[rows].double(), added_MR[rows].double()
        dtotal, dkept, dadded = (
            torch.zeros_like(kept) if d is None else d[rows].double()
            for d in (dtotal_MR, dkept_MR, dadded_MR)
        )
        at = torch.tensor(slab.firsts, device=kept.device, dtype=torch.long)
        alone = _earlier(initial_NR, slab, kept) == -torch.inf
        dkept = dkept.index_copy(0, at, dkept[at].masked_fill(alone, 0))
        # exp(kept) hands R to the token before; a first token hands it to what was there initially.
        share = kept.exp()
        share_first = share[at].masked_fill_(alone, 0)
        share, given = share.index_fill_(0, at, 0), dkept.index_fill(0, at, 0)
        d = dtotal - dkept - dadded
        d[:-1] += given[1:]
        d[-1:] += arriving_1R
        later = torch.cat((share[1:], torch.zeros_like(share[:1]))).flip(0)
        r = _recurrence(later, d.flip(0), slab.longest).flip(0)
        arriving_1R = share[:1] * r[:1] + given[:1]
        dx_MR[rows] = added.exp().mul_(r).add_(dadded)
        if initial_NR is not None:
            dinitial = share_first * r[at] + dkept[at]
            dinitial_NR[slab.piece : slab.piece + len(slab.firsts)] = dinitial
    return dx_MR, dinitial_NR


@_backward.register_fake
def _(dtotal_MR, dkept_MR, dadded_MR, kept_MR, added_MR, initial_NR, cuts_N):  # noqa: ARG001
    dinitial_NR = kept_MR.new_empty(0) if initial_NR is None else torch.empty_like(initial_NR)
    return kept_MR.new_empty(kept_MR.shape), dinitial_NR


def _keep(ctx, inputs, output) -> None:
    _, initial_NR, cuts_N = inputs
    _, kept_MR, added_MR = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(kept_MR, added_MR, initial_NR, cuts_N)


def _differentiate(ctx, dtotal, dkept, dadded):
    saved = ctx.saved_tensors  # may be unpacked once only
    dx, dinitial = torch.ops.longctx.running_log_sum_exp_backward(dtotal, dkept, dadded, *saved)
    return dx, None if saved[2] is None else dinitial, None


_forward.register_autograd(_differentiate, setup_context=_keep)
