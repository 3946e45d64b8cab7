"""When each arriving item leaves the set of the `count` best ones of its group so far."""

import heapq

import torch
from torch import Tensor


def top_deaths(score_LN: Tensor, starts_N: Tensor, count: int, later_wins: bool = False) -> Tensor:
    """Arrival at which each item leaves the kept set, int64 [L, N]; without gradient.

    Items arrive in order in each lane; `starts_N` ([N] or [L, N], rising) is the index of the
    first item of an item's group, which is contiguous. Kept are the `count` best of the group so
    far; at a tie the earlier item wins, or the later one. An item that is never kept leaves at its
    own index, one that is kept to the end of its group at N. Items of score -inf are never kept.
    """
    _check(score_LN, starts_N, count)
    score_LN = score_LN.detach()
    L, N = score_LN.shape
    own_LN = torch.arange(N, device=score_LN.device).expand(L, N)
    starts_LN = starts_N.to(torch.int64).expand(L, N)
    # Groups stay where they are; inside each, the best comes first.
    order_LN = _ranked(score_LN, later_wins)
    by_group = starts_LN.gather(1, order_LN).argsort(dim=1, stable=True)
    order_LN = order_LN.gather(1, by_group)
    # Better than the item of rank p are those of ranks [start, p): the count-th of them to arrive
    # pushes it out.
    pushed_LN = _smallest_in_ranges(order_LN, starts_LN, own_LN, count - 1)
    pushed_LN = pushed_LN.masked_fill(own_LN - starts_LN < count, N)
    death_LN = torch.empty_like(order_LN).scatter_(1, order_LN, pushed_LN.maximum(order_LN))
    return torch.where(score_LN == -torch.inf, own_LN, death_LN)


def _check(score_LN: Tensor, starts_N: Tensor, count: int) -> None:
    if score_LN.dim() != 2:
        raise ValueError(f"score must be [lanes, items], got {tuple(score_LN.shape)}")
    if tuple(starts_N.shape) not in (tuple(score_LN.shape[1:]), tuple(score_LN.shape)):
        raise ValueError(
            f"starts must be [{score_LN.shape[1]}] or {list(score_LN.shape)}, got "
            f"{tuple(starts_N.shape)}"
        )
    if count < 1:
        raise ValueError(f"count {count}: must be at least 1")


def _ranked(score_LN: Tensor, later_wins: bool) -> Tensor:
    """Indices of items, best first."""
    if not later_wins:
        return score_LN.argsort(dim=1, descending=True, stable=True)
    return score_LN.shape[1] - 1 - score_LN.flip(1).argsort(dim=1, descending=True, stable=True)


def _smallest_in_ranges(x_LN: Tensor, start_LQ: Tensor, stop_LQ: Tensor, place: int) -> Tensor:
    """The value at `place`, counted from 0, of each sorted x[start:stop]; any if it is shorter.

    Values are below N. A wavelet matrix that is read while it is built: bit by bit from the
    highest, values with a 0 move before those with a 1, and each range follows its value.
    """
    N = x_LN.shape[1]
    place_LQ = torch.full_like(start_LQ, place)
    found_LQ = torch.zeros_like(start_LQ)
    for bit in reversed(range((N - 1).bit_length())):
        is_one_LN = x_LN >> bit & 1
        # ones_before[i] counts the ones among the first i values.
        ones_before = torch.nn.functional.pad(is_one_LN.cumsum(1), (1, 0))
        zeros_L1 = N - ones_before[:, -1:]
        ones_start, ones_stop = (ones_before.gather(1, x) for x in (start_LQ, stop_LQ))
        zeros_LQ = (stop_LQ - start_LQ) - (ones_stop - ones_start)
        goes_up = place_LQ >= zeros_LQ
        found_LQ = found_LQ + (goes_up << bit)
        place_LQ = torch.where(goes_up, place_LQ - zeros_LQ, place_LQ)
        start_LQ = torch.where(goes_up, zeros_L1 + ones_start, start_LQ - ones_start)
        stop_LQ = torch.where(goes_up, zeros_L1 + ones_stop, stop_LQ - ones_stop)
        index_LN = torch.arange(N, device=x_LN.device)
        ahead_LN = ones_before[:, :-1]
        target_LN = torch.where(is_one_LN > 0, zeros_L1 + ahead_LN, index_LN - ahead_LN)
        x_LN = torch.empty_like(x_LN).scatter_(1, target_LN, x_LN)
    return found_LQ


def top_deaths_reference(
    score_LN: Tensor, starts_N: Tensor, count: int, later_wins: bool = False
) -> Tensor:
    """The definition: a heap of the kept items of each lane, arrival by arrival."""
    L, N = score_LN.shape
    starts_LN = starts_N.expand(L, N).tolist()
    rows = []
    for scores, starts in zip(score_LN.tolist(), starts_LN):
        deaths = list(range(N))
        kept: list[tuple[float, int]] = []
        for i, score in enumerate(scores):
            if i == starts[i]:
                kept = []
            if score == float("-inf"):
                continue
            deaths[i] = N
            # The worst is on top: of the lowest score, the one that loses ties.
            heapq.heappush(kept, (score, i if later_wins else -i))
            if len(kept) > count:
                deaths[abs(heapq.heappop(kept)[1])] = i
        rows.append(deaths)
    return torch.tensor(rows, dtype=torch.int64).view(L, N)
