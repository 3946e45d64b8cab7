"""What sparse layers promise beyond what every mixer does: bounded memory, counts of no split."""

import pytest
import torch

from longctx.mixers import Place
from longctx.mixers.dma import DMAConfig
from longctx.mixers.lte import LTEConfig
from longctx.mixers.nats import NATSConfig
from longctx.mixers.neighbourhood import NeighbourhoodConfig
from longctx.mixers.power import PowerConfig
from longctx.mixers.s2 import S2Config
from longctx.mixers.softmax import SoftmaxConfig
from longctx.mixers.sparse_transformer import FixedConfig, StridedConfig
from longctx.sequence.expected import WIDTHS, Share
from longctx.sequence.ledger import Ledger
from longctx.sequence.local import LocalView
from longctx.sequence.placement import place
from longctx.sequence.plan import Plan
from longctx.sequence.sharded import ShardedView, Transports
from longctx.sequence.simulator import run_ranks
from tests.mixers.test_every_mixer import build, example_input
from tests.sequence.links import simulated_links
from tests.tolerances import assert_close

LONG, WIDTH = 4096, 32
LONG_ONES = {
    "softmax": SoftmaxConfig(num_heads=2),
    "softmax-window": SoftmaxConfig(num_heads=2, window=128),
    "s2": S2Config(num_heads=2, block=64, local_blocks=2, stride=2),
    "fixed": FixedConfig(num_heads=2, block=128, columns=4),
    "strided": StridedConfig(num_heads=2, block=64, local_blocks=2, stride=8),
    "neighbourhood": NeighbourhoodConfig(num_heads=2, window=128, stride=64),
    "power": PowerConfig(num_heads=2, block=64, window_blocks=2),
    "dma": DMAConfig(num_heads=2, capacity=64, window=32),
    "lte": LTEConfig(num_heads=2, capacity=64, window=64),
    "nats": NATSConfig(num_heads=2),
}


def largest_allocation(work) -> int:
    """Bytes of the largest block of memory that is asked for in a call, by kernels too."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("config", LONG_ONES.values(), ids=LONG_ONES)
def test_nothing_of_length_times_length_is_ever_made(config):
    """Not even two bits for each pair of tokens."""
    torch.manual_seed(0)
    mixer = config.build(Place(WIDTH, 0, 1))
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x_BTD = torch.randn(1, LONG, WIDTH, requires_grad=True)
    view = LocalView.whole(1, LONG)
    assert largest_allocation(lambda: mixer(x_BTD, view).out.sum().backward()) < LONG * LONG / 4


def test_a_mask_would_be_noticed():
    assert largest_allocation(lambda: torch.ones(LONG, LONG, dtype=torch.bool)) == LONG * LONG


LTE_SMALL = LTEConfig(num_heads=4, num_kv_heads=2, head_dim=8, capacity=6, window=9, sinks=2)


def lte_after_a_step(ranks: int) -> tuple:
    """Loss, statistics and penalties of an LTE layer with a penalty, on so many ranks."""
    x_BTD, placement = example_input(2, 61), place("contiguous", ranks, 61)

    def work(rank, hub):
        mixer = build(LTE_SMALL)
        mixer.penalty_J.fill_(0.25)
        plan = Plan(placement, rank, ((0,), (0, 20)))
        view = ShardedView(plan, simulated_links(hub, rank, ranks, 1, Ledger()), Transports())
        return mixer, mixer(x_BTD[:, plan.token_ids_BT[0]], view)

    results = run_ranks(ranks, work)
    mixer, mixed = results[0]
    sums = {name: sum(m.statistics[name] for _, m in results) for name in mixed.statistics}
    figures = mixer.adapt(sums, 2 * 61)
    return [m.losses["eviction"] for _, m in results], sums, figures


def test_the_budget_of_eviction_does_not_depend_on_the_split():
    (loss,), sums, figures = lte_after_a_step(1)
    assert loss > 0
    assert 0.1 < sums["kept"].sum() / (2 * 2 * 61) < 0.9
    for ranks in (2, 4):
        losses, other_sums, other_figures = lte_after_a_step(ranks)
        for other in losses:
            assert_close(other, loss, "fp64")
        assert all(torch.equal(other_sums[name], sums[name]) for name in sums)
        assert all(torch.equal(other_figures[name], figures[name]) for name in figures)


def test_the_penalty_follows_the_number_of_tokens_that_are_kept():
    mixer = LTEConfig(num_heads=2, capacity=100, window=9, adapt_every=2).build(Place(16, 0, 1))
    too_many = {"kept": torch.tensor([900, 200]), "documents": torch.tensor(3)}
    for _ in range(4):
        mixer.adapt(too_many, 1000)
    assert mixer.penalty_J.tolist() == pytest.approx([1.5e-9, 0.0])
    enough = {"kept": torch.tensor([291, 200]), "documents": torch.tensor(3)}
    mixer.kept_J.fill_(97.0)
    for _ in range(2):
        mixer.adapt(enough, 1000)
    assert mixer.penalty_J[0] == pytest.approx(1.5e-9)
    few = {"kept": torch.tensor([0, 0]), "documents": torch.tensor(3)}
    for _ in range(4):
        mixer.adapt(few, 1000)
    assert mixer.penalty_J.tolist() == [0.0, 0.0]


def test_dynamic_masks_start_as_windows():
    """Where all biases are zero the latest keys win, so what is seen is the last `capacity`."""
    dynamic = DMAConfig(num_heads=2, capacity=9, window=2).build(Place(16, 0, 1)).double()
    window = SoftmaxConfig(num_heads=2, window=9).build(Place(16, 0, 1)).double()
    window.load_state_dict(dynamic.state_dict(), strict=False)
    x_BTD = example_input(1, 50)
    assert_close(dynamic(x_BTD).out, window(x_BTD).out, "fp64")


@pytest.mark.parametrize(("placement", "segments"), [("contiguous", 1), ("zigzag", 2)])
def test_what_survives_travels_in_a_number_that_does_not_depend_on_the_length(placement, segments):
    """From every other segment the best of each head: key, value, score and position."""
    ranks, rows = 4, 3
    config = LTEConfig(num_heads=4, num_kv_heads=2, head_dim=8, capacity=6, window=9)
    mixer, received = config.build(Place(16, 0, 1)), []
    for length in (96, 960):
        where = place(placement, ranks, length)
        share = Share(1, where, rows, Transports(), WIDTHS["bf16"])
        traffic = mixer.expected_traffic(share)
        received.append(traffic["survivors", False].received)
        keys = (ranks - 1) * segments * rows * config.key_heads * config.capacity
        assert received[-1] == keys * (2 * 8 * 2 + 4 + 8)
        # The window before each segment, too, with scores, and the convolution's neighbours.
        before = 2 - (placement == "contiguous")
        window = before * (config.window - 1) * rows * config.key_heads * (2 * 8 * 2 + 4)
        assert traffic["fetch", False].received == window
    assert received[0] == received[1]
