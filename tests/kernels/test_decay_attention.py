import pytest
import torch
from longctx_kernels import decay_torch as op
from longctx_kernels.decay_attention import decay_attention, decay_attention_reference

from tests.tolerances import assert_close

DECAYS = {"none": None, "mild": [-0.001, -0.1, -0.7], "strong": [-5.0, -50.0, 0.0]}
PIECES = {
    "T=1": (1, None),
    "T=63": (63, None),
    "T=64": (64, None),
    "T=200": (200, None),
    "packed": (200, [0, 1, 64, 128, 131, 200]),
}


def operands(batch: int, length: int, pieces: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)
    shapes = (
        (batch, length, 3, 5),
        (batch, length, 3, 5),
        (batch, length, 3, 7),
        (pieces, 3, 5, 7),
    )
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for s in shapes
    ]


def results(call, tensors, decay, cuts):
    q, k, v, state = tensors
    gamma = None if decay is None else torch.tensor(decay, dtype=q.dtype)
    cu_seqlens = None if cuts is None else torch.tensor(cuts, dtype=torch.int32)
    out, final = call(
        q,
        k,
        v,
        g_gamma=gamma,
        initial_state=state,
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )
    generator = torch.Generator().manual_seed(5)
    dout, dfinal = (
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (out, final)
    )
    return out, final, *torch.autograd.grad((out, final), tensors, (dout, dfinal))


@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS.keys())
@pytest.mark.parametrize(("length", "cuts"), PIECES.values(), ids=PIECES.keys())
def test_chunks_equal_the_recurrence(length, cuts, decay, monkeypatch):
    monkeypatch.setattr(op, "SLAB_ELEMENTS", 2 * op.CHUNK * 3 * 7)
    batch = 2 if cuts is None else 1
    tensors = operands(batch, length, batch if cuts is None else len(cuts) - 1)
    expected = results(decay_attention_reference, tensors, decay, cuts)
    actual = results(decay_attention, tensors, decay, cuts)
    names = ("out", "final", "dq", "dk", "dv", "dinitial")
    for name, a, e in zip(names, actual, expected, strict=True):
        assert_close(a, e, "fp64", name)


@pytest.mark.parametrize("chunk", [16, 32, 128])
def test_result_does_not_depend_on_the_chunk_size(chunk, monkeypatch):
    tensors = operands(1, 200, 1)
    expected = results(decay_attention, tensors, DECAYS["mild"], None)
    monkeypatch.setattr(op, "CHUNK", chunk)
    for a, e in zip(results(decay_attention, tensors, DECAYS["mild"], None), expected, strict=True):
        assert_close(a, e, "fp64")


def test_state_without_decay_does_not_drift_over_64k_tokens():
    q, k, v, state = operands(1, 1 << 16, 1, torch.float32)
    with torch.no_grad():
        _, narrow = decay_attention(q, k, v, None, None, None, 1.0, state, True)
        wides = (x.double() for x in (q, k, v))
        _, wide = decay_attention(*wides, None, None, None, 1.0, state.double(), True)
    assert_close(narrow, wide, "fp32")


def test_half_precision_inputs_keep_a_single_precision_state():
    q, k, v, _ = (x.detach().bfloat16() for x in operands(1, 100, 1))
    out, final = decay_attention(q, k, v, output_final_state=True)
    assert out.dtype == torch.bfloat16
    assert final.dtype == torch.float32


@pytest.mark.parametrize("cuts", [[0, 5, 5, 10], [1, 10], [0, 9], [0, 6, 4, 10]])
def test_cuts_that_do_not_rise_are_refused(cuts):
    q, k, v, _ = operands(1, 10, 1)
    with pytest.raises(ValueError, match="cu_seqlens"):
        decay_attention(q, k, v, cu_seqlens=torch.tensor(cuts))


def test_shapes_that_differ_are_refused():
    q, k, v, _ = operands(1, 10, 1)
    with pytest.raises(ValueError, match="k and v must match q"):
        decay_attention(q, k[:, :9], v)
    with pytest.raises(ValueError, match="at least one token"):
        decay_attention(q[:, :0], k[:, :0], v[:, :0])
