"""MoSA: who is selected, that only expert choice leaks, and what routers learn and tell."""

from dataclasses import replace

import pytest
import torch

from longctx.errors import InputError
from longctx.mixers.compact_parts import RunningQuantile
from longctx.mixers.mosa import MosaConfig
from longctx.mixers.parts import rotate
from longctx.model.decoder import Decoder, ModelConfig, initialise
from longctx.sequence.expected import WIDTHS, Share
from longctx.sequence.ledger import Ledger, Traffic
from longctx.sequence.local import LocalView
from longctx.sequence.placement import place
from longctx.sequence.plan import Plan
from longctx.sequence.sharded import ShardedView, Transports
from longctx.sequence.simulator import run_ranks
from tests.mixers.examples import VARIANTS, WIDTH
from tests.mixers.test_every_mixer import build, example_input
from tests.sequence.links import simulated_links
from tests.tolerances import assert_close

LENGTH = 64
DOCUMENTS = ((0,), (0, 19, 20))
THRESHOLD = VARIANTS["mosa"]["threshold"]
TOKENS = VARIANTS["mosa"]["token-choice"]
EXPERTS = VARIANTS["mosa"]["expert-choice"]
CAUSAL = pytest.mark.parametrize("config", [THRESHOLD, TOKENS], ids=["threshold", "token-choice"])


def changed_outputs(config: MosaConfig, changed: int) -> int:
    """Outputs before token `changed` that differ when it and what follows do."""
    mixer, x_BTD = build(config, torch.float32), example_input(1, LENGTH, torch.float32)
    other_BTD = x_BTD.clone()
    other_BTD[:, changed:] = x_BTD[:, changed:].flip(-1)
    differ_BT = (mixer(x_BTD).out != mixer(other_BTD).out).any(-1)
    return int(differ_BT[:, :changed].sum())


@pytest.mark.parametrize("changed", [5, LENGTH // 2, LENGTH - 1])
def test_expert_choice_leaks_the_future_and_the_causal_forms_do_not(changed):
    assert changed_outputs(EXPERTS, changed) > 0
    assert changed_outputs(THRESHOLD, changed) == changed_outputs(TOKENS, changed) == 0


def test_expert_choice_is_refused_unless_it_is_allowed():
    with pytest.raises(InputError, match=r"X\.selection = 'expert_choice': leaks the future"):
        replace(EXPERTS, allow_leak=False).check(WIDTH, "X")
    with pytest.raises(InputError, match="choose 'threshold'"):
        replace(EXPERTS, allow_leak=False).check(WIDTH, "X")
    EXPERTS.check(WIDTH, "X")


WRONG = {
    "sparsity": MosaConfig(sparsity=1),
    "capacity": MosaConfig(capacity=0.9),
    "group": MosaConfig(group=0),
    "momentum": MosaConfig(momentum=1.0),
    "balance_weight": MosaConfig(balance_weight=-1.0),
    "rope_fraction": MosaConfig(rope_fraction=1.5),
    "rope_base": MosaConfig(rope_base=0.0),
    "backend": MosaConfig(backend="fla"),
    "num_heads": MosaConfig(num_heads=5),
}


@pytest.mark.parametrize("field", WRONG)
def test_what_cannot_be_built_is_refused_by_name(field):
    with pytest.raises(InputError, match=rf"^X\.{field} = ") as error:
        WRONG[field].check(WIDTH, "X")
    assert "\n" not in str(error.value)


def wishes_by_hand(mixer, config: MosaConfig, logits_H: list[float], position: int) -> list[bool]:
    heads = range(config.num_heads)
    if config.selection == "token_choice":
        best = sorted(heads, key=lambda h: (-logits_H[h], h))[: config.heads_of_token]
        return [h in best for h in heads]
    first = config.include_first and position == 0
    return [first or logits_H[h] > float(mixer.threshold.value_H[h]) for h in heads]


def selected_by_hand(mixer, x_BTD: torch.Tensor) -> torch.Tensor:
    """Token by token, `[B, T, H]`."""
    config, most = mixer.config, mixer.rule.most
    selected = torch.zeros(*x_BTD.shape[:2], config.num_heads, dtype=torch.bool)
    for row, starts in enumerate(DOCUMENTS):
        for start, stop in zip(starts, (*starts[1:], LENGTH), strict=True):
            for position in range(stop - start):
                if position % config.group == 0:
                    found = [0] * config.num_heads
                logits_H = (mixer.router.weight @ x_BTD[row, start + position]).tolist()
                wishes = wishes_by_hand(mixer, config, logits_H, position)
                for h, wants in enumerate(wishes):
                    selected[row, start + position, h] = wants and found[h] < most
                    found[h] += wants
    return selected


@CAUSAL
def test_sorted_slots_equal_attention_under_a_mask_of_selected_tokens(config):
    mixer, x_BTD = build(config), example_input(2, LENGTH)
    view = LocalView(DOCUMENTS, LENGTH)
    selected_BTH = selected_by_hand(mixer, x_BTD)
    assert 0.1 < selected_BTH.double().mean() < 0.9
    rank_BT = torch.arange(LENGTH).expand(2, -1) - view.positions_BT
    same_BTT = rank_BT[:, :, None] == rank_BT[:, None]
    expected = torch.zeros_like(x_BTD)
    for h in range(config.num_heads):
        q, k, v = (x_BTD @ part.weight[h] for part in (mixer.query, mixer.key, mixer.value))
        q, k = (rotate(x[:, :, None], view.positions_BT, 1e4, 0.5)[:, :, 0] for x in (q, k))
        seen_BTT = same_BTT.tril() & selected_BTH[..., h][:, None]
        scores = (q @ k.mT * mixer.size**-0.5).masked_fill(~seen_BTT, -1e300)
        weight_BT1 = (x_BTD @ mixer.router.weight[h]).sigmoid()[..., None]
        y = weight_BT1 * (scores.softmax(-1) @ v @ mixer.project_out.weight[h])
        expected += y * selected_BTH[..., h][..., None]
    assert_close(mixer(x_BTD, view).out, expected, "fp64")


def test_a_group_takes_those_that_come_first_and_the_rest_counts_as_dropped():
    config = replace(THRESHOLD, num_heads=1, head_dim=4, group=8, capacity=1.0, include_first=False)
    mixer, x_BTD = build(config), example_input(1, LENGTH)
    mixer.threshold.value_H.fill_(-torch.inf)
    parts = mixer.project(x_BTD, LocalView.whole(1, LENGTH))
    expected = torch.tensor([8 * group + t for group in range(8) for t in range(4)])
    assert torch.equal(parts.selection.index_LE[0], expected)
    sums = {n: x.double() for n, x in mixer(x_BTD).statistics.items()}
    figures = mixer.adapt(sums, LENGTH)
    assert figures["drop_rate"] == 0.5
    assert figures["load"].tolist() == [0.5]


@pytest.mark.parametrize("config", [THRESHOLD, EXPERTS], ids=["threshold", "expert-choice"])
def test_the_first_token_of_a_document_is_in_every_head_if_wanted(config):
    for wanted in (True, False):
        mixer = build(replace(config, include_first=wanted))
        x_BTD = example_input(2, LENGTH)
        firsts = torch.tensor([0, 64, 83])
        mixer.router.weight.data.zero_()[:, 0] = 1
        x_BTD[..., 0] = torch.where(torch.isin(torch.arange(128).view(2, 64), firsts), -9.0, 1.0)
        parts = mixer.project(x_BTD, LocalView(((0,), (0, 19)), LENGTH))
        for index_E, weight_E in zip(parts.selection.index_LE, parts.weight_HE, strict=True):
            assert torch.isin(firsts, index_E).all() == wanted
            assert (weight_E < 2e-4).sum() == (index_E == -1).sum() + 3 * wanted


@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("centre", [0.0, -50.0])
def test_a_threshold_lets_the_wanted_share_of_new_tokens_pass(scale, centre):
    quantile, generator = RunningQuantile(3, 1 - 1 / 16, 0.9), torch.Generator().manual_seed(2)
    shift = centre + scale * torch.tensor([-1.0, 0.0, 3.0])

    def logits():
        return scale * torch.randn(4, 8192, 3, generator=generator).abs() + shift

    for _ in range(60):
        quantile.adapt(quantile.counts(logits()))
    share_H = (logits() > quantile.value_H).double().mean((0, 1))
    assert ((share_H * 16 - 1).abs() < 0.1).all()


def test_the_first_quantile_is_taken_as_it_is_and_later_ones_move_it():
    quantile = RunningQuantile(1, 0.5, 0.75)
    value, kept = 0.0, (0.0, 1 / 2, 2 / 3, 0.75, 0.75)
    for logit, share in zip((2.0, 4.0, -1.0, 0.0, 1.0), kept, strict=True):
        quantile.adapt(quantile.counts(torch.full((1, 100, 1), logit)))
        width = 0.12 * abs(logit - value) + 0.01
        value, before = float(quantile.value_H), value
        assert abs(value - share * before - (1 - share) * logit) < width
    assert set(quantile.state_dict()) == {"value_H", "steps"}
    for logit in (1e30, -1e30):
        quantile.adapt(quantile.counts(torch.full((1, 100, 1), logit)))
        assert quantile.value_H.isfinite().all()


def test_heads_that_select_nothing_give_zeros_and_finite_gradients():
    mixer = build(replace(THRESHOLD, include_first=False))
    x_BTD = example_input(1, LENGTH).requires_grad_()
    mixer.threshold.value_H.fill_(1e9)
    mixed = mixer(x_BTD)
    gradients = torch.autograd.grad(mixed.out.square().sum(), [x_BTD, *mixer.parameters()])
    assert (mixed.out == 0).all()
    assert all((gradient == 0).all() for gradient in gradients)
    figures = mixer.adapt({n: x.double() for n, x in mixed.statistics.items()}, LENGTH)
    assert figures["drop_rate"] == 0
    assert figures["threshold"].isfinite().all()


@pytest.mark.parametrize("config", VARIANTS["mosa"].values(), ids=VARIANTS["mosa"])
@pytest.mark.parametrize(("placement", "ranks"), [("contiguous", 2), ("zigzag", 4)])
def test_statistics_do_not_depend_on_the_split(config, placement, ranks):
    mixer, x_BGD = build(config), example_input(2, LENGTH)
    where = place(placement, ranks, LENGTH)

    def work(rank, hub):
        links = simulated_links(hub, rank, ranks, 1, Ledger())
        view = ShardedView(Plan(where, rank, DOCUMENTS), links, Transports())
        return mixer(x_BGD[:, view.token_ids_BT[0]], view).statistics

    parts = run_ranks(ranks, work)
    for name, expected in mixer(x_BGD, LocalView(DOCUMENTS, LENGTH)).statistics.items():
        total = sum(part[name] for part in parts)
        if expected.is_floating_point():
            assert_close(total, expected, "fp64", name)
        else:
            assert torch.equal(total, expected), name
            assert expected.sum() > 0, name


def test_what_travels_shrinks_with_sparsity():
    """Forward (P - 1) H slots of a place and K + V elements, and wishes of a byte; no more."""
    ranks, tokens, heads, size = 4, 256, 6, 32
    placement = place("contiguous", ranks, ranks * tokens)
    share = Share(1, placement, 1, Transports(), WIDTHS["bf16"])
    for sparsity in (2, 8, 32):
        config = MosaConfig(
            num_heads=heads, head_dim=size, sparsity=sparsity, capacity=1.0, group=64
        )
        traffic = build(config).expected_traffic(share)
        slots = (ranks - 1) * heads * tokens // sparsity
        assert traffic == {
            ("halo", False): Traffic(1, 63 * heads),
            ("select", False): Traffic(2, slots * (4 + 2 * size * 2)),
            ("select", True): Traffic(1, slots * 2 * size * 4),
        }


def test_the_way_back_to_width_starts_as_small_as_in_other_layers():
    config = ModelConfig(
        width=64, depth=8, pattern="M", mixers={"M": MosaConfig(num_heads=8, head_dim=32)}
    )
    model = Decoder(config, 16)
    initialise(model, 0)
    mixer = model.blocks[3].mixer
    for part, std in ((mixer.query, 0.02), (mixer.router, 0.02), (mixer.project_out, 0.02 / 4)):
        assert abs(float(part.weight.detach().std()) / std - 1) < 0.1
