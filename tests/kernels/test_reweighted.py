import pytest
import torch
from longctx_kernels import lifetime_attention as op
from longctx_kernels import lifetime_torch
from longctx_kernels.lifetime_attention import flash_lifetime
from longctx_kernels.reweighted import reweighted_attention
from longctx_kernels.score import Score
from torch import Tensor

from tests.kernels.test_lifetime_attention import SIGHTS, operands, slopes
from tests.tolerances import assert_close


def definition(tensors: list[Tensor], sight: op.Sight, slope: Tensor) -> Tensor:
    """Query by query."""
    q_THK, k_UJK, v_UJV, key_bias_UH, query_bias_TH = tensors
    group = q_THK.shape[1] // k_UJK.shape[1]
    k_HUK, v_HUV = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k_UJK, v_UJV))
    outs = []
    for t, q_HK in enumerate(q_THK):
        distance_U = sight.key_positions - sight.query_positions[t]
        scores_HU = (k_HUK @ q_HK[..., None])[..., 0] * 0.4 + slope[:, None] * distance_U
        scores_HU = scores_HU + key_bias_UH.T + query_bias_TH[t][:, None]
        seen_HU = op._seen_by(t, sight, k_UJK.shape[1]).repeat_interleave(group, 0)
        rows = []
        for scores_U, seen_U, v_UV in zip(scores_HU, seen_HU, v_HUV):
            share_U = torch.log1p(scores_U[seen_U].exp())
            share_U = share_U / share_U.sum()
            weight_U = (len(share_U) * share_U - float(len(share_U) > 3)).relu() ** 15
            rows.append((weight_U / weight_U.sum()) @ v_UV[seen_U] if len(share_U) else 0 * v_UV[0])
        outs.append(torch.stack(rows))
    return torch.stack(outs)


@pytest.mark.parametrize("name", ["causal 63", "window 40, 5 sinks", "blind", "evicting", "listed"])
def test_tiles_equal_the_definition(name, monkeypatch):
    monkeypatch.setattr(lifetime_torch, "QUERY_TILE", 32)
    sight = SIGHTS[name](2)
    tensors, slope = operands(sight, 2, (16, 8), True, torch.float64), slopes(4).double() / 8
    score = Score(0.4, "softplus", *tensors[3:], slope)
    out, lse = reweighted_attention(tuple(tensors[:3]), sight, score)
    expected = definition(tensors, sight, slope)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).double()
    gradients = [torch.autograd.grad((x * weight).sum(), tensors) for x in (out, expected)]
    assert_close(out, expected, "fp64")
    for actual, wanted in zip(*gradients):
        assert_close(actual, wanted, "fp64")
    bare = tuple(x.detach() for x in tensors[:3])
    assert torch.equal(lse.isinf(), op.lifetime_forward(*bare, sight, score)[1].isinf())


def test_keys_that_are_alike_get_nothing():
    """From the fourth query on; before that the mean remains."""
    q, k = torch.zeros(2, 1, 9, 2, 4, dtype=torch.float64).requires_grad_()
    v = torch.ones(1, 9, 2, 3, dtype=torch.float64)
    out, _ = flash_lifetime(q, k, v, normaliser="reweighted")
    assert_close(out[:, :3], v[:, :3], "fp64")
    assert not out[:, 3:].any()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k)))


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_fifteenth_powers_fit_single_precision(scale):
    """Shares close to the mean lose digits when it is taken off, and powers lose more."""
    tensors = operands(SIGHTS["causal"](2), 2, (16, 8), False, torch.float64)[:3]
    q, k, v = (x.detach()[None] for x in tensors)
    wide, _ = flash_lifetime(q * scale, k, v, normaliser="reweighted")
    narrow, _ = flash_lifetime(q.float() * scale, k.float(), v.float(), normaliser="reweighted")
    assert_close(narrow, wide, "fp16")
