import functools

import pytest
import torch
from functorch.compile import make_boxed_func
from longctx_kernels import decay_torch as op
from longctx_kernels.decay_attention import decay_attention, decay_attention_reference
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from tests.tolerances import assert_close

H, K, V = 3, 5, 7
DECAYS = {"none": None, "mild": [-0.001, -0.1, -0.7], "strong": [-5.0, -50.0, 0.0]}
KINDS = ("g", "gk")
PACKED = [0, 1, 64, 128, 131, 200]
PIECES = {
    "T=1": (1, None),
    "T=63": (63, None),
    "T=64": (64, None),
    "T=200": (200, None),
    "packed": (200, PACKED),
}
each_length = pytest.mark.parametrize(("length", "cuts"), PIECES.values(), ids=PIECES.keys())


def noise(seed, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def operands(length, cuts=None, dtype=torch.float64, batch=0, heads=H):
    """q, k, v and the initial states, of two rows unless they are cut."""
    batch = batch or (2 if cuts is None else 1)
    pieces = batch if cuts is None else len(cuts) - 1
    tokens = (batch, length, heads)
    shapes = ((*tokens, K), (*tokens, K), (*tokens, V), (pieces, heads, K, V))
    return [noise(length + i, *s, dtype=dtype).requires_grad_() for i, s in enumerate(shapes)]


def constant(decay, dtype=torch.float64):
    return {} if decay is None else {"g_gamma": torch.tensor(decay, dtype=dtype)}


def gate(kind, strength, q, seed=3):
    """A log decay per token, by the name of its argument."""
    shape = q.shape if kind == "gk" else q.shape[:3]
    size = {"weak": 1e-3, "mild": 0.3, "strong": 50.0, "mixed": 0.3}[strength]
    log_decay = -size * noise(seed, *shape).abs()
    if strength == "mixed":
        log_decay = log_decay.masked_fill(noise(seed + 1, *shape) > 1, -50.0)
        log_decay = log_decay.masked_fill(noise(seed + 2, *shape) > 1, 0.0)
    return {kind: log_decay.to(q.dtype).requires_grad_()}


def results(call, tensors, gates, cuts=None):
    """Outputs and gradients by name, for random cotangents of both outputs."""
    leaves = dict(zip(("q", "k", "v", "initial_state"), tensors))
    leaves |= {name: x for name, x in gates.items() if x.requires_grad}
    cu_seqlens = None if cuts is None else torch.tensor(cuts, dtype=torch.int32)
    named = {"initial_state": tensors[3], **gates, "cu_seqlens": cu_seqlens}
    out, final = call(*tensors[:3], **named, output_final_state=True)
    cotangents = [noise(5 + i, *x.shape).to(x) for i, x in enumerate((out, final))]
    grads = torch.autograd.grad((out, final), list(leaves.values()), cotangents)
    return {"out": out, "final": final} | dict(zip(leaves, grads))


def check(tensors, gates, cuts=None, precision="fp64"):
    """Compares with the recurrence in fp64 from the same inputs."""
    wide = [x.detach().double().requires_grad_() for x in tensors]
    wide_gates = {n: x.detach().double().requires_grad_(n in KINDS) for n, x in gates.items()}
    expected = results(decay_attention_reference, wide, wide_gates, cuts)
    actual = results(decay_attention, tensors, gates, cuts)
    for name, value in expected.items():
        assert_close(actual[name], value, precision, name)


@pytest.fixture
def _small_slabs(monkeypatch):
    monkeypatch.setattr(op, "SLAB_ELEMENTS", 2 * op.CHUNK * H * V)


@pytest.mark.usefixtures("_small_slabs")
@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS.keys())
@each_length
def test_chunks_equal_the_recurrence(length, cuts, decay):
    check(operands(length, cuts), constant(decay), cuts)


@pytest.mark.usefixtures("_small_slabs")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", ["weak", "mild", "strong", "mixed"])
@each_length
def test_gated_chunks_equal_the_recurrence(length, cuts, strength, kind):
    tensors = operands(length, cuts)
    check(tensors, gate(kind, strength, tensors[0]), cuts)


@pytest.mark.parametrize("kind", ["g_gamma", *KINDS])
@pytest.mark.parametrize("chunk", [16, 32, 128])
def test_result_does_not_depend_on_the_chunk_size(chunk, kind, monkeypatch):
    tensors = operands(200, PACKED)
    gates = constant(DECAYS["mild"]) if kind == "g_gamma" else gate(kind, "mixed", tensors[0])
    expected = results(decay_attention, tensors, gates, PACKED)
    monkeypatch.setattr(op, "CHUNK", chunk)
    for name, value in results(decay_attention, tensors, gates, PACKED).items():
        assert_close(value, expected[name], "fp64", name)


@pytest.mark.parametrize("kind", ["g_gamma", *KINDS])
def test_inputs_of_a_single_head_are_left_as_they_are(kind):
    tensors = operands(128, heads=1, batch=1)
    gates = constant([-0.1]) if kind == "g_gamma" else gate(kind, "mild", tensors[0])
    inputs = [*tensors, *gates.values()]
    before = [x.detach().clone() for x in inputs]
    check(tensors, gates)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before))


def strong_then_weak(length, period):
    """Strong decays that add up to thousands, then weak ones, over and over."""
    return torch.where(torch.arange(length) % period < 3 * period // 4, -64.0, -1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("period", [5, 16, 64, 200])
def test_strong_decays_do_not_drown_weak_ones_that_follow(period, kind):
    tensors = operands(200, dtype=torch.float32)
    log_decay = strong_then_weak(200, period)
    shape = tensors[0].shape if kind == "gk" else tensors[0].shape[:3]
    log_decay = log_decay.view(1, -1, *[1] * (len(shape) - 2)).expand(shape).clone()
    check(tensors, {kind: log_decay.requires_grad_()}, precision="fp32")


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_a_long_range_keeps_weak_decays_after_strong_ones(kind):
    length = 4000
    _, k, v, _ = (x.detach() for x in operands(length, batch=1))
    log_decay = strong_then_weak(length, length).double()[:, None].expand(length, H)
    if kind == "gk":
        log_decay = log_decay[..., None].expand(length, H, K)
    exact = op.final_state(k[0], v[0], log_decay)
    narrow = op.final_state(k[0].float(), v[0].float(), log_decay.float())
    assert_close(narrow, exact, "fp32")
    start = 3 * length // 4 - 1
    steps = torch.arange(length - start - 1, -1, -1, dtype=torch.float64)
    kept = k[0, start:] * (-1e-3 * steps).exp()[:, None, None]
    assert_close(exact, torch.einsum("thk,thv->hkv", kept, v[0, start:]), "fp32")


def test_state_without_decay_does_not_drift_over_64k_tokens():
    q, k, v, state = operands(1 << 16, dtype=torch.float32, batch=1)
    with torch.no_grad():
        _, narrow = decay_attention(q, k, v, None, None, None, 1.0, state, True)
        wides = (x.double() for x in (q, k, v))
        _, wide = decay_attention(*wides, None, None, None, 1.0, state.double(), True)
    assert_close(narrow, wide, "fp32")


def test_half_precision_inputs_keep_a_single_precision_state():
    q, k, v, _ = (x.detach().bfloat16() for x in operands(100))
    out, final = decay_attention(q, k, v, output_final_state=True)
    assert out.dtype == torch.bfloat16
    assert final.dtype == torch.float32


def example(kind, length=100, cuts=(0, 40, 100), dtype=torch.float32):
    tensors = operands(length, cuts, dtype)
    gates = constant(DECAYS["mild"], dtype) if kind == "g_gamma" else gate(kind, "mild", tensors[0])
    return tensors, gates


def loss(tensors, gates, cu_seqlens):
    out, final = decay_attention(
        *tensors[:3],
        **gates,
        initial_state=tensors[3],
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )
    return out.sin().sum() + final.cos().sum()


def gradients(call, tensors, gates, cuts):
    leaves = [*tensors, *(x for x in gates.values() if x.requires_grad)]
    value = call(tensors, gates, torch.tensor(cuts, dtype=torch.int32))
    return value, *torch.autograd.grad(value, leaves)


def assert_same_bits(actual, expected):
    assert len(actual) == len(expected)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected))


@pytest.mark.parametrize("kind", ["g_gamma", *KINDS])
def test_compiled_equals_eager_and_other_cuts_compile_nothing(kind):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    tensors, gates = example(kind)
    for cuts in ([0, 40, 100], [0, 7, 100], [0, 64, 100]):
        expected = gradients(loss, tensors, gates, cuts)
        assert_same_bits(gradients(compiled, tensors, gates, cuts), expected)
    assert counter.frame_count == 1


def test_other_cuts_and_lengths_compile_neither_pass_again():
    torch._dynamo.reset()
    made = []

    def compiler(direction):
        return lambda graph, _: made.append(direction) or make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for length, cut in ((100, 40), (100, 7), (210, 64), (333, 300)):
        tensors, gates = example("gk", length, (0, cut, length))
        for x in (*tensors[:3], *gates.values()):
            torch._dynamo.mark_dynamic(x, 1)
        expected = gradients(loss, tensors, gates, (0, cut, length))
        assert_same_bits(gradients(compiled, tensors, gates, (0, cut, length)), expected)
    assert made == ["forward", "backward"]


@pytest.mark.parametrize("kind", ["g_gamma", *KINDS])
@pytest.mark.parametrize("has_initial_state", [False, True])
def test_both_ops_keep_what_they_promise_to_compilers(kind, has_initial_state):
    tensors, gates = example(kind, dtype=torch.float64)
    flat = [x.detach().flatten(0, 1).requires_grad_() for x in tensors[:3]]
    (log_decay,) = gates.values()
    if kind != "g_gamma":
        log_decay = log_decay.detach().flatten(0, 1).requires_grad_()
    initial = tensors[3] if has_initial_state else None
    common = (0.5, torch.tensor([0, 40, 100], dtype=torch.int32), initial)
    arguments = (*flat, log_decay, *common, has_initial_state, "torch")
    torch.library.opcheck(torch.ops.longctx.decay_attention.default, arguments)
    out, saved, final = torch.ops.longctx.decay_attention(*arguments)
    dfinal = final if has_initial_state else None
    arguments = (out, dfinal, *flat, log_decay, saved, final, *common, "torch")
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    torch.library.opcheck(torch.ops.longctx.decay_attention_backward.default, arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_and_autocast_change_no_bit(kind):
    tensors, gates = example(kind)
    cuts = [0, 40, 100]
    expected = gradients(loss, tensors, gates, cuts)
    again = gradients(lambda *x: checkpoint(loss, *x, use_reentrant=False), tensors, gates, cuts)
    assert_same_bits(again, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(gradients(loss, tensors, gates, cuts), expected)


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_checkpoint_can_keep_the_one_op_that_is_dear(is_kept, monkeypatch):
    calls, run = [], op.decay_forward
    monkeypatch.setattr(op, "decay_forward", lambda *x: calls.append(1) or run(*x))

    def policy(context, function, *args, **kwargs):  # noqa: ARG001
        is_dear = function is torch.ops.longctx.decay_attention.default
        keeps = is_dear and is_kept
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    tensors, gates = example("g")
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    saving = functools.partial(checkpoint, loss, use_reentrant=False, context_fn=contexts)
    saved = gradients(saving, tensors, gates, [0, 40, 100])
    assert len(calls) == (1 if is_kept else 2)
    assert_same_bits(saved, gradients(loss, tensors, gates, [0, 40, 100]))


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_values_are_the_same(kind):
    tensors, gates = example(kind)
    cu_seqlens = torch.tensor([0, 40, 100])
    with torch.no_grad():
        value = loss(tensors, gates, cu_seqlens)
    assert not value.requires_grad
    assert torch.equal(value, loss(tensors, gates, cu_seqlens))


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["out", "final"])
def test_either_output_alone_has_its_gradients(wanted):
    tensors, gates = example("gk", cuts=(0, 100), dtype=torch.float64)
    leaves = [*tensors, *gates.values()]

    def grads(call):
        out, final = call(*tensors[:3], **gates, initial_state=tensors[3], output_final_state=True)
        total = sum(x.sin().sum() for x, is_wanted in zip((out, final), wanted) if is_wanted)
        return torch.autograd.grad(total, leaves, materialize_grads=True)

    for a, e in zip(grads(decay_attention), grads(decay_attention_reference)):
        assert_close(a, e, "fp64")


@pytest.mark.parametrize("cuts", [[0, 5, 5, 10], [1, 10], [0, 9], [0, 6, 4, 10]])
def test_cuts_that_do_not_rise_are_refused(cuts):
    q, k, v, _ = operands(10, batch=1)
    with pytest.raises(ValueError, match="cu_seqlens must rise"):
        decay_attention(q, k, v, cu_seqlens=torch.tensor(cuts))


ZEROS = torch.zeros
REFUSED = {
    "a shorter k": ({"k": ZEROS(2, 9, H, K)}, "k and v must match q"),
    "a shorter v": ({"v": ZEROS(2, 9, H, V)}, "k and v must match q"),
    "k of another dtype": ({"k": ZEROS(2, 10, H, K).half()}, "k and v must have q's dtype"),
    "no tokens": (
        {"q": ZEROS(2, 0, H, K), "k": ZEROS(2, 0, H, K), "v": ZEROS(2, 0, H, V)},
        "q must hold at least one token",
    ),
    "two gates": ({"g": ZEROS(2, 10, H), "gk": ZEROS(2, 10, H, K)}, "at most one of g, g_gamma"),
    "a gate of each row": ({"g": ZEROS(2, 10)}, r"g must be \(2, 10, 3\)"),
    "a gate of values": ({"gk": ZEROS(2, 10, H, V)}, r"gk must be \(2, 10, 3, 5\)"),
    "a constant per row": ({"g_gamma": ZEROS(2, H)}, r"g_gamma must be \(3,\)"),
    "a state too many": ({"initial_state": ZEROS(3, H, K, V)}, "initial_state must be"),
    "cuts elsewhere": (
        {"cu_seqlens": ZEROS(2, dtype=torch.int32, device="meta")},
        "cu_seqlens must be on the CPU",
    ),
    "cuts of two rows": ({"cu_seqlens": torch.tensor([0, 20])}, "cu_seqlens needs B = 1"),
    "fractional cuts": ({"cu_seqlens": ZEROS(2)}, "cu_seqlens must be a vector of ints"),
    "a table of cuts": ({"cu_seqlens": torch.tensor([[0, 10]])}, "cu_seqlens must be a vector"),
    "an unknown backend": ({"backend": "cudnn"}, "backend 'cudnn': expected"),
    "a backend for another device": ({"backend": "fla"}, "backend 'fla' needs a CUDA device"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_arguments_are_refused_by_name(arguments, message):
    good = {"q": ZEROS(2, 10, H, K), "k": ZEROS(2, 10, H, K), "v": ZEROS(2, 10, H, V)}
    with pytest.raises(ValueError, match=message):
        decay_attention(**good | arguments)
