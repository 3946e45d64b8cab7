"""The view of one rank among several: a part of every sequence of the batch."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from longctx_kernels.launch import backend_of
from longctx_kernels.running import LogSumExp
from longctx_kernels.softmax_attention import (
    Tile,
    attend_tiles,
    piece_tiles,
    with_persistent,
)
from torch import Tensor

from longctx.sequence.affine import ChainedPrefix, GatheredPrefix, Prefix, Transitions
from longctx.sequence.attention_core import Wires, sharded_softmax_attention
from longctx.sequence.communicator import Communicator
from longctx.sequence.decay_core import Exchange, sharded_decay_attention
from longctx.sequence.delta_core import sharded_delta_attention
from longctx.sequence.halo import Halo, HaloPlan
from longctx.sequence.heads import HeadTrade
from longctx.sequence.ledger import Label
from longctx.sequence.local import LocalView
from longctx.sequence.plan import Plan
from longctx.sequence.running import sharded_log_sum_exp
from longctx.sequence.sights import attend_seen, halo_sight, with_persistent_keys
from longctx.sequence.view import Persistent, SequenceView

SCAN_BLOCKS = 4


@dataclass(frozen=True)
class Transports:
    """How verbs move bytes."""

    prefix: Literal["allgather", "scan", "serial", "ulysses"] = "allgather"
    stream: Literal["allgather", "ring"] = "allgather"
    heads: int = 1
    """Ranks of a Ulysses group."""
    gather_heads: int = 0
    """Key heads gathered at once; 0 gathers all."""


@dataclass(frozen=True)
class Links:
    """The groups of one rank. Chains have one of their own, so that no order of calls can block."""

    sequence: Communicator
    chain: Communicator
    heads: Communicator
    """The Ulysses group: ranks j * heads .. (j + 1) * heads - 1."""
    ring: Communicator
    """Ranks with this one's place in their Ulysses groups."""


def window_tiles(plan: Plan, halo: HaloPlan, window: int) -> tuple[Tile, ...]:
    """Tiles of local queries against the keys that a halo brings together."""
    tiles: list[Tile] = []
    for piece in plan.pieces:
        start = plan.segments[piece.segment].start
        own_key = halo.offset(piece.row, piece.segment) + piece.position - start
        before = min(piece.position - piece.document, halo.left) if piece.position == start else 0
        tiles += piece_tiles(piece.start, piece.stop, own_key, before, window)
    return tuple(tiles)


def _joined(plan: Plan, groups: tuple[tuple[int, ...], ...], ring: int) -> Plan:
    """The plan of a batch when groups of ranks act as one."""
    return Plan(plan.placement.merged(groups), ring, plan.documents)


class ShardedView(SequenceView):
    """Written once for every placement: a Plan says what lies where.

    A compiler's graph ends where something is exchanged.
    """

    def __init__(self, plan: Plan, links: Links, transports: Transports, layer: int = 0):
        self.plan, self.links, self.transports, self.layer = plan, links, transports, layer
        self._group, self._stream_transport = links.sequence, transports.stream
        self.device: torch.device | str = "cpu"

    def to(self, device: torch.device | str) -> "ShardedView":
        """The view for tensors on `device`."""
        self.device = device
        return self

    @cached_property
    def positions_BT(self) -> Tensor:  # type: ignore[override]
        """Position of each token within its document."""
        return self.plan.positions_BT.to(self.device)

    @cached_property
    def token_ids_BT(self) -> Tensor:  # type: ignore[override]
        """Position of each token within its whole sequence."""
        return self.plan.token_ids_BT.to(self.device)

    def _label(self, verb: str) -> Label:
        return Label(self.layer, verb)

    @torch.compiler.disable
    def decay_attention(
        self,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        log_decay: Tensor | None,
        backend: str = "auto",
    ) -> Tensor:
        if self.transports.prefix == "ulysses":
            inner, trade = self._by_heads()
            q, k, v = (trade.gather_tokens(x) for x in (q_BTHK, k_BTHK, v_BTHV))
            if log_decay is not None and log_decay.ndim == 1:
                log_decay = trade.share(log_decay, 0)
            elif log_decay is not None:
                (log_decay,) = trade.gather_gates(log_decay)
            return trade.gather_heads(inner.decay_attention(q, k, v, log_decay, backend))
        flat = (q_BTHK.flatten(0, 1), k_BTHK.flatten(0, 1), v_BTHV.flatten(0, 1))
        if log_decay is not None and log_decay.ndim > 1:
            log_decay = log_decay.flatten(0, 1)
        wires = Exchange(self.plan, self._make_prefix, self._label("prefix"))
        out = sharded_decay_attention(flat, log_decay, wires, backend)
        return out.view_as(v_BTHV)

    @torch.compiler.disable
    def running_log_sum_exp(self, x_BTR: Tensor) -> LogSumExp:
        rows_MR = x_BTR.reshape(x_BTR.shape[0] * x_BTR.shape[1], -1)
        sums = sharded_log_sum_exp(rows_MR, self.wire("prefix"))
        return LogSumExp(*(y.view(x_BTR.shape) for y in sums))

    @torch.compiler.disable
    def delta_attention(
        self,
        operands: tuple[Tensor, Tensor, Tensor, Tensor],
        log_decay: Tensor | None,
        log_momentum: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        if self.transports.prefix == "ulysses":
            inner, trade = self._by_heads()
            q, k, v = (trade.gather_tokens(x) for x in operands[:3])
            beta, decay, momentum = trade.gather_gates(operands[3], log_decay, log_momentum)
            assert beta is not None
            out = inner.delta_attention((q, k, v, beta), decay, momentum, backend)
            return trade.gather_heads(out)
        q, k, v, beta = (x.flatten(0, 1) for x in operands)
        gates = [None if x is None else x.flatten(0, 1) for x in (log_decay, log_momentum)]
        wires = Exchange(self.plan, self._make_prefix, self._label("prefix"), backend)
        out = sharded_delta_attention((q, k, v, beta), gates, wires)
        return out.view_as(operands[2])

    def _make_prefix(self, transitions: Transitions) -> Prefix:
        kind = self.transports.prefix
        if kind in ("allgather", "ulysses"):
            return GatheredPrefix(self.plan, transitions, self.links.sequence)
        blocks, beside = (SCAN_BLOCKS, True) if kind == "scan" else (1, False)
        return ChainedPrefix(self.plan, transitions, self.links.chain, blocks, beside)

    @torch.compiler.disable
    def softmax_attention(
        self,
        q_BTHK: Tensor,
        k_BTJK: Tensor,
        v_BTJV: Tensor,
        window: int,
        backend: str = "auto",
        persistent: Persistent | None = None,
    ) -> Tensor:
        if self.transports.heads > 1:
            inner, trade = self._by_heads()
            k_BTJK, v_BTJV = trade.repeated(k_BTJK), trade.repeated(v_BTJV)
            q, k, v = (trade.gather_tokens(x) for x in (q_BTHK, k_BTJK, v_BTJV))
            if persistent is not None:
                shared = (trade.share(trade.repeated(x[None])[0], 1) for x in persistent)
                persistent = Persistent(*shared)
            out = inner.softmax_attention(q, k, v, window, backend, persistent)
            return trade.gather_heads(out)
        flat = (q_BTHK.flatten(0, 1), k_BTJK.flatten(0, 1), v_BTJV.flatten(0, 1))
        backend = backend_of(q_BTHK, backend)
        if window:
            out = self._windowed(flat, window, backend, persistent)
        elif persistent is not None:
            raise ValueError("persistent keys need a window")
        else:
            wires = Wires(self.links.ring, self._label("stream"), backend)
            out = sharded_softmax_attention(
                flat, self.plan, wires, self.transports.stream, self.transports.gather_heads
            )
        return out.unflatten(0, q_BTHK.shape[:2])

    def _windowed(
        self, flat: tuple[Tensor, ...], window: int, backend: str, persistent: Persistent | None
    ) -> Tensor:
        q_MHK, k_MJK, v_MJV = flat
        halo = self.plan.once(HaloPlan, min(window, self.plan.placement.length) - 1, 0)
        together = torch.cat((k_MJK, v_MJV), -1)
        wide = Halo.apply(together, halo, self.links.ring, self._label("halo"))
        k, v = wide.split((k_MJK.shape[-1], v_MJV.shape[-1]), -1)
        if persistent is not None:
            k, v = persistent.before(k, v)
        count = len(k) - len(wide)
        if backend != "triton":
            tiles = self.plan.once(window_tiles, halo, window)
            return attend_tiles(q_MHK, k, v, with_persistent(tiles, len(q_MHK), count))
        sight = self.plan.once(halo_sight, halo, window, q_MHK.device)
        return attend_seen(q_MHK, k, v, with_persistent_keys(sight, count))

    def _by_heads(self) -> tuple[SequenceView, HeadTrade]:
        """The view inside a Ulysses group, and the trade that leads there."""
        size = self.links.heads.size
        ring, placement = self.plan.rank // size, self.plan.placement
        groups = tuple(
            tuple(range(j * size, (j + 1) * size)) for j in range(placement.ranks // size)
        )
        trade = HeadTrade(self.plan, groups[ring], self.links.heads, self._label("heads"))
        plan = self.plan.once(_joined, groups, ring)
        if len(groups) == 1:
            return LocalView(plan.documents, placement.length, self.device), trade
        links = replace(self.links, sequence=self.links.ring, chain=self.links.ring)
        transports = replace(self.transports, prefix="allgather", heads=1)
        return ShardedView(plan, links, transports, self.layer).to(self.device), trade
