"""What ranks exchange is what formulas say, to the byte; the formulas are those of the papers."""

import random

import pytest
import torch

from longctx.mixers import MixerConfig
from longctx.mixers.linear import LinearConfig
from longctx.mixers.moh import MoHConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.sequence.affine import GatheredPrefix, Transitions, kept, links
from longctx.sequence.expected import (
    WIDTHS,
    Share,
    Sizes,
    decay_traffic,
    expected_exchange,
    prefix_traffic,
    reduce_traffic,
    softmax_traffic,
)
from longctx.sequence.ledger import Label, Ledger, Traffic
from longctx.sequence.placement import place
from longctx.sequence.plan import Plan
from longctx.sequence.refusal import refuse
from longctx.sequence.sharded import SCAN_BLOCKS, ShardedView, Transports
from longctx.sequence.simulator import run_ranks
from tests.mixers.examples import WIDTH
from tests.mixers.test_every_mixer import build
from tests.sequence.links import simulated_links
from tests.sequence.matrix import DECODER, Setting, stand_ins, subjects

DOCUMENTS = ((0,), (0, 5, 6, 20))
P, B, H, J, K, V = 4, 2, 6, 3, 5, 7
SIZES = Sizes(H, J, K, V)
C = 24
VARIANTS = {name: layers[0] for name, layers in subjects().items() if name != DECODER}


def ledgers(config: MixerConfig, setting: Setting, length: int, precision: str = "fp64"):
    """The ledger of every rank after a forward and a backward pass, and its formula."""
    dtype = torch.float64 if precision == "fp64" else torch.float32
    mixer, placement = build(config, dtype), setting.place(length)

    def work(rank, hub):
        ledger, plan = Ledger(), Plan(placement, rank, DOCUMENTS)
        link = simulated_links(hub, rank, setting.ranks, setting.transports.heads, ledger)
        x_BTD = torch.randn(len(DOCUMENTS), plan.length, WIDTH, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            mixed = mixer(x_BTD, ShardedView(plan, link, setting.transports))
        total = mixed.out.sum() + sum(mixed.losses.values())
        torch.autograd.grad(total, [x_BTD, *mixer.parameters()])
        return ledger.traffic()

    share = (placement, len(DOCUMENTS), setting.transports, WIDTHS[precision], DOCUMENTS)
    predicted = [expected_exchange([mixer], Share(rank, *share)) for rank in range(setting.ranks)]
    return run_ranks(setting.ranks, work), predicted


@pytest.mark.parametrize("subject", VARIANTS)
def test_the_ledger_equals_the_formula(subject):
    """For all settings that differ by formula, and for some of those that should not."""
    same = stand_ins(subject)
    alike = [setting for setting, stand_in in same.items() if setting != stand_in]
    for setting in {*same.values(), *random.Random(subject).sample(alike, 8)}:
        recorded, predicted = ledgers(VARIANTS[subject], setting, 37)
        assert recorded == predicted, setting


SOME_SETTINGS = (
    Setting(3, "zigzag", Transports("allgather", "allgather")),
    Setting(4, "mirror", Transports("scan", "ring", 2)),
    Setting(4, "contiguous", Transports("ulysses", "allgather", 2, 1)),
)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_the_formula_knows_what_travels_in_which_precision(config, precision):
    for setting in SOME_SETTINGS:
        if not setting.refusal((config,)):
            recorded, predicted = ledgers(config, setting, 37, precision)
            assert recorded == predicted, setting


@pytest.mark.parametrize("prefix", ["allgather", "scan", "serial"])
@pytest.mark.parametrize("placement", ["contiguous", "zigzag"])
def test_the_traffic_of_states_does_not_depend_on_the_length(prefix, placement):
    setting = Setting(3, placement, Transports(prefix))
    short, _ = ledgers(LinearConfig(num_heads=2), setting, 41)
    long, _ = ledgers(LinearConfig(num_heads=2), setting, 407)
    assert short == long
    assert sum(traffic.received for rank in short for traffic in rank.values()) > 0


def elements(transports: Transports, forecast, placement: str = "contiguous", length: int = P * C):
    """(forward, backward) elements that each rank receives, all verbs together."""
    where = place(placement, P, length, transports.heads)
    shares = [Share(rank, where, B, transports, WIDTHS["fp32"]) for rank in range(P)]
    return [
        tuple(
            sum(t.received for (_, backward), t in forecast(share).items() if backward is way) // 4
            for way in (False, True)
        )
        for share in shares
    ]


def of_states(share):
    return decay_traffic(share, SIZES)


def of_keys(share):
    return softmax_traffic(share, SIZES, 0)


STATE, TOKEN = B * H * K * V, B * J * (K + V)


@pytest.mark.parametrize(("placement", "segments"), [("contiguous", 1), ("zigzag", 2)])
def test_lasp_2_receives_the_states_of_all_others_each_way(placement, segments):
    each = (P - 1) * segments * STATE
    assert elements(Transports("allgather"), of_states, placement) == [(each, each)] * P


@pytest.mark.parametrize("prefix", ["scan", "serial"])
def test_a_chain_passes_each_state_once(prefix):
    last = P - 1
    contiguous = elements(Transports(prefix), of_states)
    assert contiguous == [(STATE * (r > 0), STATE * (r < last)) for r in range(P)]
    assert sum(map(sum, contiguous)) == 2 * (P - 1) * STATE
    zigzag = elements(Transports(prefix), of_states, "zigzag")
    assert sum(map(sum, zigzag)) == 4 * (P - 1) * STATE
    assert zigzag[1] == (2 * STATE, 2 * STATE)


@pytest.mark.parametrize(("value_dim", "blocks"), [(7, SCAN_BLOCKS), (2, 2)])
def test_a_scan_sends_blocks_of_columns(value_dim, blocks):
    share = Share(1, place("contiguous", 3, 9), B, Transports("scan"), WIDTHS["fp32"])
    traffic = prefix_traffic(share, Sizes(H, H, K, value_dim))
    assert {t.calls for t in traffic.values()} == {2 * blocks}


def test_factors_travel_with_the_first_gather_only():
    rows, ranks, added = 2, 3, (2, 3, 4)
    placement = place("zigzag", ranks, 20)

    def work(rank, hub):
        ledger, plan = Ledger(), Plan(placement, rank, DOCUMENTS)
        segments = [placement.segments[r][i] for r, i in placement.order]
        own = torch.rand(len(plan.segments), rows, 2, 3, 1)
        own *= kept(plan, plan.segments, own)[..., None, None, None]
        transitions = Transitions(own, links(plan, own))
        link = simulated_links(hub, rank, ranks, 1, ledger)
        exchange = GatheredPrefix(plan, transitions, link.sequence)
        state = torch.zeros(len(plan.segments), rows, *added)
        exchange.rightwards(state, Label(0, "prefix"))()
        exchange.leftwards(state, Label(0, "prefix", True))()
        assert len(segments) == 2 * ranks
        return {(label.verb, label.backward): t for label, t in ledger.traffic().items()}

    for rank, recorded in enumerate(run_ranks(ranks, work)):
        share = Share(rank, placement, rows, Transports("allgather"), WIDTHS["fp32"])
        assert recorded == prefix_traffic(share, Sizes(2, 2, 3, 4), factor=2 * 3)
    forward, backward = 2 * 2 * rows * (24 + 6) * 4, 2 * 2 * rows * 24 * 4
    assert recorded == {
        ("prefix", False): Traffic(1, forward),
        ("prefix", True): Traffic(1, backward),
    }


def test_ring_and_gather_receive_the_keys_of_all_others_and_backward_their_gradients_too():
    each = (P - 1) * C * TOKEN
    for stream in ("ring", "allgather"):
        assert elements(Transports(stream=stream), of_keys) == [(each, 2 * each)] * P


def test_a_ring_sends_shards_of_their_own_length_and_a_gather_pads_them():
    length = P * C + 2
    lengths = place("contiguous", P, length).lengths
    assert sorted(lengths) == [C, C, C + 1, C + 1]
    gathered = (P - 1) * (C + 1) * TOKEN
    padded = elements(Transports(stream="allgather"), of_keys, length=length)
    assert padded == [(gathered, 2 * gathered)] * P
    for rank, (forward, backward) in enumerate(
        elements(Transports(stream="ring"), of_keys, length=length)
    ):
        others = (length - lengths[rank]) * TOKEN
        assert (forward, backward - others) == (others, (length - lengths[rank - 1]) * TOKEN)


@pytest.mark.parametrize("window", [1, 9, C + 1, 2 * C + 5, P * C, 10 * P * C])
def test_a_window_fetches_no_more_than_the_window(window):
    found = elements(Transports(), lambda share: softmax_traffic(share, SIZES, window))
    total = P * C
    for rank, (forward, backward) in enumerate(found):
        assert forward == min(window - 1, rank * C) * TOKEN
        later = total - (rank + 1) * C
        wanted = [min(C, max(0, window - 1 - gap)) for gap in range(0, later, C)]
        assert backward == sum(wanted) * TOKEN


def test_ulysses_trades_its_share_of_queries_keys_values_and_outputs():
    sizes, transports = Sizes(8, 4, K, V), Transports("ulysses", heads=P)
    share = (P - 1) * B * C // P
    keys = share * (8 * K + 4 * (K + V) + 8 * V)
    found = elements(transports, lambda one: softmax_traffic(one, sizes, 0))
    assert found == [(keys, keys)] * P
    states = share * 8 * (2 * K + 2 * V)
    found = elements(transports, lambda one: decay_traffic(one, sizes))
    assert found == [(states, states)] * P


def test_ulysses_repeats_key_heads_when_there_are_fewer_than_ranks():
    share = (P - 1) * B * C // P
    few, enough = (
        elements(Transports(heads=P), lambda one, j=j: softmax_traffic(one, Sizes(8, j, K, V), 0))
        for j in (2, P)
    )
    assert few == enough == [(share * (8 * K + P * (K + V) + 8 * V),) * 2] * P


def test_an_all_reduce_is_counted_as_reduce_scatter_and_gather():
    def means(share):
        return reduce_traffic(share, 6, (2, 1))

    share = 2 * (P - 1) * 2
    assert elements(Transports(), means) == [(2 * share, share)] * P


@pytest.mark.parametrize(
    ("config", "placement", "transports", "ranks", "reason"),
    [
        (LinearConfig(), "contiguous", Transports(heads=3), 4, "parallel.heads = 3 does not"),
        (LinearConfig(), "mirror", Transports(heads=1), 4, "parallel.placement = 'mirror'"),
        (LinearConfig(), "zigzag", Transports("ulysses"), 2, "parallel.prefix = 'ulysses' needs"),
        (LinearConfig(num_heads=6), "zigzag", Transports("ulysses", heads=4), 4, "1, 2, 3 or 6"),
        (SoftmaxConfig(num_heads=6), "zigzag", Transports(heads=4), 4, "num_heads = 6 is no"),
        (
            SoftmaxConfig(num_heads=6, num_kv_heads=3),
            "zigzag",
            Transports(heads=2),
            4,
            "num_kv_heads = 3 is neither",
        ),
        (
            MoHConfig(inner=SoftmaxConfig(num_heads=6)),
            "zigzag",
            Transports(heads=4),
            4,
            "inner.num_heads = 6",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_a_way_out(config, placement, transports, ranks, reason):
    assert reason in refuse(config, placement, transports, ranks)


@pytest.mark.parametrize(
    ("config", "transports"),
    [
        (LinearConfig(num_heads=6), Transports("scan", "ring", heads=4)),
        (SoftmaxConfig(num_heads=8, num_kv_heads=2), Transports("ulysses", heads=4)),
        (SoftmaxConfig(num_heads=8, num_kv_heads=1), Transports(heads=2)),
        (MoHConfig(inner=LinearConfig(num_heads=6)), Transports(heads=4)),
    ],
)
def test_what_works_is_not_refused(config, transports):
    assert refuse(config, "mirror", transports, 4) == ""
