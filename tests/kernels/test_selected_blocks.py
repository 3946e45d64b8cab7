import pytest
import torch
from longctx_kernels import selected_blocks_torch
from longctx_kernels.selected_blocks import selected_block_attention, selected_block_reference
from longctx_kernels.selected_blocks_lists import Selection, listed_once, shared_out
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tolerances import assert_close

PAD = 2**31 - 1
NAMES = ("out", "lse", "dq", "dk", "dv")
CASES = pytest.mark.parametrize(
    ("N", "J", "group", "block_size", "sizes"),
    [
        (37, 2, 1, 16, (16, 16)),
        (37, 2, 3, 16, (20, 28)),
        (5, 1, 16, 64, (16, 32)),
        (3, 1, 20, 16, (16, 16)),
        (1, 2, 3, 32, (16, 16)),
    ],
)


def noise(seed, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def problem(N, J, group, block_size, sizes, dtype=torch.float64):
    """Leaves q, k, v, and where they stand: odd queries among 5 blocks, the last with pads.

    Each lists up to 3 blocks, in any order, some of which lie ahead of it; every fourth lists none.
    """
    (K, V), U = sizes, 5 * block_size
    shapes = (N, J * group, K), (U, J, K), (U, J, V)
    operands = [noise(i, *s, dtype=dtype).requires_grad_() for i, s in enumerate(shapes)]
    generator = torch.Generator().manual_seed(5)
    blocks = torch.rand(N, J, 5, generator=generator).argsort(-1)[..., :3]
    blocks[torch.rand(blocks.shape, generator=generator) < 0.2] = -1
    blocks[3::4, 0] = -1
    keys = torch.arange(U, dtype=torch.int32)
    keys[U - block_size // 2 :] = PAD
    queries = (torch.arange(N, dtype=torch.int32) * U + U // 2) // N
    where = {"query_positions_N": queries, "key_positions_U": keys}
    return operands, (blocks, block_size), where


def results(op, operands, lists, where, **options):
    """Output, lse with 0 for -inf, gradients, and where the lse is -inf."""
    out, lse = op(*operands, *lists, **where, **options)
    dout, dlse = noise(8, *out.shape).bfloat16().to(out), noise(9, *lse.shape).bfloat16().to(lse)
    empty = lse == -torch.inf
    lse = lse.masked_fill(empty, 0.0)
    grads = torch.autograd.grad((out * dout).sum() + (lse * dlse).sum(), operands)
    return dict(zip(NAMES, (out.detach(), lse.detach(), *grads))), empty


def check(problem, precision="fp64", **options):
    operands, lists, where = problem
    doubles = [x.detach().double().requires_grad_() for x in operands]
    expected, empty = results(selected_block_reference, doubles, lists, where, scale=0.4)
    options["scale"] = 0.4
    actual, is_empty = results(selected_block_attention, operands, lists, where, **options)
    assert torch.equal(is_empty, empty)
    for name in NAMES:
        assert_close(actual[name], expected[name], precision, name)
        assert not actual[name][expected[name] == 0].any(), name
    for name, x in zip(("out", "dq", "dk", "dv"), (operands[0], *operands)):
        assert actual[name].dtype == x.dtype, name


def seen_alone(problem, backend="auto"):
    """What query 4 gets, and its gradient, in company and where all others have changed."""
    (q, k, v), (blocks, size), places = problem
    n, keys = 4, torch.ones(len(k), dtype=torch.bool)
    listed = {block for block in blocks[n].flatten().tolist() if block >= 0}
    for block in listed:
        keys[block * size : (block + 1) * size] = False
    assert 0 < keys.sum() < len(keys)
    others = torch.arange(len(q)) != n
    changed = [x.detach().clone() for x in (q, k, v)]
    changed[0][others] *= -3
    changed[1][keys] = changed[2][keys] = torch.nan
    relisted = blocks.where(~others[:, None, None], (blocks + 1) % 5), size
    moved = dict(places, query_positions_N=places["query_positions_N"] + 40 * others)
    found = []
    for tensors, lists, where in (problem, (changed, relisted, moved)):
        leaf = tensors[0].detach().requires_grad_()
        rest = (x.detach() for x in tensors[1:])
        out, lse = selected_block_attention(leaf, *rest, *lists, **where, backend=backend)
        (dq,) = torch.autograd.grad(out[n].sum() + lse[n].sum(), leaf)
        found.append((out[n].detach(), lse[n].detach(), dq[n]))
    return found


def test_selections_hide_and_show():
    _, (blocks, block_size), where = problem(37, 2, 1, 16, (16, 16))
    own = torch.arange(5 * block_size) // block_size
    is_there = where["key_positions_U"] <= where["query_positions_N"][:, None, None]
    shown = (blocks[..., None] == own).any(2) & is_there
    assert 0.1 <= shown.double().mean() <= 0.9


@pytest.mark.parametrize("elements", [1, 30000, 1 << 20])
@CASES
def test_it_equals_the_definition(N, J, group, block_size, sizes, elements, monkeypatch):
    monkeypatch.setattr(selected_blocks_torch, "TILE_ELEMENTS", elements)
    check(problem(N, J, group, block_size, sizes))


@pytest.mark.parametrize("block_size", [1, 7])
def test_blocks_of_any_size(block_size):
    check(problem(9, 2, 2, block_size, (3, 5)))


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_other_dtypes(precision, dtype):
    check(problem(9, 2, 2, 16, (16, 16), dtype), precision)


def test_a_query_gets_the_same_bits_whatever_others_hold_list_and_see():
    alone = seen_alone(problem(9, 2, 3, 16, (16, 16)))
    assert all(map(torch.equal, *alone))


def test_order_and_doubles_do_not_matter():
    operands, (blocks, size), where = problem(9, 2, 2, 16, (16, 16))
    again = torch.cat([blocks.flip(-1), blocks[..., :1]], -1).int()
    op = selected_block_attention
    expected, _ = results(
        op, operands, (torch.nn.functional.pad(blocks, (0, 1), value=-1), size), where
    )
    actual, _ = results(op, operands, (again, size), where)
    assert all(torch.equal(actual[name], expected[name]) for name in NAMES)


def test_no_gradient_comes_from_a_query_that_sees_nothing():
    operands, (blocks, size), where = problem(4, 2, 2, 16, (16, 16))
    blocks = torch.full_like(blocks, -1)
    out, lse = selected_block_attention(*operands, blocks, size, **where)
    assert not out.any()
    assert (lse == -torch.inf).all()
    cotangents = torch.ones_like(out), torch.full_like(lse, torch.inf)
    assert not any(g.any() for g in torch.autograd.grad((out, lse), operands, cotangents))


def test_nothing_as_large_as_queries_times_keys_is_made(monkeypatch):
    N, U, size = 64, 1024, 16
    q, k, v = noise(0, N, 1, 8), noise(1, U, 1, 8), noise(2, U, 1, 8)
    positions = torch.arange(U, dtype=torch.int32)
    blocks = torch.arange(N, dtype=torch.int32)[:, None, None]
    selection = Selection(blocks, positions[:N], positions, size)
    monkeypatch.setattr(selected_blocks_torch, "TILE_ELEMENTS", 1024)
    with Largest() as largest:
        out, lse = selected_blocks_torch.forward((q, k, v), selection, 1.0)
        selected_blocks_torch.backward((out, lse), (q, k, v), (out, lse), selection, 1.0)
    assert largest.elements == (U + size) * 8


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.elements = max(self.elements, made.numel())
        return made


def test_first_chunks_and_parts_hold_every_listing_once():
    chunk = 4
    _, (blocks, size), where = problem(37, 2, 1, 16, (16, 16))
    N, J, L = blocks.shape
    selection = Selection(listed_once(blocks, 5), *where.values(), size)
    offsets, queries = (x.tolist() for x in selection.by_block())
    owners, firsts = shared_out(torch.tensor(offsets), chunk, N * J * L // chunk)
    starts = [(owner, offsets[owner]) for owner in range(J * 5)]
    starts += [
        (owner, offsets[owner] + (part - int(firsts[owner]) + 1) * chunk)
        for part, owner in enumerate(owners.tolist())
        if owner < J * 5
    ]
    assert len(starts) > J * 5
    found = [
        (owner, n)
        for owner, start in starts
        for n in queries[start : min(start + chunk, offsets[owner + 1])]
    ]
    listed = [
        (j * 5 + block, n)
        for n in range(N)
        for j in range(J)
        for block in blocks[n, j].tolist()
        if block >= 0
    ]
    assert sorted(found) == sorted(listed)


def test_the_ops_keep_the_rules_of_custom_ops():
    (q, k, v), (blocks, size), where = problem(5, 2, 2, 16, (16, 20))
    inputs = (q, k, v, listed_once(blocks, 5), *where.values(), size, 0.3, "torch")
    torch.library.opcheck(torch.ops.longctx.selected_blocks_forward.default, inputs)
    inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    made = torch.ops.longctx.selected_blocks_forward(*inputs)
    # It has no derivative of its own.
    tests = ("test_schema", "test_faketensor")
    backward = torch.ops.longctx.selected_blocks_backward.default
    torch.library.opcheck(backward, (*made, *made, *inputs), test_utils=tests)


def test_it_compiles_whole_and_equals_eager():
    made = problem(5, 2, 2, 16, (16, 20))
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(selected_block_attention, fullgraph=True, backend=counter)
    expected, _ = results(selected_block_attention, *made)
    actual, _ = results(compiled, *made)
    assert all(torch.equal(actual[name], expected[name]) for name in NAMES)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_NHK": torch.zeros(3, 4)}, "q, k and v must be"),
        ({"q_NHK": torch.zeros(3, 4, 7)}, "must have the head size"),
        ({"q_NHK": torch.zeros(0, 4, 8)}, "at least one token"),
        ({"q_NHK": torch.zeros(3, 3, 8)}, "q has 3 heads"),
        ({"q_NHK": torch.zeros(3, 4, 8).double()}, "one float dtype"),
        ({"v_UJV": torch.zeros(31, 2, 8)}, "must have the tokens and heads of k"),
        ({"block_size": 15}, "block_size 15 must divide the 32 keys"),
        ({"blocks_NJL": torch.zeros(3, 1, 2, dtype=torch.int32)}, "blocks must be"),
        ({"blocks_NJL": torch.zeros(3, 2, 0, dtype=torch.int32)}, "blocks must be"),
        ({"blocks_NJL": torch.zeros(3, 2, 2)}, "blocks must be int32 or int64"),
        ({"query_positions_N": torch.zeros(4, dtype=torch.int32)}, "query_positions must be"),
        ({"key_positions_U": torch.zeros(32)}, "key_positions must be"),
        ({"backend": "fla"}, "backend 'fla'"),
        ({"backend": "triton"}, "backend 'triton' needs"),
        ({"backend": "cuda"}, "backend 'cuda'"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    good = {"q_NHK": torch.zeros(3, 4, 8), "k_UJK": torch.zeros(32, 2, 8)}
    good |= {"v_UJV": torch.zeros(32, 2, 8), "block_size": 16}
    good |= {"blocks_NJL": torch.zeros(3, 2, 2, dtype=torch.int32)}
    good |= {"query_positions_N": torch.arange(3), "key_positions_U": torch.arange(32)}
    with pytest.raises(ValueError, match=message):
        selected_block_attention(**(good | change))
