"""A seeded cover of the conformance matrix, pairwise for every subject, and what it rests on."""

import functools
import itertools
from typing import Any

import pytest
import torch

from longctx.mixers import MixerConfig
from longctx.sequence.affine import GatheredPrefix
from longctx.sequence.placement import PLACEMENTS, place
from longctx.sequence.plan import Plan
from longctx.sequence.sharded import Transports
from tests.conformance import MARKED, README, support_table
from tests.sequence.conform import run
from tests.sequence.matrix import (
    DECODER,
    HEADS,
    LAYOUTS,
    LENGTHS,
    PREFIXES,
    RANKS,
    STREAMS,
    Case,
    Setting,
    all_cases,
    documents_of,
    scaled,
    shown,
    stand_ins,
    subjects,
)
from tests.sequence.pairwise import pairwise_cover
from tests.tolerances import LARGEST_ERROR


@functools.cache
def matrix() -> frozenset[Case]:
    """All cases, for looking them up."""
    return frozenset(all_cases())


def cover(subject: str) -> list[Case]:
    """Few cases that show every pair of values which any case of a subject shows."""

    def case_of(values: dict[str, Any]) -> Case:
        stream, gather_heads = values["stream"]
        transports = Transports(values["prefix"], stream, values["heads"], gather_heads)
        setting = Setting(values["ranks"], values["placement"], transports)
        return Case(subject, setting, values["length"], values["layout"])

    factors = {
        "ranks": RANKS,
        "placement": PLACEMENTS,
        "prefix": PREFIXES,
        "stream": STREAMS,
        "heads": HEADS,
        "length": LENGTHS,
        "layout": LAYOUTS,
    }
    seed = list(subjects()).index(subject)
    chosen = pairwise_cover(factors, lambda values: case_of(values) in matrix(), seed)
    return [case_of(values) for values in chosen]


@pytest.mark.parametrize("subject", subjects())
def test_any_split_equals_one_process(subject):
    for case in cover(subject):
        result = run(case)
        assert result.error <= LARGEST_ERROR["fp64"], f"{case}: {result.worst}"
        assert not result.mismatch, case


def test_a_state_that_gets_lost_is_noticed(monkeypatch):
    lose = lambda self, added, label: lambda: torch.zeros_like(added)  # noqa: E731
    monkeypatch.setattr(GatheredPrefix, "rightwards", lose)
    case = Case("linear-retention", Setting(2, "zigzag", Transports()), 63, "one document")
    result = run(case)
    assert result.error > 1e-2
    assert "recorded" in result.mismatch


def hidden_share(window: int, documents: tuple[tuple[int, ...], ...], length: int) -> float:
    """Share of the pairs of a token and one before it, or itself, that a window hides."""
    seen = possible = 0
    for starts in documents:
        for start, stop in itertools.pairwise((*starts, length)):
            tokens = torch.arange(1, stop - start + 1)
            possible += int(tokens.sum())
            seen += int(tokens.clamp(max=window).sum())
    return 1 - seen / possible


def test_every_window_and_selection_hides_and_shows_some_pairs():
    for subject, length, layout in itertools.product(subjects(), LENGTHS, LAYOUTS):
        for config in subjects()[subject]:
            inner = getattr(config, "inner", config)
            if inner is not config:
                num_heads = inner.num_heads - config.shared_heads
                assert 0.1 <= config.active_heads / num_heads <= 0.9, subject
            window = shown(scaled(inner, length))
            # Choices by query or token show more than a window; their own tests say how much.
            if window < 2 or {"means", "select"} & inner.verbs():
                continue
            for setting in stand_ins(subject).values():
                documents = documents_of(layout, setting.place(length))
                assert 0.1 <= hidden_share(window, documents, length) <= 0.9, (subject, layout)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ["contiguous", "zigzag"])
def test_documents_lie_to_the_cuts_as_layouts_say(name, length):
    placement = place(name, 4, length)
    cuts = {s.start for own in placement.segments for s in own} - {0}

    def starts(layout):
        return set(itertools.chain.from_iterable(documents_of(layout, placement)))

    def documents(layout):
        for row in documents_of(layout, placement):
            yield from itertools.pairwise((*row, length))

    packed = starts("packed")
    assert packed & cuts
    assert packed - cuts - {0}
    assert any(a < cut < b for a, b in documents("packed") for cut in cuts)
    singles = {a for a, b in documents("length 1") if b - a == 1}
    assert {0, length - 1} < singles
    assert singles & cuts
    assert singles & {cut - 1 for cut in cuts}
    plans = [Plan(placement, rank, documents_of("unreached ranks", placement)) for rank in range(4)]
    reached = [{(p.row, p.document) for p in plan.pieces} for plan in plans]
    assert len(set.intersection(*reached)) < len(set.union(*reached))


def test_the_table_in_the_readme_is_current():
    assert all(table == support_table() for table in MARKED.findall(README.read_text()))


def test_the_table_names_every_layer_and_what_is_refused():
    table = support_table()
    lines = [line.split(" | ") for line in table.splitlines()]
    states = [cells[2:] for cells in lines if cells[1:2] == ["prefix allgather, scan, serial"]]
    assert ["exact", "exact"] in [cells[:2] for cells in states]
    keys = [cells[2:] for cells in lines if cells[1:2] == ["stream allgather, ring"]]
    assert keys
    for cells in keys:
        assert cells[:2] == ["exact", "exact"]
        assert cells[2].startswith("refused")
    assert DECODER not in table
    for kind in MixerConfig.kinds():
        assert kind in table
