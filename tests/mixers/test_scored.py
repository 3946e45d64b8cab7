"""What scores and normalisers promise beyond what every mixer does."""

import pytest
import torch
from torch import Tensor

from longctx.errors import InputError
from longctx.mixers.score_parts import Temperature
from longctx.mixers.scored import Scored, ScoredConfig, ScoredParts
from longctx.sequence.local import LocalView
from longctx.sequence.sharded import Transports
from tests.mixers.examples import WIDTH
from tests.mixers.test_every_mixer import build, example_input, packed_view
from tests.tolerances import assert_close

LENGTH = 40


def alike(mixer: Scored, view: LocalView, v_BTJV: Tensor, **more: Tensor) -> Tensor:
    """Core of tokens whose queries and keys have a product of 0."""
    rows, length = view.positions_BT.shape
    q, k = (
        torch.zeros(rows, length, heads, mixer.size, dtype=torch.float64)
        for heads in (mixer.num_heads, mixer.num_kv_heads)
    )
    log_keep = more.get("log_keep_BTH")
    return mixer.core(ScoredParts(q, k, v_BTJV, None, view.positions_BT, log_keep), view)


def weights_of(mixer: Scored, **more: Tensor) -> Tensor:
    """What each of LENGTH such tokens weighs each key with, `[T, H, U]`."""
    eye = torch.eye(LENGTH, dtype=torch.float64)[None, :, None]
    values = eye.expand(-1, -1, mixer.num_kv_heads, -1)
    return alike(mixer, LocalView.whole(1, LENGTH), values, **more)[0]


def test_sigmoid_divides_by_the_keys_that_a_query_sees():
    """Without scores a weight is sigmoid(-ln n) = 1 / (1 + n)."""
    mixer = build(ScoredConfig(num_heads=2, normaliser="sigmoid", window=7, sinks=2))
    seen_T = torch.tensor([min(t + 1, 9) for t in range(LENGTH)], dtype=torch.float64)
    weights_THU = weights_of(mixer)
    assert torch.equal((weights_THU > 0).sum(-1), seen_T[:, None].long().expand(-1, 2))
    assert_close(weights_THU.sum(-1), (seen_T / (1 + seen_T))[:, None].expand(-1, 2), "fp64")
    fixed = build(ScoredConfig(num_heads=2, normaliser="sigmoid", sigmoid_length=3))
    assert_close(weights_of(fixed)[-1], torch.full((2, LENGTH), 0.25), "fp64")


def test_slopes_let_weights_fall_with_distance():
    mixer = build(ScoredConfig(num_heads=4, num_kv_heads=2, bias="alibi"))
    last_HU = weights_of(mixer)[-1]
    rate_H1 = 2.0 ** torch.tensor([[-2.0], [-4.0], [-6.0], [-8.0]], dtype=torch.float64)
    assert_close((last_HU[:, 1:] / last_HU[:, :-1]).log(), rate_H1.expand(-1, LENGTH - 1), "fp64")


def test_forget_gates_make_a_decaying_mean():
    """Without scores the output is that of a recurrence which forgets by each gate."""
    mixer = build(ScoredConfig(num_heads=2, bias="forget"))
    generator = torch.Generator().manual_seed(2)
    keep_TH = torch.rand(LENGTH, 2, generator=generator, dtype=torch.float64)
    weights_THU = weights_of(mixer, log_keep_BTH=keep_TH.log()[None])
    total_H, state_HU = torch.zeros(2, 1), torch.zeros(2, LENGTH, dtype=torch.float64)
    for t in range(LENGTH):
        state_HU, total_H = state_HU * keep_TH[t][:, None], total_H * keep_TH[t][:, None] + 1
        state_HU[:, t] += 1
        assert_close(weights_THU[t], state_HU / total_H, "fp64")


def test_a_row_without_weight_gives_zero_and_finite_gradients():
    mixer = build(ScoredConfig(num_heads=2, normaliser="relu", qk_norm=False, rope_fraction=0))
    mixer.key.weight.data = -mixer.query.weight.data
    x_BTD = example_input(3, 1).requires_grad_()
    out = mixer(x_BTD).out
    assert not out.any()
    gradients = torch.autograd.grad(out.sum(), (x_BTD, *mixer.parameters()), allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in gradients)


def test_a_sink_takes_a_share_of_the_weights():
    mixer = build(ScoredConfig(num_heads=2, sink=True))
    mixer.sink.data = torch.tensor([1.0, -200.0], dtype=torch.float64)
    shares_TH = weights_of(mixer).sum(-1)
    seen_T = torch.arange(1, LENGTH + 1, dtype=torch.float64)
    assert_close(shares_TH[:, 0], seen_T / (seen_T + torch.e), "fp64")
    assert_close(shares_TH[:, 1], torch.ones(LENGTH), "fp64")


def test_temperatures_start_with_the_position_alone():
    temperature = Temperature(WIDTH, 3, by_position=True).double()
    temperature.up.weight.data.zero_()
    position = torch.tensor([[0, 9, 2**20 - 1]])
    factor_BTH = temperature(example_input(1, 3), position)
    small = torch.tensor(1.5, dtype=torch.float64).exp().neg().exp()
    expected = 1 + small * (position + 1.0).double().log()
    assert_close(factor_BTH, expected[..., None].expand(-1, -1, 3), "fp64")


def test_shared_heads_differ_by_a_vector_only():
    mixer = build(ScoredConfig(num_heads=4, heads="shared"))
    sizes = {name: p.numel() for name, p in mixer.named_parameters() if name.startswith("query.")}
    assert sizes == {"query.all.weight": 4 * WIDTH, "query.each": 16}
    q_BTHK = mixer.query(example_input(1, 9)).unflatten(-1, (4, -1))
    difference_BTK = q_BTHK[:, :, 1] - q_BTHK[:, :, 0]
    assert_close(
        difference_BTK, (mixer.query.each[1] - mixer.query.each[0]).expand(1, 9, -1), "fp64"
    )


@pytest.mark.parametrize("bias", ["none", "forget"])
def test_a_window_bounds_the_memory(bias):
    mixer = build(ScoredConfig(num_heads=2, window=6, sinks=3, bias=bias))
    x_BTD, memory = example_input(2, 20), None
    for token in range(20):
        view = LocalView.whole(2, 1)
        view.positions_BT = view.positions_BT + token
        _, memory = mixer.step(x_BTD[:, token : token + 1], view, memory)
    keys, _ = memory[1]
    assert keys.position_U.tolist() == [0, 1, 2, 15, 16, 17, 18, 19]
    assert {x.shape[1] for x in keys.keys} == {8}
    assert len(keys.keys) == (3 if bias == "forget" else 2)


def test_forgetting_does_not_depend_on_other_documents():
    """Sums of gates start anew, to the bit, wherever a document starts."""
    mixer = build(ScoredConfig(num_heads=2, bias="forget"))
    x_BTD, view = example_input(1, LENGTH), packed_view(1, LENGTH, (7, 25))
    other_BTD = torch.cat((torch.randn_like(x_BTD[:, :25]), x_BTD[:, 25:]), 1)
    assert torch.equal(mixer(x_BTD, view).out[:, 25:], mixer(other_BTD, view).out[:, 25:])


WRONG = {
    "sinks": ({"sinks": 2}, "set window too"),
    "window": ({"window": -1}, "must not be negative"),
    "sigmoid_length": ({"sigmoid_length": 9}, "leave it out"),
    "sink": ({"sink": True, "normaliser": "sigmoid"}, "leave it out"),
    "bias": ({"bias": "alibi", "normaliser": "signed"}, "choose none"),
    "temperature": ({"temperature": "ssa", "normaliser": "reweighted"}, "choose none"),
    "num_heads": ({"num_heads": 16, "normaliser": "softplus"}, "at least 2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_makes_no_sense_is_refused(name):
    fields, mend = WRONG[name]
    config = ScoredConfig(**({"num_heads": 2} | fields))
    with pytest.raises(InputError, match=rf"^model\.x\.{name} = .*{mend}"):
        config.check(WIDTH, "model.x")


def test_a_window_longer_than_the_sequence_is_refused():
    with pytest.raises(InputError, match=r"^x\.window = 9 is longer"):
        ScoredConfig(window=9).check_length(8, "x")


def test_only_sums_of_gates_mind_groups_of_heads():
    transports = Transports(prefix="ulysses", heads=3)
    assert ScoredConfig(num_heads=4, bias="forget").refusal(transports).startswith("num_heads = 4")
    assert not ScoredConfig(num_heads=4, bias="alibi").refusal(transports)
    assert not ScoredConfig(num_heads=4, bias="forget").refusal(Transports(heads=3))
