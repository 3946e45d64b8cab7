"""The delta rule under every split: values, all gradients, and what travels, to the byte."""

import pytest
import torch
from longctx_kernels import decay_torch

from longctx.sequence.affine import GatheredPrefix
from longctx.sequence.ledger import Ledger
from longctx.sequence.sharded import Transports
from longctx.sequence.simulator import run_ranks
from tests.sequence.cases import Setting, Shard, errors, run_simulated
from tests.sequence.delta_cases import DELTA_CASES, HEADS, KEY, VALUE, delta_ledger, operands
from tests.sequence.links import simulated_links
from tests.sequence.test_gates import PREFIXES, settings, whole_of
from tests.tolerances import LARGEST_ERROR


@pytest.mark.parametrize("kind", DELTA_CASES)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_split_equals_one_process_and_sends_what_the_formula_says(prefix, kind):
    case = DELTA_CASES[kind]
    for setting in settings(prefix):
        results = run_simulated(case, setting)
        found = errors(results, whole_of(case, setting))
        assert max(found.values()) <= LARGEST_ERROR["fp64"], (setting, found)
        assert "gradient of beta" in found
        for rank, result in enumerate(results):
            assert result.traffic == delta_ledger(kind, setting, rank), (setting, rank)


@pytest.mark.parametrize("kind", DELTA_CASES)
@pytest.mark.parametrize("placement", ["contiguous", "zigzag"])
def test_an_incoming_state_passes_through_many_slabs(placement, kind, monkeypatch):
    monkeypatch.setattr(decay_torch, "SLAB_ELEMENTS", 1)
    setting = Setting(2, placement, length=301, documents=((0, 150, 151), (0,)))
    found = errors(run_simulated(DELTA_CASES[kind], setting), whole_of(DELTA_CASES[kind], setting))
    assert max(found.values()) <= LARGEST_ERROR["fp64"], found


@pytest.mark.parametrize("kind", DELTA_CASES)
@pytest.mark.parametrize("direction", ["rightwards", "leftwards"])
def test_a_state_that_gets_lost_is_noticed(direction, kind, monkeypatch):
    lose = lambda self, added, label: lambda: torch.zeros_like(added)  # noqa: E731
    monkeypatch.setattr(GatheredPrefix, direction, lose)
    case, setting = DELTA_CASES[kind], Setting(2, "zigzag")
    found = errors(run_simulated(case, setting), whole_of(case, setting))
    assert found["gradient of beta"] > 1e-3
    assert (found["output"] > 1e-3) == (direction == "rightwards")


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_scan_moves_one_state_over_each_cut_and_no_matrix(ranks):
    setting = Setting(ranks, "contiguous", Transports("scan"), documents=((0,),))
    results = run_simulated(DELTA_CASES["gk"], setting)
    moved = [sum(t.received for t in result.traffic.values()) for result in results]
    assert sum(moved) == 2 * (ranks - 1) * HEADS * KEY * VALUE * 8


def test_a_backend_that_cannot_split_is_refused():
    def work(rank, hub):
        setting = Setting(1)
        shard = Shard(setting, setting.plan(rank), simulated_links(hub, rank, 1, 1, Ledger()))
        tokens, _ = DELTA_CASES["g"].inputs(setting)
        with pytest.raises(ValueError, match="backend 'fla'"):
            shard.view.delta_attention(*operands(tokens), backend="fla")

    run_ranks(1, work)
