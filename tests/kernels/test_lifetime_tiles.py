"""Which keys the tiles of lifetime attention in torch hold: few, and none because of the future."""

import pytest
import torch
from longctx_kernels import lifetime_attention as op
from longctx_kernels import lifetime_torch
from longctx_kernels.blocklist import flash_blocklist
from longctx_kernels.lifetime_attention import NEVER, Score, Sight, flash_lifetime
from longctx_kernels.top_lifetime import top_deaths

from tests.kernels.test_lifetime_attention import SIGHTS, listed, positions_of, same, visible
from tests.tolerances import assert_close

TILE = 32


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(lifetime_torch, "QUERY_TILE", TILE)
    monkeypatch.setattr(lifetime_torch, "KEY_TILE", 16)


def tiles_of(sight: Sight, key_heads: int) -> list[tuple[slice, list[int], slice]]:
    """Rows, columns and key heads of every tile."""
    q, k = (torch.zeros(len(x), key_heads, 1) for x in (sight.query_positions, sight.key_positions))
    every = torch.arange(len(k))
    tiles = lifetime_torch._tiles(sight, (q, k, k))
    return [(tile.rows, every[tile.columns].tolist(), tile.key_heads) for tile in tiles]


def strided(length: int, stride: int, window: int) -> Sight:
    position = positions_of((length,))
    expiry = torch.where(position % stride == 0, NEVER, position + window)
    return Sight(*same(length), expiry.to(torch.int32))


@pytest.mark.parametrize("name", list(SIGHTS))
def test_tiles_hold_keys_alive_at_their_first_query_or_born_later(name):
    sight = SIGHTS[name](2)
    size = sight.block_size or TILE
    seen_TJU, keys = visible(sight, 2), sight.key_positions
    tiles = tiles_of(sight, 2)
    met = torch.zeros_like(seen_TJU)
    for rows, columns, heads in tiles:
        met[rows, heads, columns] = True
        first, last = sight.query_positions[rows][[0, -1]]
        alive = torch.ones(1, len(keys), dtype=torch.bool)
        if sight.expiry is not None:
            expiry = sight.expiry[heads] if sight.expires_by_head else sight.expiry[None]
            alive = expiry.amax(0, keepdim=True) > first
        held = (keys <= last) & (alive[0] | (keys > first))
        if sight.blocks is not None:
            of_plan = sight.blocks[heads.start if sight.is_by_head else 0, rows.start // size]
            held &= torch.isin(torch.arange(len(keys)) // size, of_plan)
        assert columns == held.nonzero()[:, 0].tolist()
    assert not (seen_TJU & ~met).any()


def test_work_follows_what_is_visible():
    sight = strided(2048, stride=16, window=64)
    met = sum((rows.stop - rows.start) * len(columns) for rows, columns, _ in tiles_of(sight, 1))
    # A tile of 32 queries also meets what the window shows to its other queries.
    assert met <= 1.25 * visible(sight, 1).sum()


def best_of_content(x_TD: torch.Tensor) -> torch.Tensor:
    """Keys live while they are among the 9 best so far, for two heads."""
    starts = torch.zeros(len(x_TD), dtype=torch.int64)
    return top_deaths(x_TD[:, :2].T, starts, 9)


def gone_unless_good(x_TD: torch.Tensor) -> torch.Tensor:
    """Keys that their content rejects are dead before they are born; others live by content."""
    lives = positions_of((len(x_TD),)) + 1 + (x_TD[:, :2].T.abs() * 40).int()
    return lives.masked_fill(x_TD[:, 2:4].T < 0, 0)


def pushed_out_by_content(x_TD: torch.Tensor) -> torch.Tensor:
    """All keys of a head die at the next token that its content calls a border."""
    length = len(x_TD)
    is_border = (x_TD[:, :2].T > 1) & (torch.arange(length) > 0)
    at = torch.where(is_border, torch.arange(length), NEVER)
    following = torch.nn.functional.pad(at[:, 1:], (0, 1), value=NEVER)
    return following.flip(1).cummin(1).values.flip(1)


@pytest.mark.parametrize("lifetimes", [best_of_content, gone_unless_good, pushed_out_by_content])
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_lifetimes_by_content_let_no_bit_of_the_future_through(lifetimes, blocks, shared):
    length, generator = 150, torch.Generator().manual_seed(11)
    x, other = torch.randn(2, length, 8, generator=generator)

    def outputs(x: torch.Tensor) -> torch.Tensor:
        expiry_JU = lifetimes(x)
        expiry = expiry_JU[:1] if shared else expiry_JU.T[None]
        q, k = x.unflatten(1, (2, 4))[None], x.flip(1).unflatten(1, (2, 4))[None]
        if blocks:
            lists = listed(length, 2).blocks
            out, lse = flash_blocklist(q, k, q, lists, 16, expiry)
        else:
            out, lse = flash_lifetime(q, k, q, expiry)
        return torch.cat((out, lse[..., None]), -1)[0]

    expected = outputs(x)
    for t in range(1, length, 4):
        changed = outputs(torch.cat((x[:t], other[t:])))
        assert torch.equal(changed[:t], expected[:t]), t
        assert t > 100 or not torch.equal(changed[t:], expected[t:])


@pytest.mark.parametrize("size", [1, 5, 24, 100])
def test_listed_blocks_of_any_size_equal_the_definition(size):
    generator = torch.Generator().manual_seed(size)
    shapes = [(1, 40, 4, 8), (1, 40, 2, 8), (1, 40, 2, 8)]
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    for x in (q, k, v):
        x.requires_grad_()
    count = -(-40 // size)
    blocks = torch.rand(2, count, count, generator=generator).argsort(-1)[..., : 1 + count // 3]
    found = flash_blocklist(q, k, v, blocks, size)
    sight = Sight(*same(40), None, blocks.to(torch.int32), size)
    expected = op.lifetime_reference(q[0], k[0], v[0], sight, Score(8**-0.5))
    seen = expected[1].detach() > -torch.inf
    assert_close(found[1][0][seen], expected[1][seen], "fp64", "lse")
    assert torch.equal(found[1][0] > -torch.inf, seen)
    grads = (torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (found[0], expected[0]))
    for a, e in zip((found[0][0], *next(grads)), (expected[0], *next(grads)), strict=True):
        assert_close(a, e, "fp64")
