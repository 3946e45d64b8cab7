import random
from dataclasses import replace

import pytest
import torch
from longctx_kernels import launch as launching
from longctx_kernels import lifetime_attention as op
from longctx_kernels import lifetime_torch
from longctx_kernels.blocklist import flash_blocklist
from longctx_kernels.lifetime_attention import NEVER, NORMALISERS, Score, Sight, flash_lifetime
from torch._dynamo.testing import CompileCounterWithBackend

from tests.tolerances import assert_close

NAMES = ("out", "lse", "dq", "dk", "dv", "dkey_bias", "dquery_bias")


def positions_of(*ranges) -> torch.Tensor:
    return torch.cat([torch.arange(*r, dtype=torch.int32) for r in ranges])


def same(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return positions_of((length,)), positions_of((length,))


def windowed(length: int, window: int, sinks: int = 0) -> Sight:
    expiry = positions_of((length,)) + window
    expiry[:sinks] = NEVER
    return Sight(*same(length), expiry)


def packed(length: int, cuts: list[int]) -> Sight:
    ends = [end for start, end in zip(cuts, cuts[1:]) for _ in range(start, end)]
    return Sight(*same(length), torch.tensor(ends, dtype=torch.int32))


def evicting(length: int, key_heads: int) -> Sight:
    generator = torch.Generator().manual_seed(length)
    lives = torch.randint(0, length, (key_heads, length), generator=generator, dtype=torch.int32)
    return Sight(*same(length), positions_of((length,)) + lives)


def zigzag() -> Sight:
    """Early and late queries of one rank against early and late keys of another."""
    return Sight(positions_of((20, 53), (150, 190)), positions_of((0, 20), (170, 201)))


def blind() -> Sight:
    """The first queries come before all keys, and the last ones after all have gone."""
    keys = positions_of((40, 103))
    return Sight(positions_of((0, 200, 2)), keys, keys + 70)


def listed(length: int, plans: int, block_size: int = 16) -> Sight:
    generator = torch.Generator().manual_seed(length + plans)
    count = -(-length // block_size)
    blocks = torch.rand(plans, count, count, generator=generator).argsort(-1)[..., :4]
    blocks = blocks.to(torch.int32)
    blocks[:, 1] = -1
    blocks[0, 2, :2] = 1
    expiry = positions_of((length,)) + 150
    return Sight(*same(length), expiry, blocks, block_size)


SIGHTS = {
    "causal": lambda _: Sight(*same(100)),
    "causal 63": lambda _: Sight(*same(63)),
    "window 9": lambda _: windowed(63, 9),
    "window 40": lambda _: windowed(200, 40),
    "window 40, 5 sinks": lambda _: windowed(200, 40, 5),
    "packed": lambda _: packed(100, [0, 1, 33, 34, 100]),
    "evicting": lambda heads: evicting(100, heads),
    "zigzag": lambda _: zigzag(),
    "blind": lambda _: blind(),
    "listed": lambda _: listed(100, 1),
    "listed by head": lambda heads: listed(100, heads),
    "listed by 64": lambda heads: listed(200, heads, 64),
}
SIZES = ((16, 16), (32, 32), (20, 28))


def cover() -> list[tuple]:
    """Every normaliser with every sight; groups, sizes and biases are drawn."""
    draw = random.Random(7)
    return [
        (n, s, draw.choice((1, 2, 4)), draw.choice(SIZES), draw.random() < 0.5)
        for n in NORMALISERS
        for s in SIGHTS
    ]


CASES = pytest.mark.parametrize(("normaliser", "sight", "group", "sizes", "biased"), cover())


def operands(sight: Sight, group: int, sizes, biased: bool, dtype) -> list[torch.Tensor | None]:
    """q, k, v, key bias, query bias; leaves."""
    generator = torch.Generator().manual_seed(3)
    (K, V), T, U = sizes, len(sight.query_positions), len(sight.key_positions)
    shapes = [(T, 2 * group, K), (U, 2, K), (U, 2, V)]
    shapes += [(U, 2 * group), (T, 2 * group)] if biased else []
    made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    # Biases are fp32 at least, and exact in each dtype.
    wide = torch.promote_types(dtype, torch.float32)
    made = [x.to(dtype) if i < 3 else x.to(wide) for i, x in enumerate(made)]
    return [x.requires_grad_() for x in made] + [None] * (5 - len(made))


def cotangents(out, lse) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return tuple(
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
        for x in (out, lse)
    )


def expected_of(tensors, sight: Sight, score: Score, dout, dlse) -> dict[str, torch.Tensor]:
    """The reference in fp64 from the same values."""
    doubles = [None if x is None else x.detach().double().requires_grad_() for x in tensors]
    key_bias_UH, query_bias_TH = doubles[3:]
    score = replace(score, key_bias_UH=key_bias_UH, query_bias_TH=query_bias_TH)
    out, lse = op.lifetime_reference(*doubles[:3], sight, score)
    leaves = [x for x in doubles if x is not None]
    # A log-sum-exp of -inf is constant.
    finite = lse.isfinite()
    loss = (out * dout).sum() + (lse.masked_fill(~finite, 0.0) * dlse).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves)]
    return dict(zip(NAMES, (out.detach(), lse.detach(), *grads)))


def assert_equal_to_definition(
    tensors, sight, normaliser, precision, wide=True, slope=None
) -> None:
    biases = (None if x is None else x.detach() for x in tensors[3:])
    score = Score(0.4, normaliser, *biases, slope)
    bare = tuple(x.detach() for x in tensors[:3])
    out, lse = op.lifetime_forward(*bare, sight, score, wide)
    dout, dlse = cotangents(out, lse)
    dout = dout.to(bare[2].dtype).to(out.dtype)
    expected = expected_of(tensors, sight, score, dout, dlse)
    grads = op.lifetime_backward(dout, dlse, bare, (out, lse), sight, score, wide)
    grads = [g for g in grads if g is not None]
    empty = expected["lse"] == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    expected["lse"] = expected["lse"].masked_fill(empty, 0.0)
    actual = out, lse.masked_fill(empty, 0.0), *grads
    for (name, e), a in zip(expected.items(), actual, strict=True):
        # Values that are zero by definition have no relative error.
        if not e.any():
            assert not a.any(), name
        else:
            assert_close(a, e, precision, name)


SLOPED = pytest.mark.parametrize(
    "sight", ["window 40, 5 sinks", "zigzag", "blind", "listed by head"]
)


def slopes(num_heads: int) -> torch.Tensor:
    # No powers of two: times a far position they are not exact.
    return 0.7 * 2.0 ** -torch.arange(1, num_heads + 1)


FAR = 2**20


def assert_far_positions_are_exact(normaliser: str, dtype: torch.dtype, precision: str) -> None:
    """Slopes, and biases of opposite signs, next to which a score in fp32 would be lost."""
    sight = Sight(positions_of((FAR - 7, FAR + 26)), positions_of((FAR - 50, FAR + 30)))
    tensors = operands(sight, 2, (16, 16), False, dtype)
    generator = torch.Generator().manual_seed(9)
    biases = [
        sign * (FAR / 8 + torch.randint(0, 300, (n, 4), generator=generator) / 64)
        for sign, n in ((-1, 80), (1, 33))
    ]
    tensors[3:] = [x.requires_grad_() for x in biases]
    score = Score(0.4, normaliser, *biases, slopes(4))
    bare = tuple(x.detach() for x in tensors[:3])
    out, lse = op.lifetime_forward(*bare, sight, score, True)
    dout, dlse = cotangents(out, lse)
    dout = dout.to(dtype).float()
    expected = expected_of(tensors, sight, score, dout, dlse)
    grads = op.lifetime_backward(dout, dlse, bare, (out, lse), sight, score, True)
    for (name, e), a in zip(expected.items(), (out, lse, *grads), strict=True):
        if e.any():
            assert_close(a, e, "fp32" if name == "lse" else precision, name)


def visible(sight: Sight, key_heads: int) -> torch.Tensor:
    return torch.stack(
        [op._seen_by(t, sight, key_heads) for t in range(len(sight.query_positions))]
    )


@pytest.mark.parametrize("name", [n for n in SIGHTS if n not in ("causal", "causal 63")])
def test_selections_hide_and_show(name):
    shown = visible(SIGHTS[name](2), 2).double().mean()
    assert 0.1 <= shown <= 0.9


@CASES
def test_tiles_equal_the_definition(normaliser, sight, group, sizes, biased, monkeypatch):
    monkeypatch.setattr(lifetime_torch, "QUERY_TILE", 32)
    monkeypatch.setattr(lifetime_torch, "KEY_TILE", 16)
    sight = SIGHTS[sight](2)
    tensors = operands(sight, group, sizes, biased, torch.float64)
    assert_equal_to_definition(tensors, sight, normaliser, "fp64")


@SLOPED
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_slopes_equal_the_definition(normaliser, sight, monkeypatch):
    monkeypatch.setattr(lifetime_torch, "QUERY_TILE", 32)
    monkeypatch.setattr(lifetime_torch, "KEY_TILE", 16)
    tensors = operands(SIGHTS[sight](2), 2, (16, 16), False, torch.float64)
    assert_equal_to_definition(tensors, SIGHTS[sight](2), normaliser, "fp64", slope=slopes(4))


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_scores_are_exact_at_far_positions(normaliser):
    assert_far_positions_are_exact(normaliser, torch.bfloat16, "fp32")


def test_a_positive_slope_gives_farther_keys_less_weight():
    """By exp(-slope) a token, for both public ops."""
    q, k, eye = torch.zeros(1, 16, 4, 2), torch.zeros(1, 16, 2, 2), torch.eye(16)
    values = eye[None, :, None].expand(-1, -1, 2, -1)
    every = torch.zeros(1, 1, 1, dtype=torch.int32)
    for call in (flash_lifetime, lambda *x, **y: flash_blocklist(*x, every, 16, **y)):
        last_HU = call(q, k, values, slope=slopes(4))[0][0, -1]
        ratio_HU = last_HU[:, :-1] / last_HU[:, 1:]
        assert_close(ratio_HU, (-slopes(4)).exp()[:, None].expand(-1, 15), "fp32")


@pytest.mark.parametrize("length", [1, 63])
def test_rows_are_causal_by_themselves(length):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(3, length, h, 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2)
    )
    expiry = torch.randint(1, length + 9, (3, length, 2), generator=generator)
    expiry = expiry + torch.arange(length)[:, None]
    out, lse = flash_lifetime(q, k, v, expiry)
    for b in range(3):
        sight = Sight(*same(length), expiry[b].T.to(torch.int32))
        row = op.lifetime_reference(q[b], k[b], v[b], sight, Score(8**-0.5))
        assert_close(out[b], row[0], "fp64", "out")
        assert_close(lse[b], row[1], "fp64", "lse")


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_public_op_differentiates(normaliser):
    generator = torch.Generator().manual_seed(2)
    shapes = [(2, 9, 2, 4), (2, 9, 1, 4), (2, 9, 1, 4), (2, 9, 2), (2, 9, 2)]
    leaves = [
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes
    ]

    def call(q, k, v, key_bias, query_bias):
        return flash_lifetime(
            q, k, v, key_bias=key_bias, query_bias=query_bias, normaliser=normaliser
        )

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("blocks", [None, torch.tensor([[[0, -1], [0, 1], [2, 1]]])])
def test_ops_pass_opcheck_and_compile_without_breaks(blocks):
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, 40, h, 8, generator=generator, requires_grad=True) for h in (4, 2, 2))
    bias = torch.randn(1, 40, 4, generator=generator, requires_grad=True)
    positions = same(40)

    def call(q, k, v, bias, *where):
        if blocks is None:
            return flash_lifetime(q, k, v, None, *where, key_bias=bias)
        return flash_blocklist(q, k, v, blocks, 16, None, *where, key_bias=bias)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for run in (call, compiled):
        out, lse = run(q, k, v, bias, *positions)
        grads = torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v, bias))
        if run is call:
            expected = out, *grads
    for a, e in zip((out, *grads), expected, strict=True):
        assert_close(a, e, "fp32")
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    listed_blocks = None if blocks is None else blocks.to(torch.int32)
    terms = bias[0], None, slopes(4)
    inputs = (*flat, *positions, None, *terms, listed_blocks, 16, "softmax", 0.3, "torch")
    ops = torch.ops.longctx
    torch.library.opcheck(ops.lifetime_forward.default, inputs)
    results = [x.detach() for x in ops.lifetime_forward(*inputs)]
    gradients = cotangents(*results)
    inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    # It has no derivative of its own.
    tests = ("test_schema", "test_faketensor")
    arguments = (*gradients, *results, *inputs)
    torch.library.opcheck(ops.lifetime_backward.default, arguments, test_utils=tests)


def test_new_documents_do_not_recompile():
    generator = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(1, 40, h, 8, generator=generator, requires_grad=True) for h in (4, 2, 2))
    blocks = torch.tensor([[[0, -1], [0, 1], [2, 1]]])

    def call(q, k, v, expiry, blocks):
        out, _ = flash_lifetime(q, k, v, expiry)
        return out + flash_blocklist(q, k, v, blocks, 16, expiry)[0]

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for cuts in ([0, 40], [0, 7, 40], [0, 1, 30, 40]):
        expiry, blocks = packed(40, cuts).expiry[None], blocks.flip(-1)
        out, expected = (f(q, k, v, expiry, blocks) for f in (compiled, call))
        assert_close(out, expected, "fp32")
        gradients = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, expected))
        for a, e in zip(*gradients, strict=True):
            assert_close(a, e, "fp32")
    assert counter.frame_count == 1


def visited(sight: Sight, query_block: int, key_block: int) -> torch.Tensor:
    sink_start, sink_stop, start, _, _, stop = sight.ranges(query_block, key_block).unbind(-1)
    return sink_stop - sink_start + stop - start


def test_windows_visit_as_many_blocks_as_they_show():
    assert visited(windowed(4096, 256), 64, 32).max() <= 256 // 32 + 2
    assert visited(windowed(4096, 256, sinks=4), 64, 32).max() <= 256 // 32 + 2 + 1
    assert visited(packed(4096, [0, 1000, 2000, 3000, 4096]), 64, 32).max() <= 1064 // 32 + 2
    start, _, _, stop = windowed(4096, 256).transposed(64, 32).unbind(-1)
    assert (stop - start).max() <= 288 // 64 + 2
    # Full causal attention masks the diagonal only.
    *_, whole_start, whole_stop, stop = Sight(*same(4096)).ranges(64, 32).unbind(-1)
    assert (stop - whole_stop).max() == 2
    assert not whole_start.any()


@pytest.mark.parametrize("name", [n for n in SIGHTS if not n.startswith("listed")])
def test_ranges_hold_all_that_is_seen_and_whole_ones_only_that(name):
    sight = SIGHTS[name](2)
    seen_TPU = visible(sight, 2)
    ranges, transposed = sight.ranges(32, 16), sight.transposed(32, 16)
    for plan in range(ranges.shape[0]):
        heads = slice(None) if ranges.shape[0] == 1 else slice(plan, plan + 1)
        for n in range(-(-len(sight.key_positions) // 16)):
            for m in range(-(-len(sight.query_positions) // 32)):
                pairs = seen_TPU[m * 32 : m * 32 + 32, heads, n * 16 : n * 16 + 16]
                sink, sink_stop, start, whole, whole_stop, stop = ranges[plan, m].tolist()
                assert sink <= n < sink_stop or start <= n < stop or not pairs.any()
                assert not whole <= n < whole_stop or (pairs.all() and pairs.shape[2] == 16)
                start, whole, whole_stop, stop = transposed[plan, n].tolist()
                assert start <= m < stop or not pairs.any()
                assert not whole <= m < whole_stop or (pairs.all() and pairs.shape[0] == 32)


def test_wrong_calls_are_refused():
    q, k, v = (torch.zeros(2, 20, h, 8) for h in (4, 2, 2))
    positions = positions_of((20,))
    wrong = {
        "which k's 3 must divide": (q, torch.zeros(2, 20, 3, 8), torch.zeros(2, 20, 3, 8)),
        "one dtype": (q, k.half(), v),
        "head dim": (*(torch.zeros(1, 4, 1, 260),) * 2, torch.zeros(1, 4, 1, 8)),
        "at least one token": (q[:, :0], k[:, :0], v[:, :0]),
        "v .* tokens and heads of k": (q, k, v[:, 1:]),
        "head size of q": (q, k[..., 1:], v),
        "give query_positions and key_positions$": (q[:, 1:], k, v),
        "expiry must be": (q, k, v, positions),
        "give both": (q, k, v, None, positions),
        "batch of 1": (q, k, v, None, positions, positions),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            flash_lifetime(*arguments)
    with pytest.raises(ValueError, match="normaliser 'max'"):
        flash_lifetime(q, k, v, normaliser="max")
    for name, shape in (("key_bias", (2, 20)), ("slope", (2,))):
        with pytest.raises(ValueError, match=f"{name} must be fp32"):
            flash_lifetime(q, k, v, **{name: torch.zeros(shape)})
    for blocks, size, message in (
        (torch.zeros(1, 3, 2, dtype=torch.int32), 0, "block_size 0: must be at least 1"),
        (torch.zeros(1, 9, 2, dtype=torch.int32), 16, "blocks must be"),
        (torch.zeros(1, 3, 0, dtype=torch.int32), 16, "at least one entry"),
    ):
        with pytest.raises(ValueError, match=message):
            flash_blocklist(q, k, v, blocks, size)
    with launching.recording("sm_90"), pytest.raises(ValueError, match="block_size 24: Triton"):
        flash_blocklist(q, k, v, torch.zeros(1, 2, 2, dtype=torch.int32), 24)
