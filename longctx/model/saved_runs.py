"""What layers without a formula keep: they are run forward on a CPU, at small sizes.

It grows by the same with every token once windows are full, but for slots of selecting heads, which
are padded to whole tiles; with every share of the heads; and with every rank. So wide layers are
run with few heads, long sequences at two short lengths, and many ranks as a few, whose exchanges
bring copies of what this one sends.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from longctx.mixers import MixerConfig, Place
from longctx.mixers.base import RMSNorm
from longctx.model.allocations import Allocations
from longctx.model.block import Block
from longctx.model.in_flight import DTYPES, Batch
from longctx.model.memory import BlockMemory, Checkpointing
from longctx.sequence.communicator import Communicator, Pending, Shape
from longctx.sequence.ledger import Label, Ledger
from longctx.sequence.local import LocalView
from longctx.sequence.placement import place
from longctx.sequence.plan import Plan
from longctx.sequence.sharded import Links, ShardedView, Transports
from longctx.sequence.view import SequenceView

SHORT = 512
"""Tokens of a process that are run as they are up to twice this."""
NARROW = 512
"""Width up to which all heads are run."""
FEW = 4
"""Ranks that are run as they are."""


class Echo(Communicator):
    """One of several ranks, of which the others send what it sends itself."""

    def _all_gather(self, flat: Tensor, label: Label) -> Pending:
        return Pending(lambda: list(flat.repeat(self.size).view(self.size, -1)))

    def _reduce_scatter(self, flat_PN: Tensor, label: Label) -> Pending:
        return Pending(lambda: [flat_PN[self.rank].clone()])

    def _all_to_all(self, parts: Sequence[Tensor], sizes: list[int], label: Label) -> Pending:
        sent = torch.cat([part.reshape(-1) for part in parts])
        out = sent.repeat(-(-sum(sizes) // max(1, sent.numel())))[: sum(sizes)].clone()
        return Pending(lambda: list(out.split(sizes)))

    def _all_reduce(self, x: Tensor, label: Label) -> Tensor:
        return x * self.size

    def _exchange(
        self,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Shape]],
        like: Tensor,
        label: Label,
    ) -> Pending:
        return Pending(lambda: [like.new_zeros(shape) for _, shape in receives])


@dataclass(frozen=True)
class Layer:
    """A layer with a mixer and nothing else."""

    mixer: MixerConfig = field(compare=False)
    where: Place
    checkpointing: Checkpointing
    name: str = ""
    """What tells mixers apart, of which some cannot be hashed."""

    def with_heads(self, parts: int) -> "Layer":
        """With one of so many equal shares of the heads."""
        mixer, where = self.mixer, self.where
        if parts > 1:
            mixer = mixer.over_tp(where.width, parts)
            where = replace(where, parts=where.parts * parts)
        mixer = _with_own_keys(mixer)
        return replace(self, mixer=mixer, where=where, name=repr(mixer))

    @property
    def most_shares(self) -> int:
        """Into how many an even number of shares heads can be dealt out; 1 is to run all."""
        mixer = self.mixer
        heads = getattr(getattr(mixer, "inner", mixer), "num_heads", 1)
        if self.where.width <= NARROW or "prefix" in mixer.verbs():
            # Slabs between which states are kept are longer for fewer heads.
            return 1
        counts = (n for n in range(2, heads + 1, 2) if heads % n == 0)
        return max((n for n in counts if not mixer.tp_refusal(n)), default=1)

    @property
    def window(self) -> int:
        """Tokens after which what it keeps grows evenly."""
        return getattr(getattr(self.mixer, "inner", self.mixer), "window", 0)


def _with_own_keys(mixer: Any) -> Any:
    """The same where it would take keys or values of another layer, which is not there."""
    if hasattr(mixer, "inner"):
        return replace(mixer, inner=_with_own_keys(mixer.inner))
    reuses = getattr(mixer, "reuses", "nothing") != "nothing"
    return replace(mixer, reuses="nothing") if reuses else mixer


def saved_by_running(layer: Layer, batch: Batch) -> int:
    """Of a layer, its input counted."""
    most = layer.most_shares

    def of_heads(shares: int) -> float:
        own = layer.with_heads(most // shares)
        return _extended(lambda n: _of_lengths(own, replace(batch, rows=n)), (1, 2), batch.rows)

    return round(_extended(of_heads, (1, 2), most))


def _extended(of: Callable[[int], float], short: tuple[int, int], whole: int) -> float:
    """`of` at `whole`, along the line through the two short ones if it is longer."""
    if whole <= short[1]:
        return of(whole)
    before, after = of(short[0]), of(short[1])
    return after + (after - before) / (short[1] - short[0]) * (whole - short[1])


def _of_lengths(layer: Layer, batch: Batch) -> float:
    first = SHORT * max(1, -(-layer.window // SHORT))
    return _extended(
        lambda tokens: _of_ranks(layer, replace(batch, tokens=tokens)),
        (first, 2 * first),
        batch.tokens,
    )


def _of_ranks(layer: Layer, batch: Batch) -> float:
    """Among a few ranks, if there are more; most ranks are in the middle of a sequence."""
    short, split = replace(batch, share=None), batch.split
    if split is None:
        return _found(layer, short, (1, 0, "contiguous", Transports()))
    ranks, way = split.placement.ranks, split.transports
    in_order = [rank for rank, _ in split.placement.order] == list(range(ranks))
    kind = "zigzag" if batch.segments == 2 else "contiguous" if in_order else "mirror"
    some = max(FEW, 2 * way.heads)
    return _extended(
        lambda n: _found(layer, short, (n, split.rank if n == ranks else n // 2, kind, way)),
        (some // 2, some),
        ranks,
    )


@lru_cache(maxsize=4096)
def _found(layer: Layer, batch: Batch, split: tuple[int, int, str, Transports]) -> int:
    """With one of so many ranks, the tokens of the batch on each."""
    where, memory = layer.where, BlockMemory(layer.checkpointing)
    mixer = layer.mixer.build(where)
    block = Block((RMSNorm(where.width), mixer), None, 0.0, memory)
    block = block.to(DTYPES[batch.precision])
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    view = _view(batch, *split).keyed(0, 0, tuple(range(batch.rows)))
    # Once before, for what a view finds out of a batch and keeps.
    return [counted(block, view, where.width, batch.precision) for _ in range(2)][1]


def _view(batch: Batch, ranks: int, rank: int, kind: str, transports: Transports) -> SequenceView:
    if ranks == 1:
        return LocalView.whole(batch.rows, batch.tokens)
    heads, ledger = transports.heads, Ledger()
    links = Links(
        sequence=Echo(rank, ranks, ledger),
        chain=Echo(rank, ranks, ledger),
        heads=Echo(rank % heads, heads, ledger),
        ring=Echo(rank // heads, ranks // heads, ledger),
    )
    plan = Plan(place(kind, ranks, ranks * batch.tokens, heads), rank, ((0,),) * batch.rows)
    return ShardedView(plan, links, transports)


def counted(block: Block, view: SequenceView, width: int, precision: str) -> int:
    """What a layer keeps of a batch on a CPU, by running it forward."""
    dtype, rows = DTYPES[precision], view.plan.rows
    leaf = torch.randn(rows, view.plan.length, width, dtype=dtype, requires_grad=True)
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
    with Allocations() as allocations:
        x_BTD = leaf.clone()
        with autocast:
            mixed = block(x_BTD, view)
        del x_BTD
        results = (mixed.out, *mixed.losses.values(), *mixed.statistics.values())
        own = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in results}
        return allocations.alive() - sum(own.values())
