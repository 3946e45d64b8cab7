import pytest
import torch
from longctx_kernels import routed_attention as op
from longctx_kernels.lifetime_attention import sight_of
from longctx_kernels.routed_attention import routed_attention, routed_reference

from tests.tolerances import assert_close

G = 61
OWN = [*range(3, 20), *range(44, G)]
"""Queries of two segments among the keys of whole rows."""
ENDS = [[G] * G, [7] * 7 + [8] + [50] * 42 + [G] * 11]
"""Of one document, and of four."""


def example(key_heads: int, share: float, dtype: torch.dtype):
    """Operands of four query heads, and who chose which."""
    generator = torch.Generator().manual_seed(key_heads)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    q = values(2, len(OWN), 4, 5)
    k, v = values(2, G, key_heads, 5), values(2, G, key_heads, 3)
    chosen = torch.rand(q.shape[:3], generator=generator) < share
    return tuple(x.requires_grad_() for x in (q, k, v)), chosen


def places() -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of queries, and ends of the documents of keys."""
    return torch.tensor([OWN, OWN]), torch.tensor(ENDS)


def assert_routed_equals_definition(key_heads, window, share, dtype, precision):
    operands, chosen = example(key_heads, share, dtype)
    wide = tuple(x.detach().double().requires_grad_() for x in operands)
    actual = routed_attention(operands, chosen, *places(), window)
    expected = routed_reference(wide, chosen, *places(), window)
    dout = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1))
    found = actual, *torch.autograd.grad(actual, operands, dout.to(dtype))
    wanted = [expected] + [torch.zeros_like(x) for x in wide]
    if expected.requires_grad:
        wanted[1:] = torch.autograd.grad(expected, wide, dout.double())
    for name, x, y in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        assert_close(x, y, precision, name)
    assert not actual[~chosen].any()


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [0, 1, 9])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_routed_equals_the_definition(key_heads, window, share):
    assert_routed_equals_definition(key_heads, window, share, torch.float64, "fp64")


def visited(monkeypatch, chosen: torch.Tensor, window: int = 0) -> int:
    """Blocks of keys that the tiles of queries go over."""
    length, sights = chosen.shape[1], []
    flash = op.flash_lifetime

    def spy(q, k, v, expiry, query_positions, key_positions, backend):
        sights.append(sight_of((q, k, v), (expiry, query_positions, key_positions)))
        return flash(q, k, v, expiry, query_positions, key_positions, backend=backend)

    monkeypatch.setattr(op, "flash_lifetime", spy)
    q, k, v = (torch.randn(*chosen.shape, 4) for _ in range(3))
    positions = torch.arange(length).expand(len(chosen), -1)
    routed_attention((q, k, v), chosen, positions, torch.full_like(positions, length), window)
    monkeypatch.undo()
    first, last, start, _, _, stop = sights[0].ranges(64, 64).long().unbind(-1)
    return int((last - first + stop - start).sum())


def test_queries_that_chose_nothing_cost_nothing(monkeypatch):
    chosen = torch.rand(1, 1024, 4, generator=torch.Generator().manual_seed(0)) < 0.25
    everything = visited(monkeypatch, torch.ones_like(chosen))
    assert everything == 4 * 16 * 17 // 2
    assert visited(monkeypatch, torch.zeros_like(chosen)) == 0
    # A tile of each lane has queries of both kinds.
    assert visited(monkeypatch, chosen) <= 0.25 * everything + 4 * 16
    one_head = torch.zeros_like(chosen)
    one_head[..., 2] = True
    assert visited(monkeypatch, one_head) == everything / 4
    assert (
        visited(monkeypatch, chosen, window=64)
        <= 0.5 * visited(monkeypatch, torch.ones_like(chosen), window=64) + 4 * 16
    )


REFUSED = {
    "chosen": (lambda o, c, p, e: (o, c.float(), p, e), "chosen must be bool"),
    "positions": (lambda o, c, p, e: (o, c, p[:1], e), "positions must be"),
    "ends": (lambda o, c, p, e: (o, c, p, e[:, 1:]), "ends"),
    "heads": (lambda o, c, p, e: ((o[0][:, :, :3], *o[1:]), c[..., :3], p, e), "must divide"),
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused(change, words):
    operands, chosen = example(2, 0.5, torch.float64)
    with pytest.raises(ValueError, match=words):
        routed_attention(*change(operands, chosen, *places()))


def test_more_coordinates_than_int32_holds_are_refused():
    q, k, v = (torch.empty(2, 2**21, 1024, 1, device="meta") for _ in range(3))
    ends = torch.empty(2, 2**21, device="meta")
    with pytest.raises(ValueError, match="use fewer rows"):
        routed_attention((q, k, v), torch.empty(q.shape[:3], device="meta").bool(), ends, ends)
