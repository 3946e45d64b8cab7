"""The deep memory against the gradient that autograd takes, its limits, and what it refuses."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from longctx.errors import InputError
from longctx.mixers import Place
from longctx.mixers.deep_memory import DeepMemory, Gates, answer, memorise, runs_of
from longctx.mixers.deep_titans import DeepTitansConfig
from longctx.sequence.expected import WIDTHS, Share
from longctx.sequence.ledger import Ledger, Traffic
from longctx.sequence.local import LocalView
from longctx.sequence.placement import place
from longctx.sequence.plan import Plan
from longctx.sequence.sharded import ShardedView, Transports
from longctx.sequence.simulator import Hub, run_ranks
from tests.mixers.examples import PLACE, VARIANTS
from tests.mixers.test_every_mixer import (
    build,
    example_input,
    output_and_gradients,
    packed_view,
)
from tests.sequence.links import simulated_links
from tests.tolerances import assert_close

SMALL = DeepTitansConfig(num_heads=2, head_dim=3, hidden=4, batch=4)
MAL = replace(SMALL, composition="mal", window=5)
MAC = replace(SMALL, composition="mac", segment=6)
compositions = pytest.mark.parametrize("config", [SMALL, MAL, MAC], ids=["lmm", "mal", "mac"])


def differentiated(memory: DeepMemory, operands: tuple[Tensor, ...], batch: int) -> Tensor:
    """Answers `[H, T, K]` of one document, the loss differentiated by `torch.func.grad`."""

    def loss(weights: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> Tensor:
        return 0.5 * (answer(k, *weights) - v).square().sum()

    q, k, v, step, log_keep, log_momentum = operands
    weights = anchor = (memory.first_inner, memory.first_outer)
    momenta, outputs = tuple(map(torch.zeros_like, weights)), []
    for t in range(q.shape[1]):
        if t % batch == 0:
            anchor = weights
        gradients = torch.func.grad(loss)(anchor, k[:, t : t + 1], v[:, t : t + 1])
        keep, eta, theta = (x[t, :, None, None] for x in (log_keep.exp(), log_momentum.exp(), step))
        momenta = tuple(eta * p - theta * g for p, g in zip(momenta, gradients))
        weights = tuple(keep * w + p for w, p in zip(weights, momenta))
        outputs.append(answer(q[:, t : t + 1], *weights))
    return torch.cat(outputs, 1)


def memory_and_operands(heads: int, length: int) -> tuple[DeepMemory, tuple[Tensor, ...]]:
    """q, k, v `[H, T, K]`, then theta and logs of what is kept and passed on `[T, H]`."""
    torch.manual_seed(4)
    memory = DeepMemory(heads, 3, 4).double()
    tokens = (torch.randn(heads, length, 3, dtype=torch.float64) for _ in range(3))
    chances = (torch.rand(length, heads, dtype=torch.float64) for _ in range(3))
    step, *kept = chances
    logs = ((0.5 + 0.5 * x).log() for x in kept)
    return memory, tuple(x.requires_grad_() for x in (*tokens, 0.3 * step, *logs))


def answers(memory: DeepMemory, operands: tuple[Tensor, ...], batch: int) -> Tensor:
    """The same by runs."""
    q, k, v, *gates = operands
    first, runs = memory.start(1, q.dtype), runs_of([[(0, q.shape[1])]], batch)
    slots = [runs.own(x.transpose(0, 1)[None]).transpose(2, 3).unbind(1) for x in (q, k, v)]
    parts = Gates(*(x[None] for x in gates))
    out, _ = memorise(runs, first, first, parts, lambda _, n: tuple(x[n] for x in slots))
    return out[0].transpose(0, 1)


@pytest.mark.parametrize("batch", [1, 4, 50])
def test_outputs_and_gradients_are_those_of_autograd_through_autograd(batch):
    memory, operands = memory_and_operands(2, 13)
    inputs = (*operands, *memory.parameters())
    expected, actual = (f(memory, operands, batch) for f in (differentiated, answers))
    assert_close(actual, expected, "fp64")
    weight = torch.randn_like(expected)
    gradients = (torch.autograd.grad((x * weight).sum(), inputs) for x in (actual, expected))
    for number, (found, wanted) in enumerate(zip(*gradients)):
        assert_close(found, wanted, "fp64", f"gradient {number}")


def test_the_first_weights_have_the_gradient_of_finite_differences():
    memory, operands = memory_and_operands(1, 7)
    first = tuple(memory.parameters())

    def call(*weights: Tensor) -> Tensor:
        return torch.func.functional_call(
            _Answering(memory), dict(zip(("memory.first_inner", "memory.first_outer"), weights)),
            (operands,),
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, first)


class _Answering(torch.nn.Module):
    def __init__(self, memory: DeepMemory):
        super().__init__()
        self.memory = memory

    def forward(self, operands: tuple[Tensor, ...]) -> Tensor:
        return answers(self.memory, operands, 3)


def test_a_batch_changes_what_is_remembered():
    memory, operands = memory_and_operands(1, 9)
    each, three = (answers(memory, operands, batch) for batch in (1, 3))
    assert torch.allclose(each[:, 0], three[:, 0])
    assert (each[:, 1:] - three[:, 1:]).abs().amax() > 1e-3


def test_what_is_told_is_found_again():
    memory = DeepMemory(1, 8, 16).double()
    key, value = torch.eye(8, dtype=torch.float64)[:2]
    k = key.expand(1, 400, 8)
    v = value.expand(1, 400, 8)
    step, log = torch.full((400, 1), 0.05).double(), torch.zeros(400, 1).double()
    found = answers(memory, (k, k, v, step, log, log - torch.inf), 1)[0]
    assert (found[0] - value).norm() > 0.5
    assert (found[-1] - value).norm() < 1e-3


@pytest.mark.parametrize(
    "config",
    [
        replace(MAC, convolution=0),
        replace(MAC, segment=1, persistent=3),
        replace(MAC, segment=64),
        replace(MAL, window=1, batch=1),
        replace(SMALL, batch=100, hidden=0),
    ],
    ids=["no convolution", "segment of one", "one segment", "window of one", "one batch"],
)
def test_extreme_settings_equal_the_reference(config):
    mixer, x_BTD = build(config), example_input(2, 40)
    view = packed_view(2, 40, (1, 17))
    expected = output_and_gradients(mixer, mixer.reference, x_BTD, view)
    actual = output_and_gradients(mixer, mixer, x_BTD, view)
    for name in expected:
        assert_close(actual[name], expected[name], "fp64", name)


@compositions
def test_long_strong_inputs_give_finite_values_and_gradients(config):
    config = replace(config, head_dim=8, hidden=0, batch=16, segment=config.segment and 16)
    torch.manual_seed(1)
    mixer = config.build(PLACE)
    x_BTD = (30 * torch.randn(1, 3000, PLACE.width)).requires_grad_()
    out = mixer(x_BTD).out
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())
    assert x_BTD.grad.isfinite().all()


def test_first_weights_answer_near_the_question_whatever_the_size():
    for size in (4, 64):
        memory, generator = DeepMemory(2, size, 2 * size), torch.Generator().manual_seed(0)
        for name, parameter in memory.named_parameters():
            parameter.data = memory.initial(name, generator)
        x = torch.nn.functional.normalize(torch.randn(1, 2, 100, size, generator=generator), dim=-1)
        state = memory.start(1, torch.float32)
        hidden = torch.nn.functional.silu(x @ memory.first_inner).norm(dim=-1)
        distance = (state.before(x) - x).norm(dim=-1)
        assert 0.5 < hidden.mean() < 2
        assert 0.2 < distance.mean() < 1


@compositions
def test_the_state_is_handed_over_in_at_least_single_precision(config):
    class Watching(LocalView):
        def handoff(self, initial: Tensor, work: Any) -> list[Tensor]:
            output, state = work(initial, 0)
            self.seen = (initial, state)
            return [output]

    mixer = build(config, torch.float32)
    view = Watching(((0,), (0, 7)), 20)
    with torch.autocast("cpu", torch.bfloat16):
        mixer(example_input(2, 20, torch.float32), view)
    assert all(x.dtype == torch.float32 for x in view.seen)
    assert all(x.shape == (2, 6 * 2 * 3 * 4) for x in view.seen)


@compositions
def test_ranks_whose_documents_all_start_anew_still_hand_gradients_back(config):
    """No output depends on what arrives; the exchange must take place all the same."""
    mixer, x_BGD, starts = build(config), example_input(2, 30), (0, 10, 20)
    documents = (starts, starts)
    expected = output_and_gradients(mixer, mixer, x_BGD, LocalView(documents, 30))

    def work(rank: int, hub: Hub) -> tuple[Tensor, Tensor]:
        plan = Plan(place("contiguous", 3, 30), rank, documents)
        view = ShardedView(plan, simulated_links(hub, rank, 3, 1, Ledger()), Transports())
        here = plan.token_ids_BT[0]
        x_BTD = x_BGD[:, here].requires_grad_()
        weight = torch.randn(x_BGD.shape, generator=torch.Generator().manual_seed(3))[:, here]
        out = mixer(x_BTD, view).out
        (out * weight.to(out.dtype)).sum().backward()
        return out, x_BTD.grad

    outputs, gradients = zip(*run_ranks(3, work))
    assert_close(torch.cat(outputs, 1), expected["output"], "fp64")
    assert_close(torch.cat(gradients, 1), expected["gradient of input"], "fp64")


@pytest.mark.parametrize(
    ("placement", "ranks", "arriving"),
    [("contiguous", 4, (0, 1, 1, 1)), ("zigzag", 2, (1, 1)), ("zigzag", 3, (1, 2, 1))],
)
def test_a_state_crosses_each_cut_between_ranks_once_each_way(placement, ranks, arriving):
    mixer = replace(SMALL, convolution=0).build(PLACE)
    size = 5 * 6 * 2 * 3 * 4 * 4
    leaving = arriving if placement == "zigzag" else arriving[::-1]
    for rank in range(ranks):
        share = Share(rank, place(placement, ranks, 24), 5, Transports(), WIDTHS["bf16"])
        calls = arriving[rank] + leaving[rank]
        assert mixer.expected_traffic(share) == {
            ("handoff", False): Traffic(calls, arriving[rank] * size),
            ("handoff", True): Traffic(calls, leaving[rank] * size),
        }


WRONG = {
    "batch": (replace(SMALL, batch=0), r"X\.batch = 0"),
    "hidden": (replace(SMALL, hidden=-1), r"X\.hidden = -1"),
    "step": (replace(SMALL, largest_step=0.0), r"X\.largest_step = 0"),
    "rope": (replace(MAL, rope_base=0.0), r"X\.rope_base = 0"),
    "taps": (replace(SMALL, convolution=1), r"X\.convolution = 1"),
    "window without attention": (replace(SMALL, window=4), r"X\.window = 4.*choose 'mal'"),
    "mal without window": (replace(MAL, window=0), r"X\.window = 0: .*'mal' needs"),
    "segment without mac": (replace(SMALL, segment=4), r"X\.segment = 4.*choose 'mac'"),
    "mac without segment": (replace(MAC, segment=0), r"X\.segment = 0: .*'mac' needs"),
    "negative window": (replace(MAL, window=-1), r"X\.window = -1"),
    "unseen persistent keys": (replace(SMALL, persistent=2), r"X\.persistent = 2"),
    "kernels": (replace(SMALL, backend="triton"), r"X\.backend = 'triton'"),
    "heads": (replace(SMALL, num_heads=3, head_dim=0), r"X\.num_heads = 3"),
}


@pytest.mark.parametrize(("config", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_built_is_refused_by_name(config, message):
    with pytest.raises(InputError, match=message) as error:
        config.check(16, "X")
    assert "\n" not in str(error.value)


@compositions
def test_what_can_be_built_is_not_refused(config):
    config.check(16, "X")
    config.check_length(6, "X")
    assert config.on("triton").computes_with == "auto"
    assert config.build(Place(16, 0, 1)).memory.first_inner.shape == (2, 3, 4)


@pytest.mark.parametrize("config", [MAL, MAC], ids=["window", "segment"])
def test_sequences_shorter_than_what_attends_are_refused(config):
    with pytest.raises(InputError, match=r"X\.(window|segment) = \d is longer than"):
        config.check_length(4, "X")


def test_only_attention_to_a_window_trades_heads():
    odd = Transports("ulysses", heads=3)
    assert "num_heads = 2" in MAL.refusal(odd)
    assert SMALL.refusal(odd) == MAC.refusal(odd) == ""


def test_only_neighbours_ask_for_a_halo():
    assert replace(SMALL, convolution=0).verbs() == {"handoff"}
    assert all("halo" in config.verbs() for config in (SMALL, MAL, MAC))
    assert all("handoff" in config.verbs() for config in VARIANTS["deep_titans"].values())
