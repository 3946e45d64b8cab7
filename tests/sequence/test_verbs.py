"""Blocking verbs on simulated ranks equal plain definitions on one process, with all gradients."""

import pytest
import torch

from longctx.sequence.ledger import Ledger
from longctx.sequence.sharded import Transports
from longctx.sequence.simulator import Hub, run_ranks
from tests.sequence.cases import (
    Case,
    Setting,
    errors,
    expected_of,
    run_shard,
    run_simulated,
)
from tests.sequence.links import simulated_links
from tests.sequence.verb_cases import CASES, HEAD_TRADE

ALLOWED = 1e-12
SHORT = {"length": 9, "documents": ((0,), (0, 1, 4, 8))}
"""As little as one token a segment; halos reach over several ranks."""
SETTINGS = [
    *(Setting(ranks, name) for ranks in (1, 2, 3, 4) for name in ("contiguous", "zigzag")),
    *(Setting(ranks, "mirror", Transports(heads=2)) for ranks in (2, 4)),
    *(Setting(4, name, **SHORT) for name in ("contiguous", "zigzag")),
]


def name_of(setting: Setting) -> str:
    heads = f"-{setting.transports.heads}heads" if setting.transports.heads > 1 else ""
    return f"{setting.placement}-{setting.ranks}ranks{heads}-T{setting.length}"


def assert_exact(found: dict[str, float]) -> None:
    assert max(found.values()) <= ALLOWED, found


@pytest.mark.parametrize("setting", SETTINGS, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_verb_equals_its_definition_on_every_rank(case: Case, setting: Setting):
    whole = Setting(1, length=setting.length, documents=setting.documents)
    results = run_simulated(case, setting)
    assert_exact(errors(results, expected_of(case, whole)))


@pytest.mark.parametrize(
    "setting",
    [
        Setting(ranks, name, Transports(heads=heads))
        for ranks, heads in ((1, 1), (2, 2), (4, 2), (4, 4))
        for name in ("contiguous", "zigzag", "mirror")
        if name != "mirror" or heads % 2 == 0
    ],
    ids=name_of,
)
def test_heads_are_traded_for_tokens_and_back(setting: Setting):
    assert_exact(errors(run_simulated(HEAD_TRADE, setting), expected_of(HEAD_TRADE, setting)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_verb_needs_no_gradients(case: Case):
    setting = Setting(3, "zigzag")

    def work(rank: int, hub: Hub):
        with torch.no_grad():
            return run_shard(case, setting, rank, simulated_links(hub, rank, 3, 1, Ledger()))

    per_token, _ = expected_of(case, Setting(1))
    output = {"output": per_token["output"]}
    assert_exact(errors(run_ranks(3, work), (output, {})))


def test_top_tokens_are_chosen_among_ties_and_not_all_are():
    """The inputs of the selections are not trivial."""
    for case in CASES:
        if case.name == "top_k":
            tokens, _ = case.inputs(Setting(1))
            scores = tokens["x"].round()
            best = scores.sort(descending=True).values
            assert (best[:, 8] == best[:, 9]).all(), "the ninth and the tenth tie"
