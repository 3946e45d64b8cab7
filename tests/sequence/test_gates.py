"""Gates per token under every split: values, all gradients, and what travels, to the byte."""

import itertools
import random

import pytest
import torch

from longctx.sequence.affine import GatheredPrefix
from longctx.sequence.ledger import Ledger
from longctx.sequence.placement import PLACEMENTS
from longctx.sequence.sharded import Transports
from longctx.sequence.simulator import Hub, run_ranks
from tests.sequence.cases import DOCUMENTS, Case, Setting, Shard, errors, expected_of, run_simulated
from tests.sequence.gate_cases import GATE_CASES, gate_ledger
from tests.sequence.links import simulated_links
from tests.tolerances import LARGEST_ERROR

PREFIXES = ("allgather", "scan", "serial", "ulysses")
BATCHES = (
    {"length": 31, "documents": DOCUMENTS},
    {"length": 31, "documents": DOCUMENTS[:1]},
    {"length": 9, "documents": ((0,), (0, 1, 4, 8))},
    {"length": 301, "documents": ((0, 150, 151), (0,))},
)


def settings(prefix: str) -> list[Setting]:
    """Every split by this transport, each of a batch drawn by lot."""
    chance, found = random.Random(prefix), []
    for ranks, placement, heads in itertools.product((1, 2, 3, 4), PLACEMENTS, (1, 2, 4)):
        is_legal = ranks % heads == 0 and not (placement == "mirror" and heads % 2)
        if is_legal and not (prefix == "ulysses" and heads == 1 < ranks):
            transports = Transports(prefix, heads=heads)
            found.append(Setting(ranks, placement, transports, **chance.choice(BATCHES)))
    return found


def whole_of(case: Case, setting: Setting):
    return expected_of(case, Setting(1, length=setting.length, documents=setting.documents))


@pytest.mark.parametrize("kind", GATE_CASES)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_split_equals_one_process_and_sends_what_the_formula_says(prefix, kind):
    case = GATE_CASES[kind]
    for setting in settings(prefix):
        results = run_simulated(case, setting)
        found = errors(results, whole_of(case, setting))
        assert max(found.values()) <= LARGEST_ERROR["fp64"], (setting, found)
        assert "gradient of gate" in found
        for rank, result in enumerate(results):
            assert result.traffic == gate_ledger(kind, setting, rank), (setting, rank)


@pytest.mark.parametrize("kind", GATE_CASES)
@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("transports", [Transports(), Transports("ulysses", heads=2)], ids=str)
def test_gates_travel_as_they_are_and_factors_in_the_precision_of_states(
    transports, gate_dtype, kind
):
    setting = Setting(4, "zigzag", transports)

    def work(rank: int, hub: Hub):
        ledger, plan = Ledger(), setting.plan(rank)
        shard = Shard(setting, plan, simulated_links(hub, rank, 4, transports.heads, ledger))
        tokens, _ = GATE_CASES[kind].inputs(setting)
        *qkv, gate = (x[:, plan.token_ids_BT[0]] for x in tokens.values())
        leaves = [*(x.bfloat16() for x in qkv), -gate.square().to(gate_dtype)]
        leaves = [x.requires_grad_() for x in leaves]
        shard.view.decay_attention(*leaves).sum().backward()
        assert [x.grad.dtype for x in leaves] == [*[torch.bfloat16] * 3, gate_dtype]
        return ledger.traffic()

    for rank, traffic in enumerate(run_ranks(4, work)):
        assert traffic == gate_ledger(kind, setting, rank, "bf16", gate_dtype.itemsize)


@pytest.mark.parametrize("kind", GATE_CASES)
@pytest.mark.parametrize("direction", ["rightwards", "leftwards"])
def test_a_state_that_gets_lost_is_noticed(direction, kind, monkeypatch):
    lose = lambda self, added, label: lambda: torch.zeros_like(added)  # noqa: E731
    monkeypatch.setattr(GatheredPrefix, direction, lose)
    case, setting = GATE_CASES[kind], Setting(2, "zigzag")
    found = errors(run_simulated(case, setting), whole_of(case, setting))
    assert found["gradient of gate"] > 1e-3
    assert (found["output"] > 1e-3) == (direction == "rightwards")


def test_a_backend_that_cannot_split_is_refused():
    setting = Setting(1)

    def work(rank: int, hub: Hub):
        shard = Shard(setting, setting.plan(rank), simulated_links(hub, rank, 1, 1, Ledger()))
        q, k, v, gate = GATE_CASES["g"].inputs(setting)[0].values()
        with pytest.raises(ValueError, match="backend 'fla' "):
            shard.view.decay_attention(q, k, v, -gate.square(), backend="fla")

    run_ranks(1, work)
