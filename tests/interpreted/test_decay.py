"""Decay kernels in Triton's interpreter, against the definition in fp64."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("set TRITON_INTERPRET=1 before Python starts: these tests interpret kernels")

from longctx_kernels import decay_triton as kernels
from longctx_kernels import launch as launching
from longctx_kernels.decay_attention import decay_attention, decay_attention_reference

from tests.tolerances import assert_close

H, SCALE = 2, 0.3
PACKED = (0, 1, 64, 128, 131, 200)
GATES = ("constant", "none", "strong", "scalar", "diagonal", "strong scalar", "strong diagonal")
NAMES = ("out", "final", "dq", "dk", "dv", "dinitial", "dg")


def gate(kind: str, T: int, K: int) -> torch.Tensor:
    if kind in ("constant", "none", "strong"):
        return {
            "constant": torch.tensor([-0.02, -0.7]),
            "none": torch.zeros(H),
            "strong": torch.tensor([-50.0, 0.0]),
        }[kind]
    shape = (T, H, K) if kind.endswith("diagonal") else (T, H)
    mild = -torch.rand(shape) * torch.rand(shape)
    return mild.masked_fill(torch.rand(shape) < 0.3, -50.0) if "strong" in kind else mild


def case(kind, cuts, K, V, dtype=torch.float32):
    torch.manual_seed(len(kind) + cuts[-1] + K)
    T, N = cuts[-1], len(cuts) - 1
    shapes = ((T, H, K), (T, H, K), (T, H, V), (T, H, V))
    q, k, v, dout = (torch.randn(s).to(dtype) for s in shapes)
    initial, dfinal = torch.randn(2, N, H, K, V)
    return q, k, v, gate(kind, T, K), initial, dout, dfinal


def gate_argument(g):
    """The gate as the public op takes it."""
    return {"g_gamma": g} if g.dim() == 1 else {"g": g[None]} if g.dim() == 2 else {"gk": g[None]}


def run(op, tensors, cuts, dtype=None, **options):
    """Outputs and gradients of an op with the public signature."""
    q, k, v, g, initial, dout, dfinal = (x.to(dtype or x.dtype) for x in tensors)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, initial, g)]
    q, k, v, initial, g = leaves
    options |= {"initial_state": initial, "output_final_state": True}
    options |= {"cu_seqlens": torch.tensor(cuts), "scale": SCALE}
    out, final = op(q[None], k[None], v[None], **gate_argument(g), **options)
    wanted = leaves if g.dim() > 1 else leaves[:-1]
    grads = torch.autograd.grad((out[0], final), wanted, (dout, dfinal))
    return out[0].detach(), final.detach(), *grads


def expected_of(tensors, cuts):
    """By the definition in fp64, of the very same (rounded) inputs."""
    return run(decay_attention_reference, tensors, cuts, torch.float64)


def actual_of(tensors, cuts):
    q, k, v, g, initial, dout, dfinal = tensors
    starts, final = kernels.state_pass(k, v, g, cuts, initial)
    out, saved = kernels.output_pass(q, k, v, g, SCALE, cuts, starts)
    ends, dinitial = kernels.dstate_pass(q, dout, g, SCALE, cuts, dfinal)
    dq, dk, dv, dG = kernels.gradient_pass(q, k, v, g, SCALE, cuts, dout, saved, ends)
    if dG is None:
        return out, final, dq, dk, dv, dinitial
    last = torch.tensor(cuts[1:]) - 1
    product = (final * dfinal).sum(3)
    dG[last] += product.sum(2) if g.dim() == 2 else product
    dg = torch.cat([x.flip(0).cumsum(0).flip(0) for x in dG.split(lengths(cuts))])
    return out, final, dq, dk, dv, dinitial, dg


def lengths(cuts):
    return [b - a for a, b in zip(cuts, cuts[1:])]


def check(kind, cuts, K, V):
    tensors = case(kind, cuts, K, V)
    results = actual_of(tensors, cuts)
    for name, a, e in zip(NAMES, results, expected_of(tensors, cuts)):
        assert_close(a, e, "fp32", f"{kind} {name}")


@pytest.mark.parametrize("kind", GATES)
def test_packed_pieces_equal_the_recurrence(kind):
    check(kind, PACKED, 20, 33)


@pytest.mark.parametrize("kind", ["constant", "scalar", "diagonal"])
@pytest.mark.parametrize("T", [1, 63, 100, 200])
def test_lengths_equal_the_recurrence(kind, T):
    check(kind, (0, T), 16, 16)


@pytest.mark.parametrize("kind", ["constant", "scalar", "diagonal"])
def test_two_tiles_of_k_and_v_equal_the_recurrence(kind):
    check(kind, (0, 70, 133), 32, 32)


@pytest.mark.parametrize("kind", ["constant", "scalar", "diagonal"])
def test_half_precision_equals_the_recurrence(kind):
    tensors = case(kind, (0, 30, 130), 32, 32, torch.float16)
    results = actual_of(tensors, (0, 30, 130))
    assert results[1].dtype == results[5].dtype == torch.float32
    for name, a, e in zip(NAMES, results, expected_of(tensors, (0, 30, 130))):
        assert_close(a, e, "fp16", f"{kind} {name}")


@pytest.mark.parametrize("kind", ["scalar", "diagonal"])
@pytest.mark.parametrize(("T", "D"), [(64, 32), (256, 16)])
def test_rounding_does_not_gather_in_the_gradient_of_the_gate(kind, T, D):
    """Without a cotangent of the final state: its rounding would be an error of all tokens."""
    *tensors, dfinal = case(kind, (0, T), D, D, torch.float16)
    tensors.append(torch.zeros_like(dfinal))
    expected = expected_of(tensors, (0, T))
    for name, a, e in zip(NAMES, actual_of(tensors, (0, T)), expected):
        assert_close(a, e, "fp16", f"{kind} {name}")


@pytest.mark.parametrize("block", [16, 32, 64])
def test_strong_decays_do_not_drown_weak_ones_in_their_tile(block, monkeypatch):
    table = launching.read_tables()["decay"][launching.INTERPRETER]
    monkeypatch.setitem(table["decay_scores_diagonal_fp32"]["64"], "BLOCK_T", block)
    q, k, v, g, *rest = case("diagonal", (0, 100), 16, 16)
    at = torch.arange(100)[:, None, None]
    g = torch.where((at + torch.arange(16)) % 23 < 15, -64.0, -1e-3).expand_as(g).contiguous()
    tensors = (q, k, v, g, *rest)
    for name, a, e in zip(NAMES, actual_of(tensors, (0, 100)), expected_of(tensors, (0, 100))):
        assert_close(a, e, "fp32", name)


@pytest.mark.parametrize("kind", ["constant", "scalar", "diagonal"])
def test_op_equals_the_definition(kind):
    cuts = (0, 1, 64, 131)
    tensors = case(kind, cuts, 20, 33)
    results = run(decay_attention, tensors, cuts, backend="triton")
    for name, a, e in zip(NAMES, results, expected_of(tensors, cuts)):
        assert_close(a, e, "fp32", f"{kind} {name}")


@pytest.mark.parametrize("kind", ["constant", "scalar", "diagonal"])
def test_result_does_not_depend_on_the_chunk_size(kind, monkeypatch):
    tensors = case(kind, PACKED, 16, 16)
    results = actual_of(tensors, PACKED)
    monkeypatch.setattr(kernels, "chunk_size", lambda *_: 128)
    for name, a, e in zip(NAMES, actual_of(tensors, PACKED), results):
        bound = 1e-6 * max(1.0, float(e.abs().max()))
        assert float((a - e).abs().max()) <= bound, name


def test_gradient_of_the_state_is_zero_without_its_cotangent():
    q, k, v, g, _, dout, dfinal = case("constant", PACKED, 16, 16)
    zero = torch.zeros_like(dfinal)
    for a, b in (
        (kernels.state_pass(k, v, g, PACKED), kernels.state_pass(k, v, g, PACKED, zero)),
        (
            kernels.dstate_pass(q, dout, g, SCALE, PACKED),
            kernels.dstate_pass(q, dout, g, SCALE, PACKED, zero),
        ),
    ):
        assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("D", [64, 128, 256])
def test_long_sequences_are_recorded_in_six_launches(D):
    T, heads = 131072, 16
    q, k, v, dout = (
        torch.empty(T, heads, D, device="meta", dtype=torch.bfloat16) for _ in range(4)
    )
    g = torch.empty(heads, device="meta")
    with launching.recording("sm_90") as launches:
        starts, _ = kernels.state_pass(k, v, g, (0, T))
        _, saved = kernels.output_pass(q, k, v, g, SCALE, (0, T), starts)
        ends, _ = kernels.dstate_pass(q, dout, g, SCALE, (0, T))
        kernels.gradient_pass(q, k, v, g, SCALE, (0, T), dout, saved, ends)
    assert starts.dtype == torch.bfloat16
    assert len(launches) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [({"g": torch.zeros(3)}, "g must be"), ({"cuts": (0, 9)}, "cuts"), ({"v": 5}, "v must be")],
)
def test_bad_arguments_are_refused(change, message):
    _, k, v, g, *_ = case("constant", (0, 10), 16, 16)
    arguments = {"g": g, "cuts": (0, 10)} | {n: x for n, x in change.items() if n != "v"}
    v = v[: change.get("v", 10)]
    with pytest.raises(ValueError, match=message):
        kernels.state_pass(k, v, arguments["g"], arguments["cuts"])
