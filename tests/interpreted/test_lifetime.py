"""Needs TRITON_INTERPRET=1 before Python starts."""

import pytest
import torch
from longctx_kernels import launch as launching
from longctx_kernels import lifetime_attention as op
from longctx_kernels.blocklist import flash_blocklist
from longctx_kernels.lifetime_attention import NORMALISERS, flash_lifetime

from tests.kernels.test_lifetime_attention import (
    CASES,
    SIGHTS,
    SLOPED,
    assert_equal_to_definition,
    assert_far_positions_are_exact,
    operands,
    slopes,
)
from tests.tolerances import assert_close

assert launching.is_interpreted(), "run with TRITON_INTERPRET=1"


@CASES
def test_kernels_equal_the_definition(normaliser, sight, group, sizes, biased):
    sight = SIGHTS[sight](2)
    tensors = operands(sight, group, sizes, biased, torch.float32)
    assert_equal_to_definition(tensors, sight, normaliser, "fp32")


# Weights of pairs that do not see each other may overflow before they are masked.
UNSEEN = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


@UNSEEN
@SLOPED
def test_slopes_equal_the_definition(sight):
    tensors = operands(SIGHTS[sight](2), 2, (16, 16), False, torch.float32)
    assert_equal_to_definition(tensors, SIGHTS[sight](2), "softmax", "fp32", slope=slopes(4))


@UNSEEN
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_scores_are_exact_at_far_positions(normaliser):
    assert_far_positions_are_exact(normaliser, torch.float16, "fp16")


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("sight", ["window 40, 5 sinks", "blind", "listed by head"])
def test_half_precision(normaliser, sight):
    sight = SIGHTS[sight](2)
    tensors = operands(sight, 2, (20, 28), False, torch.float16)
    assert_equal_to_definition(tensors, sight, normaliser, "fp16")


@pytest.mark.parametrize(
    ("normaliser", "factor"),
    [("relu", 2000.0), ("relu", 1e-3), ("softplus", 2000.0), ("softplus", 1e-3), ("sigmoid", 1e-3)],
)
def test_weights_fit_halves(normaliser, factor):
    """Scores of about 1e5, which no half holds, and weights below the least half."""
    sight = SIGHTS["window 40"](2)
    q, k, *rest, key_bias, query_bias = operands(sight, 2, (20, 28), True, torch.float16)
    with torch.no_grad():
        # Large scores are made positive: softplus of -1e5 is 0 in any precision.
        q, k = (q.abs(), k.abs()) if factor > 1 else (q, k)
        q, k = (q * factor).requires_grad_(), (k * 50).requires_grad_()
        if factor < 1 and normaliser != "relu":
            query_bias = (query_bias - 20).requires_grad_()
    tensors = [q, k, *rest, key_bias, query_bias]
    assert_equal_to_definition(tensors, sight, normaliser, "fp16")


def test_public_ops_launch_kernels_and_equal_torch():
    generator = torch.Generator().manual_seed(4)
    q, k, v = (
        torch.randn(2, 50, h, 16, generator=generator, requires_grad=True) for h in (4, 2, 2)
    )
    blocks = torch.tensor([[[0, -1], [0, 1], [2, 1], [3, 0], [4, 3], [-1, -1], [6, 5]]])
    for call in (flash_lifetime, lambda *x, **y: flash_blocklist(*x, blocks, 16, **y)):
        results = {}
        for backend in ("triton", "torch"):
            out, lse = call(q, k, v, backend=backend)
            lse = lse.masked_fill(lse == -torch.inf, 0.0)
            results[backend] = out, *torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v))
        for a, e in zip(results["triton"], results["torch"], strict=True):
            assert_close(a, e, "fp32")


@pytest.mark.parametrize("kind", ["window", "evicting", "listed", "listed by head"])
def test_meta_tensors_are_recorded(kind):
    T = 131072
    shapes = ((T, 16, 128), (T, 4, 128), (T, 4, 128))
    q, k, v = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in shapes)
    positions = torch.empty(T, dtype=torch.int32, device="meta")
    expiry = torch.empty((4, T) if kind == "evicting" else T, dtype=torch.int32, device="meta")
    plans = 4 if kind == "listed by head" else 1
    blocks = torch.empty(plans, T // 64, 16, dtype=torch.int32, device="meta")
    lists = (blocks, 64) if kind.startswith("listed") else ()
    sight, score = op.Sight(positions, positions, expiry, *lists), op.Score(0.1)
    with launching.recording("sm_90") as launches:
        out, lse = op.lifetime_forward(q, k, v, sight, score)
        grads = op.lifetime_backward(out, lse, (q, k, v), (out, lse), sight, score)
    assert [x.kernel.__name__.split("_")[1] for x in launches] == ["forward", "delta", "dq", "dkdv"]
    assert all(x.options.get("LISTED", 64) == 64 for x in launches) == bool(lists)
    assert grads.dk_UJK.shape == k.shape
