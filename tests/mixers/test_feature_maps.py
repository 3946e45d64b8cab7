"""Linear attention against definitions by pairs of tokens, written anew from the formulas."""

import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.errors import InputError
from longctx.mixers import Place
from longctx.mixers.feature_maps import MAPS, Cosformer, Heads, Lrpe
from longctx.mixers.linear import Linear, LinearConfig, log_decay
from longctx.mixers.moh import MoHConfig
from longctx.model.decoder import Decoder, ModelConfig, initialise
from longctx.sequence.local import LocalView
from tests.mixers.examples import WIDTH
from tests.mixers.test_every_mixer import build, example_input, packed_view
from tests.tolerances import assert_close

LENGTH = 37
LONGEST = 50
PLAIN = LinearConfig(num_heads=2, decay="none", gate="none", output_norm=False)
VIEWS = {"one document": (), "packed": (1, 9, 10, 25)}
views = pytest.mark.parametrize("cuts", VIEWS.values(), ids=VIEWS.keys())


class Pairs(NamedTuple):
    """What a definition needs: queries and keys before any map `[B, H, T, K]`, and distances."""

    mixer: Linear
    q: Tensor
    k: Tensor
    distance: Tensor


def raw(mixer: Linear, x_BTD: Tensor) -> list[Tensor]:
    """Queries, keys and values before any map, `[B, H, T, D]`."""
    layers = (mixer.query, mixer.key, mixer.value)
    return [layer(x_BTD).unflatten(-1, (mixer.num_heads, -1)).transpose(1, 2) for layer in layers]


def visible(view: LocalView) -> Tensor:
    """`[B, 1, T, T]`: whether a query sees a key."""
    first_BT = torch.arange(LENGTH) - view.positions_BT
    same = first_BT[:, :, None] == first_BT[:, None]
    return (same & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())[:, None]


def distance(view: LocalView) -> Tensor:
    return (view.positions_BT[:, :, None] - view.positions_BT[:, None])[:, None].double()


def hedgehog(pairs: Pairs) -> Tensor:
    def features(x, feature_map):
        w_HKK = feature_map.matrix.weight.view(pairs.mixer.num_heads, x.shape[-1], x.shape[-1])
        y = (w_HKK[:, None] @ x[..., None])[..., 0]
        both = torch.cat((y, -y), -1).exp()
        return both / both.sum(-1, keepdim=True)

    return features(pairs.q, pairs.mixer.map_query) @ features(pairs.k, pairs.mixer.map_key).mT


def t2r(pairs: Pairs) -> Tensor:
    def features(x, feature_map):
        size, matrix = x.shape[-1], feature_map.matrix
        w, b = matrix.weight.split(size), matrix.bias.split(size)
        return torch.stack([(x[:, h] @ w[h].T + b[h]).clamp(min=0) for h in range(len(w))], 1)

    return features(pairs.q, pairs.mixer.map_query) @ features(pairs.k, pairs.mixer.map_key).mT


def based(pairs: Pairs) -> Tensor:
    s = pairs.q @ pairs.k.mT / math.sqrt(pairs.q.shape[-1])
    return 1 + s + s**2 / 2


def rebased(pairs: Pairs) -> Tensor:
    def normed(x, feature_map):
        centred = x - x.mean(-1, keepdim=True)
        centred = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred * feature_map.gain + feature_map.shift

    score = normed(pairs.q, pairs.mixer.map_query) @ normed(pairs.k, pairs.mixer.map_key).mT
    return score**2 / pairs.q.shape[-1]


def dpfp(pairs: Pairs) -> Tensor:
    q, k = (torch.cat((x, -x), -1).clamp(min=0) for x in (pairs.q, pairs.k))
    score, size = 0, q.shape[-1]
    for step in range(1, pairs.mixer.config.nu + 1):
        for i in range(size):
            mapped_q, mapped_k = (x[..., i] * x[..., (i - step) % size] for x in (q, k))
            score = score + mapped_q[..., :, None] * mapped_k[..., None, :]
    return score


def cosformer(pairs: Pairs) -> Tensor:
    return pairs.q.relu() @ pairs.k.relu().mT * torch.cos(math.pi * pairs.distance / (2 * LONGEST))


def fast(pairs: Pairs) -> Tensor:
    lengths = [(x.square().sum(-1) + 1e-6).sqrt() for x in (pairs.q, pairs.k)]
    scale_H11 = (pairs.mixer.map_query.scale * pairs.mixer.map_key.scale)[:, None, None]
    s = scale_H11 * (pairs.q @ pairs.k.mT) / (lengths[0][..., :, None] * lengths[1][..., None, :])
    return 1 + s + s**2 / 2


DEFINITIONS = {
    hedgehog: replace(PLAIN, feature_map="hedgehog"),
    t2r: replace(PLAIN, feature_map="t2r"),
    based: replace(PLAIN, feature_map="based", feature_dim=3),
    rebased: replace(PLAIN, feature_map="rebased", feature_dim=4),
    dpfp: replace(PLAIN, feature_map="dpfp", nu=3),
    cosformer: replace(PLAIN, feature_map="cosformer", longest=LONGEST),
    fast: replace(PLAIN, feature_map="fast", feature_dim=5),
}


def assert_weighted(mixer: Linear, weights: Tensor, x_BTD: Tensor, view: LocalView) -> None:
    """The mixer and its reference are these weights `[B, H, T, T]` of the values."""
    wanted = mixer.output((weights @ raw(mixer, x_BTD)[2]).transpose(1, 2))
    assert_close(mixer(x_BTD, view).out, wanted, "fp64")
    assert_close(mixer.reference(x_BTD, view).out, wanted, "fp64")


@views
@pytest.mark.parametrize("decay", ["none", "alibi"])
@pytest.mark.parametrize("denominator", [True, False])
@pytest.mark.parametrize("definition", DEFINITIONS, ids=lambda f: f.__name__)
def test_a_map_is_its_definition_by_pairs(definition, denominator, decay, cuts):
    config = replace(DEFINITIONS[definition], denominator=denominator, decay=decay)
    mixer, x_BTD, view = build(config), example_input(2, LENGTH), packed_view(2, LENGTH, cuts)
    q, k, _ = raw(mixer, x_BTD)
    weights = definition(Pairs(mixer, q, k, distance(view)))
    if decay != "none":
        log_decay_H = log_decay(decay, 2, Place(WIDTH, 1, 3))
        weights = weights * (log_decay_H[:, None, None] * distance(view)).exp()
    weights = weights.where(visible(view), 0)
    if denominator:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)
    assert_weighted(mixer, weights, x_BTD, view)


@views
@pytest.mark.parametrize("feature_map", ["silu", "relu", "based"])
def test_inline_centres_scores_and_its_weights_sum_to_one(feature_map, cuts):
    config = replace(PLAIN, feature_map=feature_map, feature_dim=3, inline=True)
    mixer, x_BTD, view = build(config), example_input(2, LENGTH), packed_view(2, LENGTH, cuts)
    q, k, _ = raw(mixer, x_BTD)
    size = q.shape[-1]
    if feature_map == "based":
        scores = based(Pairs(mixer, q, k, distance(view)))
    else:
        scores = getattr(F, feature_map)(q) @ getattr(F, feature_map)(k).mT
    seen_B1T1 = (view.positions_BT + 1)[:, None, :, None]
    scores = (scores / math.sqrt(size) / seen_B1T1).where(visible(view), 0)
    weights = scores - scores.sum(-1, keepdim=True) / seen_B1T1 + 1 / seen_B1T1.double()
    weights = weights.where(visible(view), 0)
    assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), "fp64")
    assert (weights < 0).any()
    assert_weighted(mixer, weights, x_BTD, view)


@views
def test_lrpe_turns_every_channel_by_the_distance(cuts):
    config = replace(PLAIN, head_dim=5, lrpe="all", decay="alibi")
    mixer, x_BTD, view = build(config), example_input(2, LENGTH), packed_view(2, LENGTH, cuts)
    q, k, _ = (F.silu(x) for x in raw(mixer, x_BTD))
    angle = distance(view)[..., None] * mixer.lrpe.theta.view(2, 1, 1, 5)
    weights = (q[..., :, None, :] * k[..., None, :, :] * angle.cos()).sum(-1)
    weights = weights * (mixer.log_decay_H[:, None, None] * distance(view)).exp()
    assert_weighted(mixer, weights.where(visible(view), 0), x_BTD, view)


def test_lrpe_depends_on_distances_alone_and_starts_as_in_the_paper():
    lrpe = Lrpe(2, 3)
    exponents = [0, 2 / 6, 4 / 6, 6 / 6, 8 / 6, 10 / 6]
    assert_close(lrpe.theta, torch.tensor([10000.0**-e for e in exponents]), "fp32")
    lrpe.theta.data = torch.linspace(0.1, 2, 6, dtype=torch.float64)
    q, k = torch.randn(2, 1, LENGTH, 2, 3, dtype=torch.float64)
    near_BT = torch.arange(LENGTH)[None]

    def scores(positions_BT):
        turned_q, turned_k = lrpe(q, k, positions_BT)
        return torch.einsum("bihc,bjhc->bhij", turned_q, turned_k)

    assert_close(scores(near_BT + 100_000), scores(near_BT), "fp64")


def test_lrpe_is_in_the_first_layer_alone_unless_all_have_it():
    def sizes(lrpe):
        config = replace(PLAIN, lrpe=lrpe)
        mixers = [config.build(Place(WIDTH, layer, 3)) for layer in range(3)]
        assert all((m.lrpe is None) == (m.features == 8) for m in mixers)
        return [mixer.state_size for mixer in mixers]

    assert sizes("none") == [64, 64, 64]
    assert sizes("first") == [128, 64, 64]
    assert sizes("all") == [128, 128, 128]


def test_positions_that_bf16_cannot_hold_are_told_apart():
    positions_BT = torch.tensor([[255, 257, 100_001]])
    x_BTHK = torch.ones(1, 3, 2, 3, dtype=torch.bfloat16)
    lrpe = Lrpe(2, 3)
    turned, _ = lrpe(x_BTHK, x_BTHK, positions_BT)
    angle = positions_BT[..., None].double() * lrpe.theta.detach().double()
    wanted = torch.stack((angle.cos(), angle.sin()), -1).view(1, 3, 2, 3, 2)
    assert_close(turned.unflatten(-1, (2, 3)).mT, wanted, "fp32")
    mapped = Cosformer(Heads(2, 3, longest=1 << 17))(x_BTHK, positions_BT)
    angle = positions_BT.double() * math.pi / 2**18
    assert_close(mapped[..., 0, ::3], torch.stack((angle.cos(), angle.sin()), -1), "fp32")


def test_simple_norm_divides_by_the_length_and_has_no_weights():
    mixer = build(replace(PLAIN, value_dim=6, output_norm=True, norm="simple"))
    assert not list(mixer.norm.parameters())
    y_BTHV = torch.randn(2, 3, 2, 6, dtype=torch.float64)
    length = y_BTHV.square().sum(-1, keepdim=True).sqrt()
    assert_close(mixer.norm(y_BTHV), y_BTHV * math.sqrt(6) / length, "fp64")
    assert_close(mixer.norm(y_BTHV.bfloat16()), mixer.norm(y_BTHV), "bf16")


@pytest.mark.parametrize(
    ("change", "features"),
    [
        ({"feature_map": "hedgehog"}, 16),
        ({"feature_map": "t2r"}, 8),
        ({"feature_map": "based"}, 153),
        ({"feature_map": "rebased"}, 136),
        ({"feature_map": "fast"}, 153),
        ({"feature_map": "dpfp"}, 48),
        ({"feature_map": "cosformer", "longest": 64}, 16),
    ],
)
def test_a_state_has_the_mapped_size(change, features):
    config = replace(PLAIN, value_dim=7, **change)
    _, memory = build(config).step(example_input(1, 3), LocalView.whole(1, 3), None)
    assert [state.shape for state in memory[1]] == [(1, 2, features, 7)]
    for read, size in (("denominator", 8 * features), ("inline", 8 * features + 7)):
        mixer = build(replace(config, **{read: True}))
        assert mixer.state_size == size
        _, memory = mixer.step(example_input(1, 3), LocalView.whole(1, 3), None)
        assert sum(state.numel() for state in memory[1]) == 2 * size


FORMULAS = {
    "identity": lambda x: x,
    "silu": F.silu,
    "unit": lambda x: x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12),
    "relu": F.relu,
    "elu1": lambda x: F.elu(x) + 1,
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: x.softmax(-1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMULAS)
def test_maps_without_parameters_are_their_functions_bit_for_bit(name, dtype):
    x_BTHK = torch.randn(2, 5, 3, 4, dtype=dtype)
    feature_map = MAPS[name].make(Heads(3, 4))
    assert not list(feature_map.parameters())
    mapped = feature_map(x_BTHK, torch.arange(10).view(2, 5))
    assert torch.equal(mapped, FORMULAS[name](x_BTHK))


@pytest.mark.parametrize("name", [name for name, entry in MAPS.items() if entry.is_positive])
def test_positive_maps_give_no_negative_weight(name):
    feature_map = MAPS[name].make(Heads(2, 4, longest=LENGTH)).double()
    x_BTHK = 3 * torch.randn(2, 1, LENGTH, 2, 4, dtype=torch.float64)
    q, k = (feature_map(x, torch.arange(LENGTH)[None]) for x in x_BTHK)
    assert torch.einsum("bihc,bjhc->bhij", q, k).min() >= -1e-12


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"feature_map": "elu"}, ["m.feature_map = 'elu'", "expected one of identity, silu"]),
        ({"feature_map": "based", "feature_dim": 1}, ["m.feature_dim = 1", "at least 2"]),
        ({"feature_map": "dpfp", "nu": 0}, ["m.nu = 0", "at least 1"]),
        ({"feature_map": "dpfp", "nu": 256}, ["m.nu = 256", "below 256"]),
        ({"value_dim": -1}, ["m.value_dim = -1", "0 or positive"]),
        ({"head_dim": -1}, ["m.head_dim = -1"]),
        ({"feature_map": "cosformer"}, ["m.longest = 0", "train.seq_len"]),
        ({"denominator": True}, ["m.denominator", "positive", "hedgehog"]),
        (
            {"denominator": True, "feature_map": "relu", "lrpe": "first"},
            ["m.denominator", "m.lrpe"],
        ),
        (
            {"denominator": True, "feature_map": "relu", "inline": True},
            ["m.denominator", "m.inline", "leave one of them out"],
        ),
        ({"inline": True, "decay": "alibi"}, ["m.inline", 'decay = "none"']),
        (
            {"feature_map": "based", "feature_dim": 128},
            ["m.feature_dim = 128", "8385 features", "66.0 MiB", "32 MiB", "smaller feature_dim"],
        ),
        ({"feature_map": "dpfp", "nu": 100}, ["m.nu = 100", "201.6 MiB", "smaller nu"]),
        (
            {"feature_map": "dpfp", "backend": "triton"},
            ["m.backend = 'triton'", "768 features", "up to 256", "choose auto or torch"],
        ),
        ({"head_dim": 1024}, ["m.head_dim = 1024", "64.1 MiB", "smaller head_dim"]),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(change, words):
    with pytest.raises(InputError) as caught:
        replace(PLAIN, **{"num_heads": 16, **change}).check(2048, "m")
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("feature_map", MAPS)
def test_every_map_can_be_built_at_the_size_of_a_model(feature_map):
    for width, num_heads in ((2048, 16), (4096, 32)):
        config = LinearConfig(num_heads=num_heads, feature_map=feature_map, longest=1 << 20)
        config.check(width, "m")


def test_more_features_than_kernels_take_are_computed_by_torch():
    def backend(size, **change):
        mixer = replace(PLAIN, head_dim=size, **change).build(Place(WIDTH, 1, 3))
        return mixer.backend

    assert backend(256) == backend(128, feature_map="hedgehog", denominator=True) == "auto"
    assert backend(128, feature_map="dpfp") == "torch"
    assert backend(256, feature_map="relu", denominator=True) == "torch"


def test_cosformer_refuses_sequences_that_are_too_long():
    config = replace(PLAIN, feature_map="cosformer", longest=512)
    config.check_length(512, "m")
    with pytest.raises(InputError, match=r"m\.longest = 512 .* train\.seq_len = 513.*513 or more"):
        config.check_length(513, "m")
    replace(PLAIN, longest=512).check_length(513, "m")


def test_learned_maps_start_as_plain_ones():
    names = ("hedgehog", "t2r", "rebased", "fast")
    mixers = {n: replace(PLAIN, lrpe="first", feature_map=n, feature_dim=3) for n in names}
    mixers = dict(zip("ABCD", mixers.values()))
    config = ModelConfig(width=WIDTH, depth=4, pattern="ABCD", mixers=mixers)
    model = Decoder(config, 29)
    before = {name: p.clone() for name, p in model.named_parameters() if "map_" in name}
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.fill_(torch.nan)
    initialise(model, 1)
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all()
        assert "map_" not in name or torch.equal(parameter, before[name])
    x_BTHK = torch.randn(1, 5, 2, 8)
    positions_BT = torch.arange(5)[None]
    hedgehog_map, t2r_map = (model.blocks[i].mixer.map_key for i in range(2))
    assert torch.equal(t2r_map(x_BTHK, positions_BT), x_BTHK.relu())
    wanted = torch.cat((x_BTHK, -x_BTHK), -1).softmax(-1)
    assert torch.equal(hedgehog_map(x_BTHK, positions_BT), wanted)


def test_matrices_of_a_map_count_within_routed_heads_too():
    inner = replace(PLAIN, num_heads=4, feature_map="identity")
    contexts_M = torch.arange(1, 31)

    def flops(feature_map):
        return build(MoHConfig(inner=replace(inner, feature_map=feature_map))).flops(contexts_M)

    assert flops("t2r") - flops("identity") == 30 * 2 * (2 * 4 * 4 * 4)
