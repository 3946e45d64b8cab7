"""Mixers of running softmax means, and of dependent running sums: definitions, scales, features."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longctx.errors import InputError
from longctx.mixers import MixerConfig, Place
from longctx.mixers.aaren import AarenConfig
from longctx.mixers.agent import AgentConfig
from longctx.mixers.efficient import EfficientConfig
from longctx.mixers.favor import FavorConfig, random_features
from longctx.mixers.flowformer import FlowformerConfig
from longctx.mixers.rala import RalaConfig
from longctx.sequence.ledger import Ledger
from longctx.sequence.local import LocalView
from longctx.sequence.placement import place
from longctx.sequence.plan import Plan
from longctx.sequence.sharded import ShardedView, Transports
from longctx.sequence.simulator import Hub, run_ranks
from tests.mixers.examples import PLACE, WIDTH
from tests.mixers.test_every_mixer import build, example_input, output_and_gradients
from tests.sequence.links import simulated_links
from tests.tolerances import assert_close, error_of

CONFIGS: dict[str, MixerConfig] = {
    "aaren": AarenConfig(num_heads=2, head_dim=3, value_dim=5),
    "agent": AgentConfig(num_heads=2, head_dim=3, num_agents=4, value_dim=5),
    "efficient": EfficientConfig(num_heads=2, head_dim=3, value_dim=5),
    "favor": FavorConfig(num_heads=2, head_dim=3, num_features=7, value_dim=5),
    "rala": RalaConfig(num_heads=2, head_dim=5, value_dim=3),
    "flowformer": FlowformerConfig(num_heads=2, head_dim=3, value_dim=5),
}
kinds = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
SCORED = [CONFIGS[kind] for kind in ("aaren", "agent", "efficient", "favor", "rala")]
LENGTH = 30
DOCUMENTS = ((0,), (0, 1, 2, 11, 12, 29))


def heads(linear, x_TD: Tensor, num_heads: int) -> Tensor:
    """`[H, T, K]`."""
    return linear(x_TD).unflatten(-1, (num_heads, -1)).transpose(0, 1)


def softmax_so_far(score_HTT: Tensor) -> Tensor:
    """Over tokens that are not later."""
    later = torch.ones(score_HTT.shape[-2:]).triu(1).bool()
    return score_HTT.masked_fill(later, -torch.inf).softmax(-1)


def aaren(mixer, x_TD: Tensor) -> Tensor:
    k, v = heads(mixer.key, x_TD, 2), heads(mixer.value, x_TD, 2)
    score_HT = torch.einsum("htk,hk->ht", k, mixer.query) / math.sqrt(3)
    return softmax_so_far(score_HT[:, None].expand(-1, len(x_TD), -1)) @ v


def agent(mixer, x_TD: Tensor) -> Tensor:
    q, k, v = (heads(f, x_TD, 2) for f in (mixer.query, mixer.key, mixer.value))
    asked_HTA = (q @ mixer.agents.mT / math.sqrt(3)).softmax(-1)
    score_HAT = mixer.agents @ k.mT / math.sqrt(3)
    seen_HATT = softmax_so_far(score_HAT[:, :, None].expand(-1, -1, len(x_TD), -1))
    return torch.einsum("hta,hatj,hjv->htv", asked_HTA, seen_HATT, v)


def efficient(mixer, x_TD: Tensor) -> Tensor:
    q, k, v = (heads(f, x_TD, 2) for f in (mixer.query, mixer.key, mixer.value))
    seen_HKTT = softmax_so_far(k.mT[:, :, None].expand(-1, -1, len(x_TD), -1))
    return torch.einsum("htk,hktj,hjv->htv", q.softmax(-1), seen_HKTT, v)


def favor(mixer, x_TD: Tensor) -> Tensor:
    q, k, v = (heads(f, x_TD, 2) for f in (mixer.query, mixer.key, mixer.value))
    w_HKR = mixer.features_HRK.double().mT
    q, k = q * 3**-0.25, k * 3**-0.25
    exponent_q, exponent_k = q @ w_HKR, k @ w_HKR - k.square().sum(-1, keepdim=True) / 2
    phi_q = (exponent_q - exponent_q.amax(-1, keepdim=True)).exp() + 1e-4
    weight_HTT = (phi_q @ (exponent_k.exp() + 1e-4).mT).tril()
    return weight_HTT @ v / weight_HTT.sum(-1, keepdim=True)


def rala(mixer, x_TD: Tensor) -> Tensor:
    q, k, v = (heads(f, x_TD, 2) for f in (mixer.query, mixer.key, mixer.value))
    q, k = (torch.where(x > 0, x + 1, x.exp()) for x in (q, k))
    t = torch.arange(len(x_TD))[:, None]
    log_e_HT = (q.cumsum(1) / (t + 1) * k).sum(-1) / math.sqrt(5)
    turn = torch.polar(torch.ones(()).double(), t * 10000.0 ** (-torch.arange(2).double() / 2))

    def turned(x: Tensor) -> Tensor:
        pairs = torch.complex(x[..., :2], x[..., 2:4]) * turn
        return torch.cat((pairs.real, pairs.imag, x[..., 4:]), -1)

    e_HTT = softmax_so_far(log_e_HT[:, None].expand(-1, len(x_TD), -1))
    above = (turned(q) @ turned(k).mT * e_HTT) @ v
    return above / ((q @ k.mT * e_HTT).sum(-1, keepdim=True) + 1e-6)


def flowformer(mixer, x_TD: Tensor) -> Tensor:
    """Every sum by itself, from the tokens it is over."""
    q, k, v = (heads(f, x_TD, 2) for f in (mixer.query, mixer.key, mixer.value))
    q, k, eps, tokens = q.sigmoid(), k.sigmoid(), 1e-6, range(len(x_TD))

    def against(x: Tensor, parts: list[Tensor], t: int) -> Tensor:
        return ((x[:, t] + eps) * (sum(parts[: t + 1]) + eps)).sum(-1, keepdim=True)

    ks, qs = list(k.unbind(1)), list(q.unbind(1))
    a = [(t + 1) / against(q, ks, t) for t in tokens]
    b = [(t + 1) / against(k, qs, t) for t in tokens]
    c = [against(q, [b[j] * ks[j] for j in tokens], t) / (t + 1) for t in tokens]
    d = [against(k, [a[j] * qs[j] for j in tokens], t) / (t + 1) for t in tokens]
    e = [x.clamp(-1, 1).exp() for x in d]
    p = [(t + 1) * e[t] / sum(e[: t + 1]) for t in tokens]
    outputs = []
    for t in tokens:
        read = [(qs[t] * ks[j]).sum(-1, keepdim=True) * p[j] * v[:, j] for j in range(t + 1)]
        outputs.append(c[t].sigmoid() * a[t] / (t + 1) * sum(read))
    return torch.stack(outputs, 1)


FORMULAS = (aaren, agent, efficient, favor, rala, flowformer)


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: formula.__name__)
def test_a_core_equals_the_formula_written_with_whole_matrices(formula):
    mixer, x_BTD = build(CONFIGS[formula.__name__]), example_input(2, LENGTH)
    view = LocalView(DOCUMENTS, LENGTH)
    projected = mixer.project(x_BTD, view)
    rows = []
    for x_TD, starts in zip(x_BTD, DOCUMENTS):
        edges = (*starts, LENGTH)
        parts = [formula(mixer, x_TD[a:b]) for a, b in zip(edges, edges[1:])]
        rows.append(torch.cat(parts, 1).transpose(0, 1))
    expected = torch.stack(rows)
    assert_close(mixer.core(projected, view), expected, "fp64")
    assert_close(mixer.core_reference(projected, view), expected, "fp64", "the definition")


def strong(config: MixerConfig, dtype: torch.dtype, scale: float):
    """A mixer whose scores reach into the hundreds."""
    mixer = build(config, dtype)
    for linear in (mixer.key, getattr(mixer, "query", None)):
        if isinstance(linear, torch.nn.Linear):
            linear.weight.data *= scale
    return mixer


def scores_of(mixer, x_BTD: Tensor) -> Tensor:
    """Log weights of tokens."""
    view, seen = LocalView(DOCUMENTS, LENGTH), []

    class Recording(LocalView):
        def running_log_sum_exp(self, x_BTR):
            seen.append(x_BTR.detach())
            return super().running_log_sum_exp(x_BTR)

    mixer(x_BTD, Recording(DOCUMENTS, view.plan.length))
    return seen[0]


@pytest.mark.parametrize("config", SCORED, ids=lambda config: config.kind)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_scores_in_the_hundreds_give_finite_values_and_gradients(config, dtype):
    scale = {"aaren": 250, "agent": 250, "efficient": 90, "favor": 30, "rala": 14}[config.kind]
    mixer, x_BTD = strong(config, dtype, scale), example_input(2, LENGTH, dtype)
    assert scores_of(mixer, x_BTD).abs().max() > 200 or config.kind == "favor"
    view = LocalView(DOCUMENTS, LENGTH)
    actual = output_and_gradients(mixer, mixer, x_BTD, view)
    for name, value in actual.items():
        assert torch.isfinite(value).all(), name
    if dtype == torch.float64:
        expected = output_and_gradients(mixer, mixer.reference, x_BTD, view)
        for name, value in expected.items():
            assert_close(actual[name], value, "fp64", name)


@pytest.mark.parametrize("config", SCORED, ids=lambda config: config.kind)
def test_keys_that_grow_along_the_sequence_do_not_make_the_split_visible(config):
    """With scales of each rank's own, weights of different ranks would not fit together."""
    length, ranks = 61, 4
    mixer, x_BGD = strong(config, torch.float64, 3.0), example_input(1, length)
    x_BGD = x_BGD * torch.linspace(0.1, 5, length, dtype=torch.float64)[:, None]
    whole = mixer(x_BGD, LocalView(((0, 7),), length)).out

    def work(rank: int, hub: Hub):
        plan = Plan(place("zigzag", ranks, length), rank, ((0, 7),))
        view = ShardedView(plan, simulated_links(hub, rank, ranks, 1, Ledger()), Transports())
        here = plan.token_ids_BT[0]
        with torch.no_grad():
            return here, mixer(x_BGD[:, here], view).out

    for here, out in run_ranks(ranks, work):
        assert_close(out, whole[:, here], "fp64")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_single_precision_does_not_drift_over_a_long_sequence(config):
    """16384 tokens: outputs and gradients of fp32 beside those of fp64."""
    length = 1 << 14
    wide, narrow = build(config), build(config, torch.float32)
    x_BTD, view = example_input(1, length), LocalView.whole(1, length)
    expected = output_and_gradients(wide, wide, x_BTD, view)
    actual = output_and_gradients(narrow, narrow, x_BTD.float(), view)
    for name in expected:
        assert_close(actual[name], expected[name], "fp32", name)


def test_random_features_are_those_of_their_seed_layer_and_head():
    first = random_features(0, 1, 2, 9, 4)
    assert torch.equal(first, random_features(0, 1, 2, 9, 4))
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        assert not torch.equal(first, random_features(*other, 9, 4))
    assert torch.equal(
        FavorConfig(num_heads=2).build(PLACE).features_HRK[1][:4],
        random_features(0, PLACE.layer, 1, 4, WIDTH // 2),
    )


def test_random_features_are_orthogonal_in_blocks_and_as_long_as_normal_vectors():
    rows = torch.cat([random_features(seed, 0, 0, 10, 4) for seed in range(200)]).double()
    products = torch.stack([x @ x.mT for x in rows.view(200, 10, 4)[:, :4]])
    between = products - torch.diag_embed(products.diagonal(dim1=1, dim2=2))
    assert_close(between, torch.zeros_like(between), "fp32")
    assert abs(float(rows.square().sum(-1).mean()) - 4) < 0.2
    assert float(rows.mean(0).abs().max()) < 0.1


def test_many_random_features_come_close_to_softmax_attention():
    def error(num_features: int) -> float:
        config = FavorConfig(num_heads=2, head_dim=4, num_features=num_features)
        mixer, x_BTD = strong(config, torch.float64, 0.4), example_input(1, LENGTH)
        q, k, v = (heads(f, x_BTD[0], 2) for f in (mixer.query, mixer.key, mixer.value))
        exact = softmax_so_far(q @ k.mT / 2) @ v
        view = LocalView.whole(1, LENGTH)
        found = mixer.core(mixer.project(x_BTD, view), view)[0].transpose(0, 1)
        return error_of(found, exact, "bf16")

    assert error(4096) < 0.05
    assert error(4096) < error(16)


def test_the_default_number_of_features_is_that_of_the_paper():
    assert FavorConfig(head_dim=128).features_of_head(512) == 621
    assert FavorConfig(num_heads=16).features_of_head(16) == 1


@pytest.mark.parametrize("kind", ["aaren", "agent"])
def test_what_is_learned_in_place_of_queries_starts_apart(kind):
    mixer = CONFIGS[kind].build(PLACE)
    name = "query" if kind == "aaren" else "agents"
    drawn = mixer.initial(name, torch.Generator().manual_seed(0))
    assert drawn.shape == getattr(mixer, name).shape
    assert 0.5 < float(drawn.std()) < 1.5
    assert mixer.initial("key.weight", torch.Generator()) is None


@kinds
@pytest.mark.parametrize("value_dim", [0, 4])
def test_values_can_have_another_size_than_keys(config, value_dim):
    mixer = replace(config, value_dim=value_dim, head_dim=0).build(Place(WIDTH, 0, 1))
    assert mixer.value.out_features == 2 * (value_dim or WIDTH // 2)
    assert mixer(torch.zeros(1, 3, WIDTH)).out.shape == (1, 3, WIDTH)


@pytest.mark.parametrize(
    ("config", "field"),
    [(replace(config, value_dim=-1), "value_dim") for config in CONFIGS.values()]
    + [
        (AgentConfig(num_agents=0), "num_agents"),
        (FavorConfig(num_features=-1), "num_features"),
        (FavorConfig(feature_seed=-1), "feature_seed"),
        (RalaConfig(rope_base=0.0), "rope_base"),
        (FlowformerConfig(clamp=0.0), "clamp"),
        (AarenConfig(num_heads=0), "num_heads"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(config, field):
    with pytest.raises(InputError, match=rf"^model\.mixers\.A\.{field} = ") as refused:
        config.check(512, "model.mixers.A")
    assert "\n" not in str(refused.value)


@kinds
def test_heads_must_divide_for_ulysses_only_and_fla_cannot_split(config):
    assert config.refusal(Transports("allgather", heads=3)) == ""
    assert config.refusal(Transports("ulysses", heads=2)) == ""
    assert config.refusal(Transports("ulysses", heads=3)).startswith("num_heads = 2 ")
    assert config.on("fla").refusal(Transports()).startswith("backend = 'fla' ")
    assert config.on("fla").refusal(Transports("ulysses", heads=2)) == ""
