"""Which steps may change the weights."""

import json
import math
import random

import pytest
import torch

from longctx.errors import InputError, OutsideError
from longctx.parallel.update_norm import SAMPLES, UpdateNorm
from longctx.train.guard import FaultsConfig, Guard


def figures(loss: float, grad_norm: float = 1.0) -> dict[str, float]:
    return {"loss": loss, "grad_norm": grad_norm}


def noisy(guard: Guard, steps: int, seed: int = 0) -> None:
    """Steps with losses around 3 and norms around 1."""
    noise = random.Random(seed)
    for step in range(steps):
        assert guard.judge(step, figures(noise.gauss(3, 0.1), noise.gauss(1, 0.05))).apply


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_step_that_is_not_finite_is_skipped_and_counted(name, value):
    guard = Guard(FaultsConfig())
    verdict = guard.judge(1, figures(3.0) | {name: value})
    assert not verdict.apply
    assert f"{name} is {value}" in verdict.reason
    assert guard.skipped == 1
    assert guard.judge(2, figures(3.0)).apply
    assert guard.skipped == 1


def test_too_many_skipped_steps_in_a_row_end_the_run_and_name_the_checkpoint():
    guard = Guard(FaultsConfig(max_skipped=3), last_good=lambda: "runs/x/checkpoints/step-40")
    for step in (1, 2, 4, 5):
        guard.judge(step, figures(math.nan))
        guard.judge(3, figures(3.0)) if step == 2 else None
    with pytest.raises(OutsideError, match=r"step 6: loss is nan.*3 in a row.*step-40"):
        guard.judge(6, figures(math.nan))
    assert guard.skipped == 5


def test_without_a_limit_a_run_goes_on():
    guard = Guard(FaultsConfig(max_skipped=0))
    assert not any(guard.judge(step, figures(math.inf)).apply for step in range(50))


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_spike_is_told_or_skipped(name):
    for action in ("warn", "skip"):
        guard = Guard(FaultsConfig(spike_action=action))
        noisy(guard, 128)
        assert guard.judge(129, figures(3.0, 1.0)).reason == ""
        verdict = guard.judge(130, figures(3.0, 1.0) | {name: 5.0})
        assert verdict.apply == (action == "warn")
        assert verdict.reason.startswith(f"{name} {5:.4g} is a spike: ")
        assert guard.skipped == (action == "skip")


def test_a_value_within_the_given_sigmas_is_no_spike():
    guard = Guard(FaultsConfig(spike_window=4))
    for loss in (2.0, 4.0, 2.0, 4.0):
        guard.judge(1, figures(loss))
    assert guard.judge(5, figures(8.99)).reason == ""
    guard = Guard(FaultsConfig(spike_window=4))
    for loss in (2.0, 4.0, 2.0, 4.0):
        guard.judge(1, figures(loss))
    assert "loss 9.01 is a spike: 3 +- 1 in 4 steps" in guard.judge(5, figures(9.01)).reason


def test_a_low_value_and_rounding_are_no_spikes_and_a_short_history_knows_none():
    guard = Guard(FaultsConfig())
    noisy(guard, 63)
    assert guard.judge(64, figures(1e6)).reason == ""
    guard = Guard(FaultsConfig())
    for step in range(128):
        guard.judge(step, figures(3.0))
    assert guard.judge(129, figures(3.0 * (1 + 1e-12))).reason == ""
    assert guard.judge(130, figures(0.1)).reason == ""


def test_skipped_spikes_do_not_enter_the_history():
    guard = Guard(FaultsConfig(spike_action="skip", max_skipped=0))
    noisy(guard, 128)
    assert not any(guard.judge(129 + n, figures(9.0)).apply for n in range(200))


def test_a_resumed_guard_decides_as_one_that_was_never_stopped():
    guard, noise = Guard(FaultsConfig()), random.Random(7)
    values = [noise.lognormvariate(0, 1) for _ in range(400)]
    values[150] = values[151] = math.nan
    reasons, resumed_reasons = [], []
    resumed = Guard(FaultsConfig())
    for step, value in enumerate(values):
        reasons.append(guard.judge(step, figures(value, value)).reason)
        resumed_reasons.append(resumed.judge(step, figures(value, value)).reason)
        state = json.loads(json.dumps(resumed.state()))
        resumed = Guard(FaultsConfig())
        resumed.load(state)
    assert resumed_reasons == reasons
    assert any("spike" in reason for reason in reasons)
    assert resumed.state() == guard.state()


@pytest.mark.parametrize(
    "change", [{"max_skipped": -1}, {"hang_seconds": math.nan}, {"spike_window": 1}]
)
def test_impossible_settings_are_refused_by_name(change):
    with pytest.raises(InputError, match=rf"faults\.{next(iter(change))} = "):
        FaultsConfig(**change)


def test_the_norm_of_an_update_is_exact_for_small_parameters_and_close_for_large_ones():
    torch.manual_seed(0)
    shapes = [(7, 5), (64,), (), (2 * SAMPLES, 16), (0, 3)]
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    norm = UpdateNorm(parameters, [1.0] * len(parameters))
    small = UpdateNorm(parameters[:3], [1.0] * 3)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        before = [parameter.detach().clone() for parameter in parameters]
        norm.before()
        small.before()
        optimizer.step()
        squares = [(p.detach() - b).square().sum() for p, b in zip(parameters, before)]
        torch.testing.assert_close(small.squared(), sum(squares[:3]))
        torch.testing.assert_close(norm.squared(), sum(squares), rtol=0.05, atol=0)


def test_a_sample_of_a_matrix_visits_every_column():
    weight = torch.zeros(64, 1024)
    norm = UpdateNorm([weight], [1.0])
    norm.before()
    weight[:, 3] = 1.0
    assert 0.5 < norm.squared() / 64 < 2


def test_processes_that_hold_the_same_weights_count_a_share_each():
    weight = torch.zeros(10)
    norms = [UpdateNorm([weight], [share]) for share in (1.0, 0.25)]
    for norm in norms:
        norm.before()
    weight += 2.0
    assert [norm.squared().item() for norm in norms] == [40.0, 10.0]
