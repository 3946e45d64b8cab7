"""What mixers with a decay of their own per token promise beyond what every mixer does."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.errors import InputError
from longctx.mixers import Mixer, MixerConfig, Place
from longctx.mixers.gla import GLAConfig
from longctx.mixers.hgrn2 import HGRN2Config, forget_gate
from longctx.mixers.mamba2 import Mamba2Config
from longctx.mixers.parts import TokenShift
from longctx.model.decoder import Decoder, ModelConfig, initialise
from longctx.sequence.local import LocalView
from longctx.sequence.sharded import Transports
from tests.mixers.test_every_mixer import build, example_input, output_and_gradients
from tests.tolerances import assert_close

LENGTH = 150
PER_TOKEN = (-5.0, -60.0, -3000.0)
GLA = GLAConfig(num_heads=2, head_dim=3, temperature=2.0)
HGRN2 = HGRN2Config(num_heads=2, head_dim=3, bounds="constant", lower_bound=0.0)
MAMBA2 = Mamba2Config(num_heads=2, head_dim=3, state_size=3)
KINDS = {"gla": GLA, "hgrn2": HGRN2, "mamba2": MAMBA2}


def strongly(config: MixerConfig, per_token: float, dtype: torch.dtype) -> Mixer:
    """A mixer half of whose channels, or heads, keep about exp(per_token) of a state each token."""
    mixer = build(config, dtype)
    with torch.no_grad():
        if config.kind == "gla":
            mixer.decay.up.bias[::2] = per_token * mixer.temperature
        if config.kind == "hgrn2":
            # The first channel of the input is 1.
            mixer.forget.weight[::2, 0] = per_token
        if config.kind == "mamba2":
            mixer.decay.bias[:] = -3
            mixer.decay.log_rate[::2] = math.log(-per_token / 0.1)
    return mixer


@pytest.mark.parametrize("per_token", PER_TOKEN)
@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_strong_decays_neither_overflow_nor_lose_gradients(config, per_token):
    """In fp32 gradients of a rate are those of log decays, times log decays: so are their errors.

    Those of Mamba-2 are therefore held to the table at -5 only, and to be finite beyond.
    """
    x_BTD = example_input(2, LENGTH)
    x_BTD[..., 0] = 1
    view = LocalView(((0,), (0, 70)), LENGTH)
    wide, narrow = (strongly(config, per_token, d) for d in (torch.float64, torch.float32))
    log_decay = wide.project(x_BTD, view)[3]
    assert log_decay.min() < 0.8 * per_token
    assert log_decay.max() > -1
    expected = output_and_gradients(wide, wide.reference, x_BTD, view)
    actual = output_and_gradients(wide, wide, x_BTD, view)
    in_fp32 = output_and_gradients(narrow, narrow, x_BTD.float(), view)
    for name, value in expected.items():
        assert_close(actual[name], value, "fp64", name)
        assert torch.isfinite(in_fp32[name]).all(), name
        if config.kind != "mamba2" or per_token == -5 or name == "output":
            assert_close(in_fp32[name], value, "fp32", name)


@pytest.mark.parametrize("diagonal", [False, True], ids=["scalar", "diagonal"])
def test_a_decay_of_1_does_not_drift_over_64k_tokens(diagonal):
    length, H, K = 1 << 16, 2, 4
    generator = torch.Generator().manual_seed(2)
    q, k, v = torch.randn(3, 1, length, H, K, generator=generator).unbind()
    k, v = (k + 0.5), (v + 0.5)
    log_decay = torch.zeros(1, length, H, K) if diagonal else torch.zeros(1, length, H)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    actual = LocalView.whole(1, length).decay_attention(*inputs, log_decay)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    state = (exact[1][..., None] * exact[2][..., None, :]).cumsum(1)
    expected = (exact[0][..., None] * state).sum(-2)
    assert_close(actual, expected, "fp32", "output")
    weight = torch.randn(q.shape, generator=generator)
    gradients = torch.autograd.grad((actual * weight).sum(), inputs)
    wanted = torch.autograd.grad((expected * weight).sum(), exact)
    for name, gradient, exact_gradient in zip("qkv", gradients, wanted):
        assert_close(gradient, exact_gradient, "fp32", f"gradient of {name}")


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_log_decays_are_in_single_precision_under_autocast(config):
    mixer, view = build(config, torch.float32), LocalView.whole(1, 9)
    with torch.autocast("cpu", torch.bfloat16):
        projected = mixer.project(example_input(1, 9, torch.float32), view)
    assert projected[3].dtype == torch.float32
    assert {x.dtype for x in projected[:3]} == {torch.bfloat16}
    assert (projected[3] <= 0).all()


@pytest.mark.parametrize("bound", [0.0, 1e-6, 1 / 64, 0.5, 0.999])
def test_forget_gates_are_exact_at_both_ends(bound):
    f = torch.linspace(-80, 80, 641).requires_grad_()
    written, log_decay = forget_gate(f, bound)
    for raw, k, g in zip(f.tolist(), written.tolist(), log_decay.tolist()):
        k_exact = (1 - bound) / (1 + math.exp(raw))
        g_exact = math.log1p(-k_exact) if bound else min(raw, 0) - math.log1p(math.exp(-abs(raw)))
        assert k == pytest.approx(k_exact, rel=2e-6)
        assert g == pytest.approx(g_exact, rel=2e-6)
    (log_decay + written).sum().backward()
    assert torch.isfinite(f.grad).all()


def test_rising_bounds_share_the_depth_and_leave_the_first_layer_free():
    config = HGRN2Config(lower_bound=0.8)
    assert [config.bound_of(Place(16, layer, 4)) for layer in range(4)] == [
        0.0,
        pytest.approx(0.2),
        pytest.approx(0.4),
        pytest.approx(0.6),
    ]
    mixer = HGRN2Config(num_heads=2).build(Place(16, 3, 4))
    with torch.no_grad():
        projected = mixer.project(100 * torch.randn(1, 50, 16), LocalView.whole(1, 50))
    assert projected.log_decay_BTHK.exp().min().item() == pytest.approx(0.75, rel=1e-3)


def test_token_shift_mixes_neighbours_of_one_document():
    shift = TokenShift(3)
    shift.mix.data = torch.tensor([0.0, 0.25, 1.0])
    x_BTD = torch.randn(2, 7, 3)
    shifted = shift(x_BTD, LocalView(((0, 4), (0, 1, 2)), 7))
    for row, starts in enumerate(((0, 4), (0, 1, 2))):
        for t in range(7):
            before = torch.zeros(3) if t in starts else x_BTD[row, t - 1]
            expected = torch.lerp(x_BTD[row, t], before, shift.mix)
            torch.testing.assert_close(shifted[row, t], expected)


def test_a_document_that_is_not_finite_does_not_reach_the_next_by_token_shift():
    x_BTD = torch.randn(1, 6, 3)
    x_BTD[:, :3] = math.inf
    shifted = TokenShift(3)(x_BTD, LocalView(((0, 3),), 6))
    assert torch.isfinite(shifted[:, 3:]).all()


def test_heads_of_a_group_share_keys_and_queries():
    config = Mamba2Config(num_heads=6, head_dim=2, state_size=3, num_groups=2)
    projected = build(config).project(example_input(1, 5), LocalView.whole(1, 5))
    for x_BTHK in projected[:2]:
        assert torch.equal(x_BTHK[:, :, 0], x_BTHK[:, :, 2])
        assert torch.equal(x_BTHK[:, :, 3], x_BTHK[:, :, 5])
        assert not torch.equal(x_BTHK[:, :, 2], x_BTHK[:, :, 3])


def test_first_decays_and_steps_of_mamba2_are_those_of_the_published_code():
    config = Mamba2Config(num_heads=32, head_dim=1, state_size=2)
    model = Decoder(ModelConfig(width=32, depth=2, pattern="M", mixers={"M": config}), 11)
    initialise(model, 1)
    first, second = (block.mixer for block in model.blocks)
    assert not torch.equal(first.decay.log_rate, second.decay.log_rate)
    for mixer in (first, second):
        decay, step = mixer.decay.log_rate.exp(), F.softplus(mixer.decay.bias)
        assert 1 <= decay.min() < 4
        assert 13 < decay.max() <= 16
        assert 0.00099 <= step.min() < 0.003
        assert 0.03 < step.max() <= 0.1001
        assert torch.equal(mixer.D, torch.ones(32))


def test_first_decays_of_gla_have_no_bias():
    assert not GLA.build(Place(16, 0, 1)).decay.up.bias.any()


WRONG: dict[str, tuple[MixerConfig, str]] = {
    "gla-heads": (GLAConfig(num_heads=3), "X.num_heads = 3 does not divide"),
    "gla-half": (GLAConfig(num_heads=16), "X.num_heads = 16: twice as many do not divide"),
    "gla-values": (GLAConfig(num_heads=3, head_dim=4), "set value_dim"),
    "gla-value": (GLAConfig(value_dim=-1), "X.value_dim = -1"),
    "gla-rank": (GLAConfig(decay_rank=0), "X.decay_rank = 0"),
    "gla-temperature": (GLAConfig(temperature=0.0), "X.temperature = 0.0"),
    "gla-state": (GLAConfig(head_dim=1 << 20, value_dim=3), "X.head_dim = 1048576.* 48 MiB"),
    "hgrn2-value": (HGRN2Config(value_dim=-2), "X.value_dim = -2"),
    "hgrn2-values": (HGRN2Config(num_heads=3, head_dim=4), "set value_dim"),
    "hgrn2-bound": (HGRN2Config(lower_bound=1.5), "X.lower_bound = 1.5"),
    "hgrn2-constant": (HGRN2Config(bounds="constant"), "X.lower_bound = 1.0.*rising"),
    "hgrn2-state": (HGRN2Config(head_dim=2048, value_dim=2048), "X.head_dim = 2048.*128 MiB"),
    "mamba2-heads": (Mamba2Config(num_heads=0), "X.num_heads = 0"),
    "mamba2-divide": (Mamba2Config(num_heads=3), "X.num_heads = 3 does not divide.*head_dim"),
    "mamba2-groups": (Mamba2Config(num_groups=3), "X.num_groups = 3.*num_heads = 8"),
    "mamba2-narrow": (Mamba2Config(convolution=1), "X.convolution = 1: must be 2..8"),
    "mamba2-wide": (Mamba2Config(convolution=9), "X.convolution = 9"),
    "mamba2-size": (Mamba2Config(state_size=0), "X.state_size = 0"),
    "mamba2-state": (Mamba2Config(state_size=1 << 19), "X.state_size = 524288.*64 MiB"),
}


@pytest.mark.parametrize(("config", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_built_is_refused_by_name(config, message):
    with pytest.raises(InputError, match=message) as error:
        config.check(16, "X")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_a_split_refuses_what_it_cannot_do(config):
    config.check(16, "X")
    assert config.refusal(Transports()) == ""
    assert "num_heads = 2" in config.refusal(Transports("ulysses", heads=3))
    assert config.on("fla").refusal(Transports("scan")).startswith("backend = 'fla'")
    assert config.on("fla").refusal(Transports("ulysses", heads=2)) == ""


def test_only_what_convolves_or_shifts_asks_for_a_halo():
    asked = {name: config.verbs() for name, config in KINDS.items()}
    assert asked == {"gla": {"prefix"}, "hgrn2": {"prefix"}, "mamba2": {"prefix", "halo"}}
    assert GLAConfig(token_shift=True).verbs() == {"prefix", "halo"}


def test_gradients_reach_the_gate_through_both_key_and_decay():
    f: Tensor = torch.tensor([-2.0, 0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: forget_gate(f, 0.3), (f,))
    assert torch.autograd.gradcheck(lambda f: forget_gate(f, 0.0), (f,))
