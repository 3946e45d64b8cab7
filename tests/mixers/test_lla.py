"""Local linear attention: its limits, what it reproduces, its blocks, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from longctx_kernels import lla
from longctx_kernels.lla import local_linear_attention, local_linear_attention_reference
from longctx_kernels.softmax_attention import softmax_attention_reference
from torch import Tensor

from longctx.errors import InputError
from longctx.mixers.lla import LLAConfig
from longctx.sequence.expected import WIDTHS, Share
from longctx.sequence.ledger import Traffic
from longctx.sequence.local import LocalView
from longctx.sequence.placement import place
from longctx.sequence.sharded import Transports
from tests.mixers.examples import PLACE
from tests.mixers.test_every_mixer import build, example_input, packed_view
from tests.tolerances import assert_close

SMALL = LLAConfig(num_heads=2, head_dim=3, ridge=0.5)


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def causal(batch: int, length: int, before: int = 0) -> tuple[Tensor, Tensor]:
    """First and last keys of queries that `before` keys precede."""
    last_BT = (torch.arange(length) + before).expand(batch, length)
    return torch.zeros_like(last_BT), last_BT


def test_a_large_ridge_is_softmax_attention():
    mixer, x_BTD, view = build(replace(SMALL, ridge=1e12)), example_input(2, 40), None
    view = packed_view(2, 40, (1, 17))
    q, k, v = mixer.project(x_BTD, view)
    rows = (x.flatten(0, 1)[None] for x in (q, k, v))
    expected = softmax_attention_reference(*rows, cu_seqlens=view.cu_seqlens).view_as(q)
    assert_close(mixer.core((q, k, v), view), expected, "fp64")
    bent = build(SMALL).core((q, k, v), view)
    assert (bent - expected).abs().max() > 1e-2


def test_values_that_are_linear_in_keys_are_read_at_the_query():
    q, k, slope = noise(1, 50, 2, 3), noise(1, 50, 2, 3, seed=1), noise(2, 3, 4, seed=2)
    at = torch.einsum("hkv,bthk->bthv", slope, q) + 1
    v = torch.einsum("hkv,bthk->bthv", slope, k) + 1
    out = local_linear_attention(q, k, v, *causal(1, 50), 1e-13, 0.5)
    assert_close(out[:, 20:], at[:, 20:], "fp64")


def test_weights_sum_to_one():
    q, k, v = noise(1, 30, 2, 3), noise(1, 30, 2, 3, seed=1), torch.ones(1, 30, 2, 1).double()
    assert_close(local_linear_attention(q, k, v, *causal(1, 30), 0.1, 0.5), v, "fp64")


@pytest.mark.parametrize("most", [2**22, 500], ids=["one block", "many blocks"])
def test_blocks_of_queries_and_keys_equal_the_definition(most, monkeypatch):
    monkeypatch.setattr(lla, "MOST_SCORES", most)
    monkeypatch.setattr(lla, "MOST_PRODUCTS", most)
    q, k, v = noise(2, 30, 2, 3), noise(2, 44, 2, 3, seed=1), noise(2, 44, 2, 5, seed=2)
    first_BT, last_BT = causal(2, 30, before=14)
    first_BT = torch.where(last_BT >= torch.tensor([[20], [30]]), torch.tensor([[20], [30]]), 0)
    found = []
    for function in (local_linear_attention, local_linear_attention_reference):
        operands = [x.clone().requires_grad_() for x in (q, k, v)]
        out = function(*operands, first_BT, last_BT, 0.5, 0.7)
        found.append((out, *torch.autograd.grad((out * noise(*out.shape, seed=3)).sum(), operands)))
    for actual, expected in zip(*found):
        assert_close(actual, expected, "fp64")


def test_scores_are_held_for_a_block_of_queries_only(monkeypatch):
    monkeypatch.setattr(lla, "MOST_SCORES", 2**12)
    monkeypatch.setattr(lla, "MOST_PRODUCTS", 2**12)
    q, k = noise(1, 1, 300, 2), noise(1, 1, 300, 2, seed=1)
    blocks = [block for *_, block in lla._blocks(q, k, *causal(1, 300), 0.5, 1.0)]
    assert max(block.p.numel() for block in blocks) <= 2**12
    assert sum(block.p.shape[2] for block in blocks) == 300


def test_gradients_are_those_of_finite_differences():
    operands = [noise(1, 6, 1, 2, seed=seed).requires_grad_() for seed in range(3)]
    bounds = causal(1, 6)
    assert torch.autograd.gradcheck(
        lambda *x: local_linear_attention(*x, *bounds, 0.5, 1.0), operands
    )


def test_the_operators_are_what_a_compiler_takes_them_for():
    operands = tuple(noise(1, 6, 1, 2, seed=seed).requires_grad_() for seed in range(3))
    torch.library.opcheck(lla._forward_op, (*operands, *causal(1, 6), 0.5, 1.0))


def test_strong_inputs_give_finite_values_and_gradients():
    torch.manual_seed(0)
    mixer = replace(SMALL, ridge=0.1, qk_norm=False).build(PLACE)
    x_BTD = (30 * torch.randn(1, 500, PLACE.width)).requires_grad_()
    out = mixer(x_BTD).out
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize(
    ("ridge", "shape", "message"), [(0.0, (1, 4), "ridge"), (1.0, (1, 3), "first and last")]
)
def test_the_operator_names_what_does_not_fit(ridge, shape, message):
    x, bounds = noise(1, 4, 1, 2), torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        local_linear_attention(x, x, x, bounds, bounds, ridge, 1.0)


WRONG = {
    "ridge": (replace(SMALL, ridge=0.0), r"X\.ridge = 0"),
    "longest": (replace(SMALL, longest=0), r"X\.longest = 0"),
    "fraction": (replace(SMALL, rope_fraction=1.5), r"X\.rope_fraction = 1\.5"),
    "base": (replace(SMALL, rope_base=-1.0), r"X\.rope_base = -1"),
    "kernels": (replace(SMALL, backend="fla"), r"X\.backend = 'fla'"),
}


@pytest.mark.parametrize(("config", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_built_is_refused_by_name(config, message):
    with pytest.raises(InputError, match=message) as error:
        config.check(16, "X")
    assert "\n" not in str(error.value)


def test_sequences_longer_than_stated_are_refused():
    SMALL.check_length(32768, "X")
    with pytest.raises(InputError, match=r"X\.longest = 32768 .* train\.seq_len = 32769") as error:
        SMALL.check_length(32769, "X")
    assert "\n" not in str(error.value)
    replace(SMALL, longest=65536).check_length(65536, "X")


def test_it_gathers_whatever_the_transport():
    assert SMALL.refusal(Transports("ulysses", heads=3)) == ""
    assert SMALL.on("triton").computes_with == "auto"
    mixer = SMALL.build(PLACE)
    for rank in range(3):
        share = Share(rank, place("zigzag", 3, 61), 5, Transports(heads=3), WIDTHS["bf16"])
        longest = max(share.placement.lengths)
        assert longest * 3 > 61
        elements = 2 * 5 * longest * 2 * 2 * 3
        assert mixer.expected_traffic(share) == {
            ("gather", False): Traffic(1, 2 * elements),
            ("gather", True): Traffic(1, 4 * elements),
        }


def test_documents_are_data():
    """The same call serves views of other documents: bounds are tensors."""
    mixer, x_BTD = build(SMALL), example_input(1, 20)
    whole, cut = (mixer(x_BTD, LocalView((starts,), 20)).out for starts in ((0,), (0, 9)))
    assert torch.equal(whole[:, :9], cut[:, :9])
    assert_close(cut[:, 9:], mixer(x_BTD[:, 9:]).out, "fp64")
