"""Routing attention: tokens see their cluster only, and centroids follow their tokens."""

from dataclasses import replace

import pytest
import torch

from longctx.errors import InputError
from longctx.mixers.parts import rotate, unit
from longctx.mixers.routing import RoutingConfig
from longctx.sequence.ledger import Ledger
from longctx.sequence.local import LocalView
from longctx.sequence.placement import place
from longctx.sequence.plan import Plan
from longctx.sequence.sharded import ShardedView, Transports
from longctx.sequence.simulator import run_ranks
from tests.mixers.examples import VARIANTS, WIDTH
from tests.mixers.test_every_mixer import build, example_input
from tests.sequence.links import simulated_links
from tests.tolerances import assert_close

LENGTH = 60
DOCUMENTS = ((0,), (0, 19, 20))
CONFIG = VARIANTS["routing"]["default"]
ROOMY = replace(CONFIG, capacity=float(CONFIG.clusters))


def directions(mixer, x_BTD):
    """Unit vectors `[B, T, H, K]`, and the nearest centroid of each."""
    unit_BTHK = unit((x_BTD @ mixer.query.weight.T).unflatten(-1, (mixer.num_heads, -1)))
    distance = (unit_BTHK[..., None, :] - mixer.centroid_HCK.double()).square().sum(-1)
    return unit_BTHK, distance.argmin(-1)


def test_with_room_for_all_it_is_attention_within_clusters():
    mixer, x_BTD = build(ROOMY), example_input(2, LENGTH)
    view = LocalView(DOCUMENTS, LENGTH)
    unit_BTHK, cluster_BTH = directions(mixer, x_BTD)
    q_BHTK = rotate(unit_BTHK, view.positions_BT, 1e4, 0.5).transpose(1, 2)
    start_BT = torch.arange(LENGTH) - view.positions_BT
    same = (start_BT[:, :, None] == start_BT[:, None]).tril()[:, None]
    same = same & (cluster_BTH[:, :, None] == cluster_BTH[:, None]).permute(0, 3, 1, 2)
    assert 0.1 < same.double().mean() < 0.9
    scores = (q_BHTK @ q_BHTK.mT * mixer.size**0.5).masked_fill(~same, -torch.inf)
    v_BHTV = (x_BTD @ mixer.value.weight.T).unflatten(-1, (2, -1)).transpose(1, 2)
    y_BTHV = (scores.softmax(-1) @ v_BHTV).transpose(1, 2)
    assert_close(mixer(x_BTD, view).out, y_BTHV.flatten(2) @ mixer.project_out.weight.T, "fp64")


def test_a_token_without_a_slot_gets_zeros():
    mixer, x_BTD = build(CONFIG), example_input(1, LENGTH)
    projected = mixer.project(x_BTD, LocalView.whole(1, LENGTH))
    y_BTHV = mixer.core(projected, LocalView.whole(1, LENGTH))
    _, cluster_BTH = directions(mixer, x_BTD)
    dropped = 0
    for h in range(2):
        for t in range(LENGTH):
            group = cluster_BTH[0, t - t % CONFIG.group : t, h]
            has_slot = int((group == cluster_BTH[0, t, h]).sum()) < mixer.rule.most
            assert (y_BTHV[0, t, h] != 0).any() == has_slot
            dropped += not has_slot
    assert 0 < dropped < LENGTH
    figures = mixer.adapt({n: x.double() for n, x in mixer(x_BTD).statistics.items()}, LENGTH)
    assert float(figures["drop_rate"]) == pytest.approx(dropped / (2 * LENGTH), abs=1e-12)


def test_centroids_move_to_the_mean_of_their_tokens_and_stay_if_nobody_comes():
    mixer, x_BTD = build(replace(CONFIG, momentum=0.0)), example_input(2, LENGTH)
    x_BTD = 0.5 * x_BTD + 2
    mixer.centroid_HCK[0, 1] = -unit((mixer.query.weight @ x_BTD.mean((0, 1)))[:4])
    before = mixer.centroid_HCK.clone()
    unit_BTHK, cluster_BTH = directions(mixer, x_BTD)
    mixer.adapt(mixer(x_BTD).statistics, 2 * LENGTH)
    moved = 0
    for h in range(2):
        for c in range(CONFIG.clusters):
            own = unit_BTHK[:, :, h][cluster_BTH[..., h] == c]
            expected = unit(own.mean(0)) if len(own) else before[h, c]
            assert_close(mixer.centroid_HCK[h, c], expected, "fp32")
            moved += len(own) > 0
    assert 2 < moved < 2 * CONFIG.clusters


def test_the_commitment_loss_is_the_mean_squared_distance_from_centroids():
    mixer, x_BTD = build(CONFIG), example_input(2, LENGTH)
    unit_BTHK, cluster_BTH = directions(mixer, x_BTD)
    nearest = mixer.centroid_HCK.double()[torch.arange(2), cluster_BTH]
    expected = CONFIG.commitment * (unit_BTHK - nearest).square().sum(-1).mean()
    assert_close(mixer(x_BTD).losses["commitment"], expected, "fp64")


@pytest.mark.parametrize(("placement", "ranks"), [("contiguous", 2), ("zigzag", 4)])
def test_statistics_do_not_depend_on_the_split(placement, ranks):
    mixer, x_BGD = build(CONFIG), example_input(2, LENGTH)
    where = place(placement, ranks, LENGTH)

    def work(rank, hub):
        links = simulated_links(hub, rank, ranks, 1, Ledger())
        view = ShardedView(Plan(where, rank, DOCUMENTS), links, Transports())
        return mixer(x_BGD[:, view.token_ids_BT[0]], view).statistics

    parts = run_ranks(ranks, work)
    for name, expected in mixer(x_BGD, LocalView(DOCUMENTS, LENGTH)).statistics.items():
        assert_close(sum(part[name] for part in parts).double(), expected.double(), "fp64", name)


def test_centroids_are_of_a_layer_and_a_seed_and_kept():
    first, again = (build(CONFIG).state_dict()["centroid_HCK"] for _ in range(2))
    other = build(replace(CONFIG, centroid_seed=1)).state_dict()["centroid_HCK"]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


WRONG = {
    "clusters": RoutingConfig(clusters=0),
    "capacity": RoutingConfig(capacity=0.5),
    "group": RoutingConfig(group=0),
    "momentum": RoutingConfig(momentum=1.0),
    "commitment": RoutingConfig(commitment=-1.0),
    "rope_fraction": RoutingConfig(rope_fraction=-0.1),
    "rope_base": RoutingConfig(rope_base=-1.0),
    "backend": RoutingConfig(backend="fla"),
}


@pytest.mark.parametrize("field", WRONG)
def test_what_cannot_be_built_is_refused_by_name(field):
    with pytest.raises(InputError, match=rf"^X\.{field} = ") as error:
        WRONG[field].check(WIDTH, "X")
    assert "\n" not in str(error.value)
