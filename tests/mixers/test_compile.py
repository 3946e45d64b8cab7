"""torch.compile and activation checkpointing of every mixer."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from longctx.mixers import MixerConfig
from longctx.sequence.expected import WIDTHS, Share
from longctx.sequence.ledger import Ledger, Traffic
from longctx.sequence.local import LocalView
from longctx.sequence.placement import place
from longctx.sequence.plan import Plan
from longctx.sequence.sharded import ShardedView, Transports
from longctx.sequence.simulator import Hub
from tests.mixers.examples import all_variants
from tests.mixers.test_every_mixer import (
    CUTS,
    build,
    example_input,
    output_and_gradients,
    packed_view,
    variants,
)
from tests.sequence.links import simulated_links

LENGTH = 40
BREAKS_PER_VERB = 3
"""Graph breaks that each verb of a mixer, and each round of prefixes that waits for another, may
cost when its sequence is split: an exchange ends the graphs of the functions around it too."""


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.values(), right.values(), strict=True))


def is_one_graph(config: MixerConfig) -> bool:
    """Whether a mixer promises one graph. A memory that is handed over, and keys that are laid out
    by a policy or a selection, follow what the host lays out for each batch; a compiler leaves
    them out."""
    return not {"handoff", "fetch", "means", "select"} & config.verbs()


@variants
def test_a_mixer_compiles_without_graph_breaks_and_equals_eager(config):
    """A mixer that promises no single graph equals eager all the same."""
    mixer, x_BTD = build(config), example_input(2, LENGTH)
    view = packed_view(2, LENGTH, (1, 17))
    torch._dynamo.reset()
    compiled = torch.compile(mixer, fullgraph=is_one_graph(config), backend="aot_eager")
    expected = output_and_gradients(mixer, mixer, x_BTD, view)
    assert equal(output_and_gradients(mixer, compiled, x_BTD, view), expected)


@pytest.mark.parametrize(
    "config",
    [config for _, config in all_variants() if is_one_graph(config)],
    ids=[name for name, config in all_variants() if is_one_graph(config)],
)
def test_other_documents_do_not_compile_again(config):
    """Of mixers that are one graph; the number of graphs of others is no promise."""
    mixer, x_BTD = build(config), example_input(2, LENGTH)
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(mixer, fullgraph=True, backend=count)
    for starts in ((0, 4, 9), (0, 11, 30)):
        view = LocalView(((0,), starts), LENGTH)
        assert torch.equal(compiled(x_BTD, view).out, mixer(x_BTD, view).out)
    assert len(graphs) == 1


@variants
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_a_checkpointed_mixer_has_the_same_gradients(config, cuts):
    mixer, x_BTD = build(config), example_input(2, LENGTH)
    view = packed_view(2, LENGTH, tuple(cut for cut in cuts if cut < LENGTH))
    expected = output_and_gradients(mixer, mixer, x_BTD, view)

    def call(x_BTD, view):
        return checkpoint(mixer, x_BTD, view, use_reentrant=False)

    assert equal(output_and_gradients(mixer, call, x_BTD, view), expected)


@variants
def test_graph_breaks_of_a_split_mixer_stay_within_the_budget(config):
    mixer, x_BTD = build(config), example_input(2, LENGTH)
    plan = Plan(place("contiguous", 1, LENGTH), 0, ((0,), (0, 13)))
    links = simulated_links(Hub(), 0, 1, 1, Ledger())
    view = ShardedView(plan, links, Transports())
    assert view.positions_BT.shape == (2, LENGTH)
    torch._dynamo.reset()
    explained = torch._dynamo.explain(mixer)(x_BTD, view)
    share = Share(0, plan.placement, plan.rows, Transports(), WIDTHS["fp64"])
    rounds = mixer.expected_traffic(share).get(("prefix", False), Traffic(1, 0)).calls
    budget = BREAKS_PER_VERB * (len(config.verbs()) + rounds - 1)
    assert 0 < explained.graph_break_count <= budget, explained.break_reasons
