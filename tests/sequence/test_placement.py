import pytest

from longctx.sequence.placement import PLACEMENTS, Segment, mirror_chunks, place


@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("length", [96, 63, 1001])
def test_every_position_has_one_owner(name, ranks, length):
    ranks = 2 * ranks if name == "mirror" else ranks
    placement = place(name, ranks, length, heads=2)
    held = sorted(p for own in placement.segments for s in own for p in range(s.start, s.stop))
    assert held == list(range(length))
    assert max(placement.lengths) - min(placement.lengths) <= (2 if name == "zigzag" else 1)
    assert all(
        placement.owner(s.start) == rank for rank, own in enumerate(placement.segments) for s in own
    )


def test_zigzag_gives_each_rank_equal_causal_work():
    placement = place("zigzag", 4, 64)
    work = [sum(p + 1 for s in own for p in range(s.start, s.stop)) for own in placement.segments]
    assert len(set(work)) == 1
    assert placement.segments[1] == (Segment(8, 16), Segment(48, 56))


def test_order_walks_the_sequence():
    placement = place("zigzag", 2, 8)
    assert placement.order == ((0, 0), (1, 0), (1, 1), (0, 1))


@pytest.mark.parametrize("heads", [2, 4, 6, 8])
@pytest.mark.parametrize("rings", [1, 2, 3, 4])
def test_mirror_is_zigzag_over_its_ulysses_groups(heads, rings):
    ranks = heads * rings
    assert sorted(mirror_chunks(ranks, heads)) == list(range(ranks))
    groups = tuple(tuple(range(j * heads, (j + 1) * heads)) for j in range(rings))
    merged = place("mirror", ranks, 48 * ranks, heads).merged(groups)
    zigzag = place("zigzag", rings, 48 * ranks)
    if rings == 1:
        assert merged.segments == ((Segment(0, 48 * ranks),),)
    else:
        assert [sum(s.length for s in own) for own in merged.segments] == list(zigzag.lengths)
        expected = zigzag.merged(tuple((r,) for r in range(rings)))
        assert merged == expected


def test_the_published_example_of_mirror():
    assert mirror_chunks(4, 2) == (0, 3, 1, 2)


def test_too_few_tokens_are_refused():
    with pytest.raises(ValueError, match="5 tokens cannot be cut into 8 parts"):
        place("zigzag", 4, 5)
    with pytest.raises(ValueError, match="even Ulysses group"):
        place("mirror", 4, 64, heads=1)
