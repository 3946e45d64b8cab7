"""The view of one process that holds whole sequences, and of one that goes on with them later."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from longctx_kernels.decay_attention import by_kind, decay_attention
from longctx_kernels.delta_attention import delta_attention
from longctx_kernels.launch import backend_of
from longctx_kernels.lifetime_attention import Sight
from longctx_kernels.running import LogSumExp, running_log_sum_exp
from longctx_kernels.softmax_attention import softmax_attention
from torch import Tensor

from longctx.sequence.affine import GatheredPrefix, Prefix, Transitions
from longctx.sequence.communicator import Alone, Communicator
from longctx.sequence.placement import place
from longctx.sequence.plan import Documents, Plan, document_starts
from longctx.sequence.sights import attend_seen, with_persistent_keys
from longctx.sequence.verbs import AFFINE, DENSE_AFFINE, Monoid
from longctx.sequence.view import Persistent, SequenceView, one_row


class LocalView(SequenceView):
    """Whole sequences on one process: one segment a row.

    Laid end to end, token m of the batch has place m, and its document ends at place `ends_M[m]`.
    """

    _group: Communicator = Alone()
    _stream_transport = "allgather"

    def __init__(self, documents: Documents, length: int, device: torch.device | str = "cpu"):
        """Rows of `length` tokens in which documents start at these positions."""
        self.plan = Plan(place("contiguous", 1, length), 0, documents)
        self.cu_seqlens = torch.tensor(self.plan.cuts, dtype=torch.int32)
        ends_M = self.cu_seqlens[1:].repeat_interleave(self.cu_seqlens.diff())
        self.ends_M = ends_M.to(device)
        self.places_M = torch.arange(len(ends_M), dtype=torch.int32, device=device)
        self.positions_BT = self.plan.positions_BT.to(device)
        self.token_ids_BT = self.plan.token_ids_BT.to(device)

    @classmethod
    def whole(cls, batch: int, length: int, device: torch.device | str = "cpu") -> "LocalView":
        """Every row is one document."""
        return cls(((0,),) * batch, length, device)

    @classmethod
    def of_ids(cls, documents_BT: Tensor) -> "LocalView":
        """A token whose document's id differs from that of the token before starts anew."""
        return cls(document_starts(documents_BT), documents_BT.shape[1], documents_BT.device)

    def reduce(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x_BT: Tensor) -> Tensor:
        return x_BT

    def stream(self, x_BT: Tensor) -> Iterator[tuple[int, Tensor]]:
        return iter([(0, x_BT)])

    def halo(self, x_BT: Tensor, left: int, right: int = 0) -> list[Tensor]:
        return [F.pad(x_BT, (0, 0) * (x_BT.ndim - 2) + (left, right))]

    def prefix(
        self, elements: tuple[Tensor, ...], monoid: Monoid, rightwards: bool = True
    ) -> tuple[Tensor, ...]:
        if monoid in (AFFINE, DENSE_AFFINE):
            return (torch.zeros_like(elements[0]),)
        return monoid.identity(elements)

    @torch.compiler.disable
    def handoff(
        self, initial: Tensor, work: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    ) -> list[Tensor]:
        return [work(initial, 0)[0]]

    def decay_attention(
        self,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        log_decay: Tensor | None,
        backend: str = "auto",
    ) -> Tensor:
        q, k, v = one_row(q_BTHK), one_row(k_BTHK), one_row(v_BTHV)
        if log_decay is not None and log_decay.ndim > 1:
            log_decay = one_row(log_decay)
        g, g_gamma, gk = by_kind(log_decay)
        out, _ = decay_attention(
            q,
            k,
            v,
            g=g,
            g_gamma=g_gamma,
            gk=gk,
            scale=1.0,
            cu_seqlens=self.cu_seqlens,
            backend=backend,
        )
        return out.view_as(v_BTHV)

    def running_log_sum_exp(self, x_BTR: Tensor) -> LogSumExp:
        sums = running_log_sum_exp(one_row(x_BTR), cu_seqlens=self.cu_seqlens)
        return LogSumExp(*(y.view(x_BTR.shape) for y in sums))

    def delta_attention(
        self,
        operands: tuple[Tensor, Tensor, Tensor, Tensor],
        log_decay: Tensor | None,
        log_momentum: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        q, k, v, beta = (one_row(x) for x in operands)
        g, _, gk = by_kind(None if log_decay is None else one_row(log_decay))
        out, _ = delta_attention(
            q,
            k,
            v,
            beta,
            g=g,
            gk=gk,
            momentum=None if log_momentum is None else one_row(log_momentum),
            scale=1.0,
            cu_seqlens=self.cu_seqlens,
            backend=backend,
        )
        return out.view_as(operands[2])

    def softmax_attention(
        self,
        q_BTHK: Tensor,
        k_BTJK: Tensor,
        v_BTJV: Tensor,
        window: int,
        backend: str = "auto",
        persistent: Persistent | None = None,
    ) -> Tensor:
        q, k, v = (x.flatten(0, 1) for x in (q_BTHK, k_BTJK, v_BTJV))
        if persistent is not None:
            k, v = persistent.before(k, v)
        count = len(k) - len(q)
        if backend_of(q, backend) == "triton":
            ends_M = self.ends_M
            if window:
                ends_M = torch.minimum(ends_M, self.places_M + window)
            sight = with_persistent_keys(Sight(self.places_M, self.places_M, ends_M), count)
            out = attend_seen(q, k, v, sight)
        else:
            cuts, row = self.cu_seqlens, (q[None], k[None], v[None])
            out = softmax_attention(*row, window, cu_seqlens=cuts, persistent=count)
        return out.view(*q_BTHK.shape[:3], -1)

    def _make_prefix(self, transitions: Transitions) -> Prefix:
        return GatheredPrefix(self.plan, transitions, self._group)


class ContinuedView(LocalView):
    """The next tokens of sequences that began before: their left neighbours are remembered.

    `left` has what each halo gave up when the tokens before these were mixed, in order of calls;
    `kept` what this one leaves behind.
    """

    def __init__(self, view: LocalView, left: tuple[Tensor, ...]):
        self.__dict__ |= view.__dict__
        self._left, self.kept = iter(left), tuple[Tensor, ...]()

    def halo(self, x_BT: Tensor, left: int, right: int = 0) -> list[Tensor]:
        if right:
            raise ValueError("what comes next is not known: use a halo without a right side")
        before = next(self._left, None)
        if before is None:
            before = x_BT.new_zeros(x_BT.shape[0], left, *x_BT.shape[2:])
        wide = torch.cat((before, x_BT), 1)
        self.kept += (wide[:, wide.shape[1] - left :],)
        return [wide]
