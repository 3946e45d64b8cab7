import functools
import math
from dataclasses import replace

import pytest
import torch

from longctx.errors import InputError
from longctx.mixers.linear import LinearConfig
from longctx.mixers.moh import MoHConfig
from longctx.mixers.mosa import MosaConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.sequence.ledger import Ledger
from longctx.sequence.local import LocalView
from longctx.sequence.placement import place
from longctx.sequence.plan import Plan
from longctx.sequence.sharded import ShardedView, Transports
from longctx.sequence.simulator import run_ranks
from tests.mixers.examples import WIDTH
from tests.mixers.test_every_mixer import (
    build,
    example_input,
    output_and_gradients,
    packed_view,
)
from tests.sequence.conform import MixerProblem, noise
from tests.sequence.links import simulated_links
from tests.tolerances import assert_close

LENGTH = 45
DOCUMENTS = ((0,), (0, 7, 8, 15, 30))
INNER = SoftmaxConfig(num_heads=4, num_kv_heads=2, qk_norm=False)
LEARNED = MoHConfig(inner=INNER, active_heads=2)
BY_NORM = replace(LEARNED, router="query-norm")
ROUTERS = pytest.mark.parametrize("config", [LEARNED, BY_NORM], ids=["learned", "query-norm"])


def assert_split_changes_nothing(config, weight_BGD, ranks: int, placement: str) -> dict:
    """Outputs and gradients of every rank against one process; returns what that found."""
    problem = MixerProblem(build(config), noise(11, 2, LENGTH, WIDTH), weight_BGD)
    whole = problem.evaluate(LocalView(DOCUMENTS, LENGTH), torch.arange(LENGTH), 1)

    def work(rank, hub):
        plan = Plan(place(placement, ranks, LENGTH, 1), rank, DOCUMENTS)
        view = ShardedView(plan, simulated_links(hub, rank, ranks, 1, Ledger()), Transports())
        ids_T = plan.token_ids_BT[0]
        return ids_T, problem.evaluate(view, ids_T, ranks)

    found = run_ranks(ranks, work)
    for ids_T, part in found:
        for name, expected in whole.tokens.items():
            assert_close(part.tokens[name], expected[:, ids_T], "fp64", name)
        for name, expected in whole.agreed.items():
            assert_close(part.agreed[name], expected, "fp64", name)
    for name, expected in whole.summed.items():
        assert_close(sum(part.summed[name] for _, part in found), expected, "fp64", name)
    return whole.tokens | whole.summed | whole.agreed


@pytest.mark.parametrize("ranks", [1, 2, 4])
@ROUTERS
def test_the_balance_loss_and_its_gradient_do_not_depend_on_the_split(config, ranks):
    config = replace(config, balance_weight=1.0)
    only_balance = torch.zeros(2, LENGTH, WIDTH, dtype=torch.float64)
    found = assert_split_changes_nothing(config, only_balance, ranks, "zigzag")
    weights = "inner.query" if config.router == "query-norm" else "route"
    assert found[f"gradient of {weights}.weight"].abs().max() > 1e-3
    # The mean over halves of the sequence of their own loss would be another one.
    halves = [build(config)(x).losses["balance"] for x in noise(11, 2, LENGTH, WIDTH).split(23, 1)]
    assert abs(sum(halves) / 2 - found["balance"]) > 1e-3


@ROUTERS
@pytest.mark.parametrize("window", [0, 9])
def test_computing_chosen_heads_only_changes_nothing(config, window):
    dense = replace(config, inner=replace(INNER, window=window))
    x_BTD, view = example_input(2, LENGTH), packed_view(2, LENGTH, (5, 19))
    mixers = [build(c) for c in (dense, replace(dense, compute="routed"))]
    expected, actual = (output_and_gradients(m, m, x_BTD, view) for m in mixers)
    for name in expected:
        assert_close(actual[name], expected[name], "fp64", name)


@pytest.mark.parametrize("placement", ["contiguous", "zigzag"])
def test_windows_of_chosen_heads_are_exact_on_a_split_sequence(placement):
    config = replace(LEARNED, inner=replace(INNER, window=9), compute="routed")
    found = assert_split_changes_nothing(config, noise(3, 2, LENGTH, WIDTH), 3, placement)
    dense = MixerProblem(
        build(replace(config, compute="dense")),
        noise(11, 2, LENGTH, WIDTH),
        noise(3, 2, LENGTH, WIDTH),
    ).evaluate(LocalView(DOCUMENTS, LENGTH), torch.arange(LENGTH), 1)
    assert_close(found["output"], dense.tokens["output"], "fp64")


def test_skipped_heads_are_not_computed():
    config = replace(LEARNED, compute="routed")
    mixer, view = build(config), packed_view(2, LENGTH, (5,))
    projected = mixer.project(example_input(2, LENGTH), view)
    y_BTHV = mixer.core(projected, view)
    assert not y_BTHV[~projected.chosen_BTH].any()
    assert y_BTHV[projected.chosen_BTH].any(-1).all()
    assert projected.chosen_BTH.sum(-1).eq(3).all()


@pytest.mark.parametrize("compute", ["dense", "routed"])
def test_with_all_heads_active_the_parameter_free_router_is_the_inner_mixer(compute):
    config = replace(BY_NORM, active_heads=3, compute=compute)
    mixer, x_BTD = build(config), example_input(2, LENGTH)
    assert all(name.startswith("inner.") for name, _ in mixer.named_parameters())
    out, expected = mixer(x_BTD).out, mixer.inner(x_BTD).out
    if compute == "dense":
        assert torch.equal(out, expected)
    assert_close(out, expected, "fp64")


def test_the_longest_queries_are_chosen():
    mixer, x_BTD = build(BY_NORM), example_input(2, LENGTH)
    projected = mixer.project(x_BTD, LocalView.whole(2, LENGTH))
    q_BTHK = mixer.inner.query(x_BTD).unflatten(-1, (4, -1))
    length_BTE = q_BTHK[..., 1:, :].norm(dim=-1)
    expected = (length_BTE / length_BTE.std(-1, keepdim=True)).softmax(-1)
    assert_close(projected.probability_BTE, expected, "fp64")
    shortest = length_BTE.argmin(-1, keepdim=True)
    assert not projected.chosen_BTH[..., 1:].gather(-1, shortest).any()
    assert torch.equal(projected.gate_BTH, projected.chosen_BTH.double())


def test_gates_of_zero_and_one_have_the_gradient_of_probabilities():
    mixer, x_BTD = build(BY_NORM), example_input(1, 8).requires_grad_()
    projected = mixer.project(x_BTD, LocalView.whole(1, 8))
    weight = noise(5, 1, 8, 4)
    kept = projected.probability_BTE * projected.chosen_BTH[..., 1:]
    targets = (projected.gate_BTH * weight).sum(), (kept * weight[..., 1:]).sum()
    actual, expected = (torch.autograd.grad(y, x_BTD, retain_graph=True)[0] for y in targets)
    assert_close(actual, expected, "fp64")
    assert actual.abs().max() > 1e-3


@pytest.mark.parametrize("shared", [1, 3])
def test_queries_of_equal_length_have_finite_gradients(shared):
    mixer = build(replace(BY_NORM, shared_heads=shared, active_heads=1))
    x_BTD = torch.zeros(1, 6, WIDTH, dtype=torch.float64)
    found = output_and_gradients(mixer, mixer, x_BTD, LocalView.whole(1, 6))
    assert all(value.isfinite().all() for value in found.values())


@functools.cache
def statistics(ranks: int) -> dict[str, torch.Tensor]:
    """Summed over ranks."""
    mixer, x_BGD = build(LEARNED), noise(11, 2, LENGTH, WIDTH)

    def work(rank, hub):
        plan = Plan(place("contiguous", ranks, LENGTH, 1), rank, DOCUMENTS)
        view = ShardedView(plan, simulated_links(hub, rank, ranks, 1, Ledger()), Transports())
        return mixer(x_BGD[:, plan.token_ids_BT[0]], view).statistics

    parts = run_ranks(ranks, work)
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def test_statistics_say_how_tokens_spread():
    mixer = build(LEARNED)
    probability = mixer.route(noise(11, 2, LENGTH, WIDTH)).softmax(-1).flatten(0, 1)
    load, entropy = [0] * 3, 0.0
    for p_E in probability.tolist():
        for e in sorted(range(3), key=lambda e, p=p_E: -p[e])[:2]:
            load[e] += 1
        entropy -= sum(p * math.log(p) for p in p_E)
    for ranks in (1, 3):
        figures = mixer.adapt(statistics(ranks), 2 * LENGTH)
        assert figures["load"].tolist() == pytest.approx([n / (2 * LENGTH) for n in load])
        assert float(figures["entropy"]) == pytest.approx(entropy / (2 * LENGTH))
    assert min(load) > 0
    assert not any(value.requires_grad for value in statistics(1).values())


REFUSED = {
    "normed queries": (replace(BY_NORM, inner=replace(INNER, qk_norm=True)), "qk_norm = false"),
    "no queries": (replace(BY_NORM, inner=LinearConfig(num_heads=4)), "router = 'learned'"),
    "other mixer": (
        replace(LEARNED, inner=LinearConfig(num_heads=4), compute="routed"),
        "compute = 'routed'.*choose 'dense'",
    ),
    "large heads": (
        replace(LEARNED, inner=replace(INNER, head_dim=512), compute="routed"),
        "compute = 'routed'.*at most 256",
    ),
}


@pytest.mark.parametrize(("config", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_built_is_refused(config, words):
    with pytest.raises(InputError, match=f"model.mixers.S.*{words}") as caught:
        config.check(WIDTH, "model.mixers.S")
    assert "\n" not in str(caught.value)


def test_chosen_heads_need_no_group_that_divides_the_heads():
    assert replace(LEARNED, compute="routed").refusal(Transports(heads=3)) == ""
    assert "inner.num_heads" in LEARNED.refusal(Transports(heads=3))


def test_heads_that_are_not_there_cannot_be_routed():
    config = MoHConfig(inner=MosaConfig(num_heads=4), active_heads=2)
    with pytest.raises(InputError, match=r"moh\.inner\.kind = 'mosa': has no output of each head"):
        config.check(16, "moh")
