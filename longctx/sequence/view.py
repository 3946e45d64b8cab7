"""SequenceView: all that a mixer may know about where its tokens come from.

A mixer is written once against this interface. On one process the view holds whole documents;
other implementations spread a sequence over ranks and answer the same calls with the same values.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple, Self

import torch
from longctx_kernels.running import LogSumExp
from torch import Tensor

from longctx.sequence.affine import Prefix, Transitions, affine_prefix
from longctx.sequence.communicator import Communicator
from longctx.sequence.halo import Halo, HaloPlan
from longctx.sequence.ledger import Label
from longctx.sequence.plan import Plan
from longctx.sequence.randomness import token_keys, uniform
from longctx.sequence.verbs import (
    AFFINE,
    DENSE_AFFINE,
    Gather,
    Monoid,
    Reduce,
    Wire,
    handoff,
    prefix,
    stream,
    top_k,
)


def one_row(x_BTHD: Tensor) -> Tensor:
    """Rows laid end to end, as operators with `cu_seqlens` want them."""
    return x_BTHD.flatten(0, 1)[None]


PURPOSES = ("mixer dropout", "mlp dropout", "router")


class Persistent(NamedTuple):
    """Keys and values of no token."""

    k_NJK: Tensor
    v_NJV: Tensor

    def before(self, k_MJK: Tensor, v_MJV: Tensor) -> tuple[Tensor, Tensor]:
        """These and those of tokens."""
        k = torch.cat((_with_own_gradient(self.k_NJK).to(k_MJK.dtype), k_MJK))
        return k, torch.cat((_with_own_gradient(self.v_NJV).to(v_MJV.dtype), v_MJV))


def _with_own_gradient(x: Tensor) -> Tensor:
    """The same; its gradient is no view of that of many tokens, which it would keep alive."""
    x = x.view_as(x)
    if x.requires_grad:
        x.register_hook(torch.clone)
    return x


class SequenceView(ABC):
    """Tokens `[B, T]` of this process: the segments of `plan`, side by side in every row.

    The verbs are blocking and differentiable. All ranks must call them in the same order, and what
    a verb returns must reach the loss, so that all take part in its backward pass. Elements and
    states of segments are `[S, B, ...]`; a document that ends inside a segment adds nothing.
    """

    plan: Plan
    """Which positions lie here, and where documents start in every row."""
    positions_BT: Tensor
    """Position of each token within its document."""
    token_ids_BT: Tensor
    """Position of each token within its whole sequence."""
    keys_BT: Tensor | None = None
    """What random numbers of each token depend on."""
    layer: int = 0
    shelf: list[Tensor] | None = None
    """Keys and values of the last attention layer that has its own, for later ones to reuse."""

    def at(self, layer: int) -> Self:
        """The same view, named for what a layer exchanges and draws."""
        view = copy.copy(self)
        view.layer = layer
        return view

    def with_shelf(self, left: tuple[Tensor, ...] = ()) -> Self:
        """The same view for one pass through layers of which some reuse what others have left."""
        view = copy.copy(self)
        view.shelf = list(left)
        return view

    def left_by_attention(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the last attention layer that has its own."""
        if not self.shelf:
            raise ValueError("a layer reuses keys and values, and none before it has left any")
        k_BTJK, v_BTJV = self.shelf
        return k_BTJK, v_BTJV

    def keyed(self, seed: int, step: int, sequence_ids: tuple[int, ...]) -> Self:
        """The same view with random numbers of its own for this step."""
        view = copy.copy(self)
        view.keys_BT = token_keys(seed, step, sequence_ids, self.token_ids_BT)
        return view

    def uniform(self, purpose: str, width: int) -> Tensor:
        """Random numbers in [0, 1) `[B, T, width]` that do not depend on how tokens are split."""
        if self.keys_BT is None:
            raise ValueError("this view has no random numbers; make one with keyed()")
        return uniform(self.keys_BT, self.layer, PURPOSES.index(purpose), width)

    @torch.compiler.disable
    def prefix(
        self, elements: tuple[Tensor, ...], monoid: Monoid, rightwards: bool = True
    ) -> tuple[Tensor, ...]:
        """What enters each segment: the elements of its document before it, joined in order.

        AFFINE elements are (added `[S, B, H, K, V]`, log decay `[S, B, H, K or 1, 1]`),
        DENSE_AFFINE ones (added, matrix `[S, B, H, K, K]`).
        """
        wire = self.wire("prefix")
        if monoid not in (AFFINE, DENSE_AFFINE):
            return prefix(elements, monoid, wire, rightwards)
        added, factors = elements[0], elements[1].exp() if monoid is AFFINE else elements[1]
        make, label = self._make_prefix, wire.label
        return (affine_prefix(added, factors, self.plan, make, label, rightwards),)

    @torch.compiler.disable
    def stream(self, x_BT: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(rank, its tokens) of every rank, own ones first; `plan.pieces_of` says what they are."""
        return stream(x_BT, self.wire("stream"), self._stream_transport)

    @torch.compiler.disable
    def gather(self, x_BT: Tensor) -> Tensor:
        """All tokens of every row, `[B, G, ...]`."""
        return Gather.apply(x_BT, self.wire("gather"))

    @torch.compiler.disable
    def halo(self, x_BT: Tensor, left: int, right: int = 0) -> list[Tensor]:
        """Each segment with `left` and `right` neighbours, zeros where the sequence has none."""
        wire, plan = self.wire("halo"), self.plan.once(HaloPlan, left, right)
        flat = Halo.apply(x_BT.flatten(0, 1), plan, wire.communicator, wire.label)
        sizes = [left + segment.length + right for segment in self.plan.segments]
        return list(flat.unflatten(0, (self.plan.rows, -1)).split(sizes, 1))

    @torch.compiler.disable
    def top_k(self, score_BT: Tensor, count: int) -> Tensor:
        """Positions of the best scores of each whole row, rising; earlier ones win ties."""
        return top_k(score_BT, count, self.wire("top_k"))

    @torch.compiler.disable
    def reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, on every rank."""
        wire = self.wire("reduce")
        return Reduce.apply(x, wire.communicator, wire.label)

    @torch.compiler.disable
    def handoff(
        self, initial: Tensor, work: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    ) -> list[Tensor]:
        """Segment after segment, `work(state, own index)` gives (output, next state)."""
        return handoff(initial, work, self.wire("handoff"))

    def reduce_mean(self, x_BTE: Tensor) -> Tensor:
        """Mean over all tokens of all sequences, on whichever rank they lie, in at least fp32."""
        wide = torch.promote_types(x_BTE.dtype, torch.float32)
        total = self.reduce(x_BTE.to(wide).sum((0, 1)))
        return total / (self.plan.rows * self.plan.placement.length)

    def wire(self, verb: str) -> Wire:
        return Wire(self.plan, self._group, Label(self.layer, verb))

    _group: Communicator
    _stream_transport: str

    @abstractmethod
    def _make_prefix(self, transitions: Transitions) -> Prefix: ...

    @abstractmethod
    def decay_attention(
        self,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        log_decay: Tensor | None,
        backend: str = "auto",
    ) -> Tensor:
        """Linear attention over each document, its state decayed by `exp(log_decay)`, at most 1.

        The log decay is None, `[H]` (no gradient), `[B, T, H]` or `[B, T, H, K]`.
        """

    @abstractmethod
    def running_log_sum_exp(self, x_BTR: Tensor) -> LogSumExp:
        """Of the tokens of a document so far, `[B, T, ...]`, in at least fp32.

        With the logs of weights that decay attention makes means of the past of.
        """

    @abstractmethod
    def delta_attention(
        self,
        operands: tuple[Tensor, Tensor, Tensor, Tensor],
        log_decay: Tensor | None,
        log_momentum: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """The delta rule over each document, of q, k `[B, T, H, K]`, v `[B, T, H, V]`, beta.

        Beta is `[B, T, H]`; the log decay None, `[B, T, H]` or `[B, T, H, K]`, at most 0. With a
        log momentum, as scalar as the decay has to be, writes go on.
        """

    @abstractmethod
    def softmax_attention(
        self,
        q_BTHK: Tensor,
        k_BTJK: Tensor,
        v_BTJV: Tensor,
        window: int,
        backend: str = "auto",
        persistent: Persistent | None = None,
    ) -> Tensor:
        """Causal softmax attention over each document; `window` keys are seen, 0 sees all.

        With a window, every query sees the persistent keys too.
        """
