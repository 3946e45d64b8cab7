"""What is exchanged again, and what not, when layers of a split sequence are computed again."""

import functools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from longctx.mixers import MixerConfig
from longctx.mixers.linear import LinearConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.decoder import Decoder, ModelConfig
from longctx.model.memory import MemoryConfig
from longctx.sequence.ledger import Label, Ledger, Traffic
from longctx.sequence.placement import place
from longctx.sequence.plan import Plan
from longctx.sequence.sharded import ShardedView, Transports
from longctx.sequence.simulator import Hub, run_ranks
from tests.mixers.examples import WIDTH, all_variants
from tests.sequence.links import simulated_links

RANKS, LENGTH, VOCABULARY = 3, 48, 13
DOCUMENTS = ((0,), (0, 7, 30, 31))
POLICIES = ("none", "full", "keep")
REPEATED = {"gather", "fetch", "heads", "select"}
"""Verbs whose results are about as large as what they were asked for: they are exchanged again."""

VARIANTS: dict[str, MixerConfig] = dict(all_variants()) | {
    "softmax-plain": SoftmaxConfig(num_heads=6, num_kv_heads=3, head_dim=4),
    "linear-six": LinearConfig(num_heads=6, head_dim=4),
}
ONCE = [
    ("softmax-plain", "zigzag", Transports()),
    ("softmax-plain", "contiguous", Transports(gather_heads=1)),
    ("softmax-plain", "zigzag", Transports(stream="ring")),
    ("softmax-window", "zigzag", Transports()),
    ("linear-six", "zigzag", Transports()),
    ("linear-six", "contiguous", Transports(prefix="scan")),
    ("linear-six", "contiguous", Transports(prefix="serial")),
    ("gla-default", "zigzag", Transports()),
    ("mamba2-one-group", "contiguous", Transports(prefix="scan")),
    ("deltanet-default", "contiguous", Transports()),
    ("gdn-default", "zigzag", Transports()),
    ("kda-default", "contiguous", Transports(prefix="scan")),
    ("titans-memory", "contiguous", Transports()),
    ("agent-default", "zigzag", Transports(prefix="scan")),
    ("aaren-default", "contiguous", Transports()),
    ("moh-softmax", "contiguous", Transports(stream="ring")),
    ("moh-linear", "zigzag", Transports()),
    ("sum-gated", "contiguous", Transports()),
]
"""Layers that exchange nothing again."""
AGAIN = [
    ("softmax-plain", "contiguous", Transports(heads=3)),
    ("linear-six", "contiguous", Transports(prefix="ulysses", heads=3)),
    ("nsa-own-keys", "zigzag", Transports()),
    ("mosa-expert-choice", "contiguous", Transports()),
    ("mosa-threshold", "zigzag", Transports()),
    ("routing-default", "contiguous", Transports()),
    ("lte-default", "contiguous", Transports()),
    ("scored-relu", "contiguous", Transports()),
    ("moh-routed", "contiguous", Transports()),
    ("scatterbrain-default", "contiguous", Transports(prefix="scan")),
]


class Found(NamedTuple):
    """Of one rank: losses and gradients, and what it exchanged."""

    values: dict[str, Tensor]
    traffic: dict[Label, Traffic]

    def sent(self, backward: bool) -> dict[Label, Traffic]:
        return {label: t for label, t in self.traffic.items() if label.backward == backward}


@functools.cache
def ranks_of(name: str, placement: str, transports: Transports, policy: str) -> list[Found]:
    table = ModelConfig(
        width=WIDTH, depth=2, pattern="M", mixers={"M": VARIANTS[name]}, dropout=0.2
    )
    model = Decoder(table, VOCABULARY, MemoryConfig(checkpointing=policy)).double()
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = (parameter.dim() == 1) + 0.3 * noise
    tokens_BG = torch.randint(VOCABULARY, (2, LENGTH), generator=generator)

    def work(rank: int, hub: Hub) -> Found:
        ledger = Ledger()
        plan = Plan(place(placement, RANKS, LENGTH, transports.heads), rank, DOCUMENTS)
        links = simulated_links(hub, rank, RANKS, transports.heads, ledger)
        view = ShardedView(plan, links, transports).keyed(1, 2, (4, 5))
        ids_T = plan.token_ids_BT[0]
        losses = model(tokens_BG[:, ids_T], tokens_BG.roll(-1, 1)[:, ids_T], view)
        total = losses.cross_entropy / LENGTH + sum(losses.mixers.values()) / RANKS
        named = dict(model.named_parameters())
        gradients = torch.autograd.grad(total, list(named.values()))
        values = {"loss": total.detach(), **losses.statistics, **dict(zip(named, gradients))}
        return Found(values, ledger.traffic())

    return run_ranks(RANKS, work)


def ids(cases: list) -> list[str]:
    return [f"{n}-{p}-{t.prefix}-{t.stream}{t.gather_heads}-{t.heads}" for n, p, t in cases]


def twice(traffic: dict[Label, Traffic]) -> dict[Label, Traffic]:
    return {label: Traffic(2 * t.calls, 2 * t.received) for label, t in traffic.items()}


@pytest.mark.parametrize("case", ONCE + AGAIN, ids=ids(ONCE + AGAIN))
def test_every_rank_finds_the_same_whatever_it_keeps(case):
    plain, *others = (ranks_of(*case, policy) for policy in POLICIES)
    for other in others:
        for one, wanted in zip(other, plain, strict=True):
            assert one.values.keys() == wanted.values.keys()
            wrong = [n for n, x in wanted.values.items() if not torch.equal(one.values[n], x)]
            assert wrong == []
            assert one.sent(backward=True) == wanted.sent(backward=True)


@pytest.mark.parametrize("case", ONCE, ids=ids(ONCE))
def test_results_that_are_kept_are_exchanged_once(case):
    for plain, kept in zip(ranks_of(*case, "none"), ranks_of(*case, "keep"), strict=True):
        assert kept.sent(backward=False) == plain.sent(backward=False)


@pytest.mark.parametrize("case", AGAIN, ids=ids(AGAIN))
def test_only_large_results_are_exchanged_twice(case):
    for plain, kept in zip(ranks_of(*case, "none"), ranks_of(*case, "keep"), strict=True):
        wanted = plain.sent(backward=False)
        more = {label.verb for label, t in kept.sent(backward=False).items() if t != wanted[label]}
        assert more
        assert more <= REPEATED


@pytest.mark.parametrize("case", ONCE + AGAIN, ids=ids(ONCE + AGAIN))
def test_everything_is_exchanged_twice_when_nothing_is_kept(case):
    for plain, full in zip(ranks_of(*case, "none"), ranks_of(*case, "full"), strict=True):
        assert full.sent(backward=False) == twice(plain.sent(backward=False))
