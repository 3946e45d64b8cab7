"""Running log-sum-exps under every split: values, all gradients, and what travels, to the byte."""

import itertools

import pytest
import torch
from longctx_kernels.running import running_log_sum_exp_reference, weighted_means_reference
from torch import Tensor

from longctx.sequence import running
from longctx.sequence.expected import (
    WIDTHS,
    Share,
    Sizes,
    combined,
    means_traffic,
    running_traffic,
)
from longctx.sequence.ledger import Label, Ledger, Traffic
from longctx.sequence.local import LocalView
from longctx.sequence.placement import PLACEMENTS, place
from longctx.sequence.running import running_means
from longctx.sequence.sharded import Transports
from longctx.sequence.simulator import Hub, run_ranks
from longctx.sequence.verbs import prefix
from tests.sequence.cases import (
    DOCUMENTS,
    LAYER,
    Case,
    Setting,
    Shard,
    Values,
    errors,
    expected_of,
    run_simulated,
)
from tests.sequence.links import simulated_links
from tests.tolerances import LARGEST_ERROR, error_of

HEADS, ROWS, VALUE = 2, 3, 5
TOKENS = {"x": (HEADS, ROWS), "read": (HEADS, ROWS), "v": (HEADS, VALUE)}
BATCHES = (
    {"length": 31, "documents": DOCUMENTS},
    {"length": 9, "documents": ((0,), (0, 1, 4, 8))},
    {"length": 301, "documents": ((0, 150, 151), (0,))},
)


def sharded(shard: Shard, inputs: Values) -> Tensor:
    """Log-sum-exps, and means by way of weights at a scale."""
    view, x = shard.view, 5 * inputs["x"]
    means = running_means(view, x, inputs["read"], inputs["v"])
    return torch.cat((view.running_log_sum_exp(x).total, means), -1)


def whole(setting: Setting, inputs: Values) -> Tensor:
    cuts = LocalView(setting.documents, setting.length).plan.cuts
    x, read, v = (inputs[name].flatten(0, 1) for name in ("x", "read", "v"))
    total = running_log_sum_exp_reference(5 * x[None], None, torch.tensor(cuts))[0]
    means = weighted_means_reference(5 * x, torch.ones_like(x), v, cuts)
    out = torch.cat((total, (read[:, :, None] @ means)[:, :, 0]), -1)
    return out.view(*inputs["x"].shape[:2], HEADS, -1)


CASE = Case("running-log-sum-exp", TOKENS, sharded, whole)


def settings(prefix: str, batch: dict) -> list[Setting]:
    found = []
    for ranks, placement, heads in itertools.product((1, 2, 3, 4), PLACEMENTS, (1, 2)):
        is_legal = ranks % heads == 0 and not (placement == "mirror" and heads % 2)
        if is_legal and not (prefix == "ulysses" and heads == 1 < ranks):
            found.append(Setting(ranks, placement, Transports(prefix, heads=heads), **batch))
    return found


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: f"T{batch['length']}")
@pytest.mark.parametrize("prefix", ["allgather", "scan", "serial", "ulysses"])
def test_any_split_equals_the_definition_and_sends_what_the_formula_says(prefix, batch):
    for setting in settings(prefix, batch):
        results = run_simulated(CASE, setting)
        found = errors(results, expected_of(CASE, Setting(1, **batch)))
        assert max(found.values()) <= LARGEST_ERROR["fp64"], (setting, found)
        assert set(found) == {"output", *(f"gradient of {name}" for name in TOKENS)}
        placement, rows = setting.plan(0).placement, len(setting.documents)
        for rank, result in enumerate(results):
            share = Share(rank, placement, rows, setting.transports, WIDTHS["fp64"])
            means = means_traffic(share, Sizes(HEADS, HEADS, ROWS, VALUE))
            traffic = combined([running_traffic(share, HEADS * ROWS), means])
            assert result.traffic == {Label(LAYER, *key): t for key, t in traffic.items()}


def test_one_number_a_row_travels_for_each_segment_of_the_other_ranks():
    share = Share(1, place("zigzag", 3, 60), 2, Transports("scan"), WIDTHS["bf16"])
    each = Traffic(1, 2 * 2 * 2 * 6 * 4)
    assert running_traffic(share, 6) == {("prefix", False): each, ("prefix", True): each}


def test_a_sum_that_gets_lost_is_noticed(monkeypatch):
    def lose(elements, monoid, wire):
        return tuple(torch.full_like(x, -torch.inf) + 0 * x for x in prefix(elements, monoid, wire))

    monkeypatch.setattr(running, "prefix", lose)
    found = errors(run_simulated(CASE, Setting(2, "zigzag")), expected_of(CASE, Setting(1)))
    assert found["output"] > 1e-2 or found["output"] == float("inf")


@pytest.mark.parametrize("placement", ["contiguous", "zigzag"])
def test_large_numbers_survive_the_exchange_in_single_precision(placement):
    """A rank whose numbers are far below those of another neither overflows nor gets lost."""
    length, ranks, documents = 40, 4, ((0,), (0, 13))
    generator = torch.Generator().manual_seed(0)
    x, read, v = torch.randn(3, 2, length, HEADS, ROWS, generator=generator)
    blocks = torch.randn(2, length // 5, 1, 1, generator=generator).sign()
    x = x + 200 * blocks.repeat_interleave(5, 1)
    view = LocalView(documents, length)
    expected = running_means(view, *(y.double() for y in (x, read, v)))
    setting = Setting(ranks, placement, length=length, documents=documents)

    def work(rank: int, hub: Hub):
        plan = setting.plan(rank)
        shard = Shard(setting, plan, simulated_links(hub, rank, ranks, 1, Ledger()))
        here = plan.token_ids_BT[0]
        leaves = [y[:, here].requires_grad_() for y in (x, read, v)]
        out = running_means(shard.view, *leaves)
        out.sum().backward()
        return here, out, [y.grad for y in leaves]

    for here, out, gradients in run_ranks(ranks, work):
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        # A number near 200 is only known to 1e-5, and so is the scale that leaves a rank.
        assert error_of(out, expected[:, here], "fp64") < 1e-4
