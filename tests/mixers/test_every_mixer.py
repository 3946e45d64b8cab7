"""What every mixer must hold, driven by the registry."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longctx.mixers import MixerConfig
from longctx.sequence.local import LocalView
from tests.mixers.examples import PLACE, VARIANTS, WIDTH, all_variants
from tests.tolerances import assert_close

LENGTH = 83
CUTS = {"one document": (), "packed": (1, 17, 18, 64)}
variants = pytest.mark.parametrize(
    "config", [config for _, config in all_variants()], ids=[name for name, _ in all_variants()]
)


def build(config: MixerConfig, dtype: torch.dtype = torch.float64):
    mixer = config.build(PLACE)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in mixer.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        centre = 1.0 if parameter.dim() == 1 else 0.0
        # Decays that leave something, and scores of both signs.
        own_name = name.split(".")[-1]
        centre = {"log_rate": -3.0, "keep_bias": 3.0}.get(own_name, centre)
        spread = {"taps": 0.5, "logit": 1.0}.get(own_name, 0.3)
        parameter.data = (centre + spread * noise).to(dtype)
    return mixer


def example_input(batch: int, length: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randn(batch, length, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def packed_view(batch: int, length: int, cuts: tuple[int, ...]) -> LocalView:
    documents_BT = torch.zeros(batch, length, dtype=torch.int32)
    for cut in cuts:
        documents_BT[:, cut:] += 1
    documents_BT[0, length // 2 :] += 1
    return LocalView.of_ids(documents_BT if cuts else torch.zeros_like(documents_BT))


def output_and_gradients(mixer, call, x_BTD: torch.Tensor, view: LocalView):
    """Output, losses and gradients of a random scalar with respect to input and parameters."""
    x_BTD = x_BTD.clone().requires_grad_()
    mixed = call(x_BTD, view)
    weight = torch.randn(mixed.out.shape, generator=torch.Generator().manual_seed(3))
    total = (mixed.out * weight.to(mixed.out.dtype)).sum() + sum(mixed.losses.values())
    named = {"input": x_BTD} | dict(mixer.named_parameters())
    gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    assert all(gradient is not None for gradient in gradients)
    return {"output": mixed.out, **mixed.losses} | {
        f"gradient of {name}": gradient for name, gradient in zip(named, gradients, strict=True)
    }


@variants
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_fast_path_equals_per_token_reference(config, cuts):
    mixer, x_BTD = build(config), example_input(2, LENGTH)
    view = packed_view(2, LENGTH, cuts)
    expected = output_and_gradients(mixer, mixer.reference, x_BTD, view)
    actual = output_and_gradients(mixer, mixer, x_BTD, view)
    for name in expected:
        assert_close(actual[name], expected[name], "fp64", name)


@variants
def test_single_precision_is_close_to_the_reference(config):
    """Of the same numbers: what it costs to round them is not the layer's doing."""
    x_BTD, view = example_input(1, LENGTH).float(), packed_view(1, LENGTH, CUTS["packed"])
    wide, narrow = build(config), build(config, torch.float32)
    for exact, rounded in zip(wide.parameters(), narrow.parameters(), strict=True):
        exact.data = rounded.data.double()
    expected = output_and_gradients(wide, wide.reference, x_BTD.double(), view)
    actual = output_and_gradients(narrow, narrow, x_BTD, view)
    for name in expected:
        assert_close(actual[name], expected[name], "fp32", name)


@variants
def test_packed_documents_equal_separate_documents(config):
    mixer, x_BTD = build(config), example_input(1, LENGTH)
    cuts = (0, *CUTS["packed"], LENGTH)
    documents_BT = torch.zeros(1, LENGTH, dtype=torch.int32)
    for cut in CUTS["packed"]:
        documents_BT[:, cut:] += 1
    packed = mixer(x_BTD, LocalView.of_ids(documents_BT)).out
    separate = [mixer(x_BTD[:, a:b]).out for a, b in zip(cuts, cuts[1:], strict=False)]
    assert_close(packed, torch.cat(separate, 1), "fp64")


@variants
@pytest.mark.parametrize("changed", [1, 40, LENGTH - 1])
def test_no_output_sees_a_later_token(config, changed):
    mixer, x_BTD = build(config, torch.float32), example_input(1, LENGTH, torch.float32)
    other_BTD = x_BTD.clone()
    other_BTD[:, changed:] = torch.roll(x_BTD[:, changed:], 1, -1)
    before, after = mixer(x_BTD).out, mixer(other_BTD).out
    is_causal = torch.equal(before[:, :changed], after[:, :changed])
    assert is_causal or not mixer.causal_selection
    assert not torch.equal(before[:, changed], after[:, changed])


@variants
def test_last_output_reaches_every_token_it_claims_to_see(config):
    mixer, x_BTD = build(config), example_input(1, LENGTH).requires_grad_()
    mixer(x_BTD).out[0, -1].sum().backward()
    reached_T = x_BTD.grad[0].abs().amax(-1) > 0
    for_sure_T, possible_T = claimed(config)
    assert (for_sure_T <= reached_T).all()
    assert (reached_T <= possible_T).all()


def claimed(config: MixerConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that the last of LENGTH sees for sure, and those that it can see."""
    if {"survivors", "select", "means"} & config.verbs():
        possible_T = torch.ones(LENGTH, dtype=torch.bool)
        window = min(getattr(config, "window", 1), LENGTH)
        return torch.arange(LENGTH) >= LENGTH - window, possible_T
    return (seen_by_last(config),) * 2


def seen_by_last(config: MixerConfig) -> torch.Tensor:
    """What a mixer whose sight does not depend on its input shows the last token."""
    positions_T = torch.arange(LENGTH)
    if hasattr(config, "policy"):
        return config.policy().sees(positions_T[-1], positions_T).any(0)
    has_state = bool({"prefix", "handoff"} & config.verbs())
    window = 0 if has_state else getattr(getattr(config, "inner", config), "window", 0)
    return positions_T >= LENGTH - (window or LENGTH)


@variants
def test_generation_equals_the_whole_sequence(config):
    mixer, x_BTD = build(config), example_input(2, LENGTH)
    if not mixer.causal_selection:
        with pytest.raises(ValueError, match="tokens to come"):
            mixer.step(x_BTD, LocalView.whole(2, LENGTH), None)
        return
    expected = mixer(x_BTD).out
    outputs, memory, start = [], None, 0
    for length in (20, 1, 1, LENGTH - 22):
        view = LocalView.whole(2, length)
        view.positions_BT = view.positions_BT + start
        with torch.no_grad():
            out, memory = mixer.step(x_BTD[:, start : start + length], view, memory)
        outputs.append(out)
        start += length
    assert_close(torch.cat(outputs, 1), expected, "fp64")


@variants
def test_flops_formula_counts_the_definition(config):
    mixer, x_BTD, view = build(config), example_input(2, 30), packed_view(2, 30, (7, 12))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mixer.reference(x_BTD, view)
    assert mixer.flops(view.positions_BT.flatten() + 1) == counter.get_total_flops()


@variants
def test_autocast_keeps_the_answer(config):
    wide, mixer = build(config), build(config, torch.float32)
    x_BTD, view = example_input(1, LENGTH), packed_view(1, LENGTH, CUTS["packed"])
    with torch.autocast("cpu", torch.bfloat16):
        out = mixer(x_BTD.float(), view).out
    assert_close(out, wide.reference(x_BTD, view).out, "bf16")


def test_every_variant_belongs_to_a_registered_kind():
    assert set(VARIANTS) <= set(MixerConfig.kinds())
