"""The four groups of a rank, on the simulator and on real gloo ranks."""

import functools
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from longctx.sequence.c10d import ProcessGroup
from longctx.sequence.ledger import Ledger
from longctx.sequence.sharded import Links
from longctx.sequence.simulator import Hub, SimulatedCommunicator


def member_lists(rank: int, ranks: int, heads: int) -> tuple[range, range, range, range]:
    """Members of this rank's sequence, chain, heads and ring groups, as numbers in the plan."""
    group, place = divmod(rank, heads)
    everyone = range(ranks)
    return (
        everyone,
        everyone,
        range(group * heads, (group + 1) * heads),
        range(place, ranks, heads),
    )


def simulated_links(hub: Hub, rank: int, ranks: int, heads: int, ledger: Ledger) -> Links:
    """Links of one of `ranks` threads; `heads` is the size of a Ulysses group."""
    members = member_lists(rank, ranks, heads)
    return Links(
        *(
            SimulatedCommunicator(hub, channel, group, rank, ledger)
            for channel, group in zip(Links.__dataclass_fields__, members)
        )
    )


def gloo_links(
    heads: int,
    ledger: Ledger,
    sequences: Sequence[Sequence[int]] | None = None,
    timeout_seconds: float = 60,
) -> Links:
    """Links of this process; every rank of the world must call it in the same order.

    `sequences` are the groups, of equal size, that share a sequence each; by default the world is
    one. A group's order is that of its ranks in the plan. Groups are connected once and kept.
    """
    whole = sequences or [range(dist.get_world_size())]
    groups = _own_groups(heads, tuple(tuple(ranks) for ranks in whole), timeout_seconds)
    return Links(*(ProcessGroup(group, ledger) for group in groups))


@functools.cache
def _own_groups(
    heads: int, sequences: tuple[tuple[int, ...], ...], timeout_seconds: float
) -> list[Any]:
    """Connects all groups of all ranks, in one order; this rank's own four."""
    own: list[Any] = []
    for kind in range(len(Links.__dataclass_fields__)):
        for ranks in sequences:
            lists = (member_lists(r, len(ranks), heads)[kind] for r in range(len(ranks)))
            for members in dict.fromkeys(tuple(ranks[i] for i in one) for one in lists):
                group = dist.new_group(list(members), timedelta(seconds=timeout_seconds))
                if dist.get_rank() in members:
                    own.append(group)
    return own
