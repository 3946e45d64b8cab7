import pytest
import torch
import torch.nn.functional as F
from longctx_kernels import decay_torch, delta_torch
from longctx_kernels.delta_attention import delta_attention, delta_attention_reference

from tests.kernels.test_decay_attention import PACKED, gate, noise
from tests.tolerances import assert_close

H, K, V = 3, 5, 7
KINDS = ("none", "g", "gk", "momentum")
LENGTHS = {"T=1": (1, None), "T=64": (64, None), "T=65": (65, None), "packed": (200, PACKED)}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_length = pytest.mark.parametrize(("length", "cuts"), LENGTHS.values(), ids=LENGTHS.keys())


def operands(length, cuts=None, dtype=torch.float64, kind="none", strength="mixed"):
    """q, unit k, v, beta in 0..2 and initial states; and a gate by the name of its argument."""
    batch = 2 if cuts is None else 1
    tokens, pieces = (batch, length, H), batch if cuts is None else len(cuts) - 1
    has_momentum = kind == "momentum"
    state = (pieces, H, K * (1 + has_momentum), V)
    q, k, v, initial = (
        noise(length + i, *shape)
        for i, shape in enumerate(((*tokens, K), (*tokens, K), (*tokens, V), state))
    )
    beta = (1 if has_momentum else 2) * noise(7, *tokens).sigmoid()
    leaves = [x.to(dtype).requires_grad_() for x in (q, F.normalize(k, dim=-1), v, beta, initial)]
    if has_momentum:
        log_momentum = F.logsigmoid(noise(8, *tokens)).to(dtype).requires_grad_()
        return leaves, gate("g", strength, leaves[0]) | {"momentum": log_momentum}
    return leaves, {} if kind == "none" else gate(kind, strength, leaves[0])


def results(op, leaves, gates, cuts, **kwargs):
    """Output, final states and gradients of a random sum of both."""
    *qkvb, initial = leaves
    cu_seqlens = None if cuts is None else torch.tensor(cuts)
    out, final = op(
        *qkvb, **gates, initial_state=initial, output_final_state=True, cu_seqlens=cu_seqlens,
        **kwargs,
    )  # fmt: skip
    total = (out * noise(5, *out.shape).to(out)).sum() + (final * noise(6, *final.shape)).sum()
    names = ("q", "k", "v", "beta", "initial state", *gates)
    gradients = torch.autograd.grad(total, [*leaves, *gates.values()])
    return {"output": out, "final state": final} | dict(zip(names, gradients))


def narrowed(leaves, gates, dtype):
    """The same numbers in another dtype."""
    narrow = [x.detach().to(dtype).requires_grad_() for x in leaves]
    return narrow, {n: x.detach().to(dtype).requires_grad_() for n, x in gates.items()}


@each_kind
@each_length
def test_it_equals_the_definition(length, cuts, kind):
    leaves, gates = operands(length, cuts, kind=kind)
    expected = results(delta_attention_reference, leaves, gates, cuts)
    for name, value in results(delta_attention, leaves, gates, cuts).items():
        assert_close(value, expected[name], "fp64", name)


@each_kind
def test_it_equals_the_definition_over_many_slabs(kind, monkeypatch):
    monkeypatch.setattr(decay_torch, "SLAB_ELEMENTS", 2 * decay_torch.CHUNK * H * V)
    cuts = [0, 7, 150, 330]
    leaves, gates = operands(330, cuts, kind=kind)
    expected = results(delta_attention_reference, leaves, gates, cuts)
    for name, value in results(delta_attention, leaves, gates, cuts).items():
        assert_close(value, expected[name], "fp64", name)


@each_kind
@pytest.mark.parametrize("strength", ["weak", "mild", "strong"])
def test_it_equals_the_definition_in_single_precision(strength, kind):
    leaves, gates = operands(200, PACKED, kind=kind, strength=strength)
    expected = results(delta_attention_reference, leaves, gates, PACKED)
    narrow = narrowed(leaves, gates, torch.float32)
    for name, value in results(delta_attention, *narrow, PACKED).items():
        assert_close(value, expected[name], "fp32", name)


@pytest.mark.parametrize("kind", ["g", "gk"])
def test_strong_decay_gives_no_inf(kind):
    leaves, gates = operands(200, dtype=torch.float32)
    shape = leaves[0].shape if kind == "gk" else leaves[0].shape[:3]
    gates = {kind: torch.full(shape, -5.0).requires_grad_()}
    for name, value in results(delta_attention, leaves, gates, None).items():
        assert value.isfinite().all(), name


@each_kind
def test_a_change_leaves_earlier_outputs_alone(kind):
    leaves, gates = operands(130, kind=kind)
    before, _ = delta_attention(*leaves[:4], **gates)
    changed = [x.detach().clone() for x in leaves[:4]]
    for x in changed:
        x[:, 70] += 0.1
    after, _ = delta_attention(*changed, **gates)
    assert torch.equal(before[:, :70], after[:, :70])
    assert not torch.equal(before[:, 70], after[:, 70])


@each_kind
def test_a_range_of_tokens_is_an_affine_map_of_the_state(kind):
    leaves, gates = operands(150, kind=kind)
    flat = [x.detach()[0] for x in (*leaves[:4], *gates.values())]
    flat += [] if gates else [torch.zeros(H, dtype=torch.float64)]
    added, move = delta_torch.segment_map(flat, wants_move=True)
    state = leaves[4].detach()[:1]
    _, _, final = delta_torch.delta_forward(flat, 1.0, (0, 150), state)
    assert_close(move @ state[0] + added, final[0], "fp64")
    alone, _ = delta_torch.segment_map(flat, wants_move=False)
    assert_close(alone, added, "fp64")


def test_states_do_not_drift_over_many_tokens():
    length = 1 << 16
    k = F.normalize(noise(1, 1, length, 1, 8), dim=-1)
    q, v, beta = noise(2, 1, length, 1, 8), noise(3, 1, length, 1, 8), noise(4, 1, length, 1)
    wide = [q, k, v, beta.sigmoid() * 2]
    _, expected = delta_attention(*wide, output_final_state=True)
    _, narrow = delta_attention(*(x.float() for x in wide), output_final_state=True)
    assert ((narrow - expected).abs().max() / expected.abs().max()).item() <= 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": torch.zeros(2, 10, 1)}, r"beta must be \(2, 10, 3\)"),
        ({"backend": "triton"}, "backend 'triton': delta rules know auto, torch or fla"),
        ({"backend": "fla"}, "needs a CUDA device"),
        ({"g": torch.zeros(2, 9, 3)}, r"g must be \(2, 10, 3\)"),
        ({"g": torch.zeros(2, 10, 3), "gk": torch.zeros(2, 10, 3, 5)}, "at most one of g"),
        ({"momentum": torch.zeros(2, 10, 3)}, "momentum needs g"),
        ({"cu_seqlens": torch.tensor([0, 10])}, "needs B = 1"),
        ({"v": torch.zeros(2, 10, 3, 7)}, "must have q's dtype"),
    ],
)
def test_bad_arguments_are_named(change, message):
    q, k, v, beta, _ = operands(10)[0]
    arguments = {"q": q, "k": k, "v": v, "beta": beta} | change
    with pytest.raises(ValueError, match=message):
        delta_attention(**arguments)
