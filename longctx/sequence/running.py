"""Running log-sum-exps and sums over a sharded sequence, and over one that goes on later.

A log-sum-exp crosses a cut as one number a row: every segment exports that of its last document's
tokens, and what enters a segment is what its first piece has behind it.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from longctx_kernels.decay_attention import by_kind, decay_attention
from longctx_kernels.running import LogSumExp, running_log_sum_exp
from torch import Tensor

from longctx.sequence.plan import Plan
from longctx.sequence.verbs import Monoid, Wire, prefix

LOG_ADD = Monoid(
    lambda left, right: (torch.logaddexp(left[0], right[0]),),
    lambda like: (torch.full_like(like[0], -torch.inf),),
)
"""Elements are log-sum-exps. LOG_SUM_EXP with sums would send twice as much."""


def wide(x: Tensor) -> Tensor:
    """`x` in at least fp32, as logs of weights and what they are made of must be."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sharded_log_sum_exp(x_MR: Tensor, wire: Wire) -> LogSumExp:
    """Of the plan's local tokens, each document from wherever it began. Every rank takes part."""
    plan = wire.plan
    x_MR = wide(x_MR)
    leaving = [[x_MR[tokens].logsumexp(0) for tokens in rows] for rows in plan.once(_last_tokens)]
    leaving_SBR = torch.stack([torch.stack(rows) for rows in leaving])
    (entering_SBR,) = prefix((leaving_SBR,), LOG_ADD, wire)
    source_N, continues_N1 = plan.once(_sources, x_MR.device)
    behind_NR = torch.where(continues_N1, entering_SBR.flatten(0, 1)[source_N], -torch.inf)
    sums = running_log_sum_exp(x_MR[None], behind_NR, torch.tensor(plan.cuts))
    return LogSumExp(*(y[0] for y in sums))


def _last_tokens(plan: Plan) -> list[list[slice]]:
    """Of every segment and row the tokens of its last document."""
    last = [[slice(0)] * plan.rows for _ in plan.segments]
    for p in plan.pieces:
        last[p.segment][p.row] = slice(p.start, p.stop)
    return last


def _sources(plan: Plan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of every piece its place among segments and rows, and whether it goes on from there."""
    source = [p.segment * plan.rows + p.row for p in plan.pieces]
    continues = [p.document < p.position == plan.segments[p.segment].start for p in plan.pieces]
    return torch.tensor(source, device=device), torch.tensor(continues, device=device)[:, None]


class Runs(Protocol):
    """What running means and sums are made of: a view, or a sequence that goes on later."""

    def running_log_sum_exp(self, x_BTHR: Tensor) -> LogSumExp:
        """As that of a view."""
        ...

    def decay_attention(
        self,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        log_decay: Tensor | None,
        backend: str = "auto",
    ) -> Tensor:
        """As that of a view."""
        ...


class Resumed:
    """The next tokens of sequences: calls go on where the same calls before them ended.

    `memory` has what each call left behind, in order; `kept` what these leave.
    """

    def __init__(self, memory: tuple[Tensor, ...] | None):
        self._memory: Iterator[Tensor] = iter(memory or ())
        self.kept: tuple[Tensor, ...] = ()

    def running_log_sum_exp(self, x_BTHR: Tensor) -> LogSumExp:
        """Of these tokens and those before."""
        sums = running_log_sum_exp(x_BTHR, next(self._memory, None))
        self.kept += (sums.total[:, -1],)
        return sums

    def decay_attention(
        self,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        log_decay: Tensor | None,
        backend: str = "auto",
    ) -> Tensor:
        """From the state before."""
        g, g_gamma, gk = by_kind(log_decay)
        out_BTHV, state = decay_attention(
            q_BTHK,
            k_BTHK,
            v_BTHV,
            g=g,
            g_gamma=g_gamma,
            gk=gk,
            scale=1.0,
            initial_state=next(self._memory, None),
            output_final_state=True,
            backend=backend,
        )
        assert state is not None
        self.kept += (state,)
        return out_BTHV


def running_means(
    runs: Runs, log_weight_BTHR: Tensor, read_BTHR: Tensor, v_BTHV: Tensor, backend: str = "auto"
) -> Tensor:
    """Every row's mean of the values so far, weighted by exp(log_weight), and these by `read`."""
    sums = runs.running_log_sum_exp(log_weight_BTHR)
    read, own = (read_BTHR * (-sums.whole).exp()).type_as(v_BTHV), sums.own.exp().type_as(v_BTHV)
    return runs.decay_attention(read, own, v_BTHV, sums.decay, backend)
