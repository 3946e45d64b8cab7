"""The traffic of a step by formula: against plain sums, and for thousands of ranks in no time."""

import itertools
import random
import time
from dataclasses import replace

import pytest
import torch

from longctx.config import apply_overrides
from longctx.mixers.base import Mixer
from longctx.model.decoder import Decoder
from longctx.plan.traffic import by_verb, traffic_of
from longctx.plan.traffic_layers import Reported, reported
from longctx.plan.workload import Workload, workload
from longctx.sequence.block_sums import Blocks
from longctx.sequence.fetch import Routes, counted
from longctx.sequence.ledger import OUTSIDE_LAYERS, Label, Traffic
from longctx.sequence.local import LocalView
from longctx.sequence.placement import Segment, place
from longctx.sequence.plan import Plan
from longctx.sequence.policy import Fixed, Full, Neighbourhood, Sharded, Window
from longctx.train.settings import load_settings
from tests.mixers.examples import PLACE, WIDTH, all_variants
from tests.presets import shrunk

VOCABULARY = 256
MOST_SECONDS = 0.1


def work_of(preset: str, processes: int, **changes: object) -> Workload:
    """A preset at width 32, of sequences of 66 tokens; `table__field` names a change."""
    settings = load_settings(preset)
    settings = replace(settings, model=shrunk(settings.model))
    options = {"train.seq_len": 66, "train.batch_size": 4, "train.micro_batch": 0}
    options |= {name.replace("__", "."): value for name, value in changes.items()}
    argv = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    precision = str(changes.get("train__precision", "fp32"))
    return workload(apply_overrides(settings, argv, "test"), processes, VOCABULARY, precision)


def weights_of(work: Workload) -> tuple[int, int]:
    """Elements in layers, and outside of them."""
    with torch.device("meta"):
        model = Decoder(work.settings.model, VOCABULARY)
    inside = sum(p.numel() for p in model.blocks.parameters())
    return inside, model.num_parameters() - inside


def test_one_process_sends_nothing():
    assert traffic_of(work_of("tiny", 1), 0) == {}


def test_a_last_pass_of_fewer_rows_has_documents_of_these_only():
    work = replace(
        work_of("lansa", 2, parallel__sp=2, train__batch_size=3, train__micro_batch=2),
        documents=((0,), (0, 40)),
    )
    assert work.micro_rows == (2, 1)
    assert [work.share(0, rows).documents for rows in work.micro_rows] == [
        ((0,), (0, 40)), ((0,),),
    ]  # fmt: skip


@pytest.mark.parametrize("passes", [1, 2])
def test_weights_come_twice_a_pass_and_once_outside_of_layers(passes):
    work = work_of("7b", 2, train__micro_batch=2 // passes)
    inside, outside = weights_of(work)
    found = by_verb(traffic_of(work, 1))
    # Two shards have no padding: all sizes are even.
    depth = work.settings.model.depth
    received = passes * (2 * inside + outside) * 4 // 2
    assert found["weights"] == Traffic(passes * (2 * depth + 1), received)
    received = passes * (inside + outside) * 4 // 2
    assert found["gradients"] == Traffic(passes * (depth + 1), received)


def test_weights_in_bf16_are_half_as_many_bytes():
    changes = {"parallel__weights": "bf16", "train__precision": "bf16"}
    wide, narrow = work_of("7b", 2), work_of("7b", 2, **changes)
    inside, _ = weights_of(wide)
    whole, half = (by_verb(traffic_of(work, 0)) for work in (wide, narrow))
    assert whole["weights"].received - half["weights"].received == 2 * inside * 2 // 2
    assert whole["gradients"] == half["gradients"]


def test_gradients_of_copies_are_summed_in_one_message():
    work = work_of("7b", 4, parallel__engine="none", train__micro_batch=1)
    message = 2 * 3 * sum(weights_of(work)) // 4 * 4
    assert by_verb(traffic_of(work, 2)) == {
        "gradients": Traffic(1, message),
        # The loss, FLOPs and whether to stop.
        "metrics": Traffic(1, 2 * 3 * 1 * 8),
    }


def test_what_estimates_stand_for_has_a_name_that_says_so():
    work = work_of("7b", 4, parallel__engine="deepspeed", parallel__zero_stage=2)
    half = 3 * sum(weights_of(work)) // 4 * 4
    found = traffic_of(work, 0)
    assert found.pop(Label(OUTSIDE_LAYERS, "gradients (estimate)")) == Traffic(1, 2 * half)
    assert found.pop(Label(OUTSIDE_LAYERS, "weights (estimate)")) == Traffic(1, half)
    assert {label.verb for label in found} == {"metrics", "update norm"}


def test_verbs_add_up_to_everything():
    traffic = traffic_of(work_of("tiny", 4, parallel__sp=4), 3)
    verbs = by_verb(traffic)
    assert {"stream", "prefix", "reduce", "weights", "gradients", "metrics"} <= verbs.keys()
    totals = [[sum(way) for way in zip(*one.values())] for one in (traffic, verbs)]
    assert totals[0] == totals[1]


@pytest.mark.parametrize("policy", ["none", "keep", "full"])
def test_a_layer_that_is_computed_again_asks_again_for_what_was_not_kept(policy):
    changes = {"parallel__sp": 4, "parallel__heads": 2, "parallel__prefix": "ulysses"}
    once = by_verb(traffic_of(work_of("340m", 4, **changes), 0))
    found = by_verb(traffic_of(work_of("340m", 4, memory__checkpointing=policy, **changes), 0))
    more = {verb: found[verb].calls - once[verb].calls for verb in found}
    layers = {"none": {}, "keep": {"heads": 5 * 4}, "full": {"heads": 20, "prefix": 4, "stream": 1}}
    assert {verb: calls for verb, calls in more.items() if calls} == layers[policy]


def test_numbers_that_mixers_report_are_known():
    """Of every mixer, so that a new one is not forgotten."""
    for name, config in all_variants():
        mixer = config.build(PLACE).train()
        overrides = type(mixer).losses, type(mixer).statistics
        if overrides == (Mixer.losses, Mixer.statistics):
            assert reported(mixer) == Reported(), name
            continue
        view = LocalView.whole(1, 16, "cpu").keyed(0, 0, (0,))
        with torch.no_grad():
            projected = mixer.project(torch.zeros(1, 16, WIDTH), view)
            statistics = mixer.statistics(projected, view).values()
            losses = frozenset(mixer.losses(projected, view))
        assert reported(mixer) == Reported(losses, sum(x.numel() for x in statistics)), name


def plans(count: int) -> list[Plan]:
    """Random placements with random documents."""
    draw, found = random.Random(0), []
    for _ in range(count):
        ranks = draw.choice([2, 3, 4])
        length = draw.randint(4 * ranks, 150)
        name = draw.choice(["contiguous", "zigzag", *["mirror"] * (ranks % 2 == 0)])
        rows = [{0, *draw.choices(range(length), k=draw.choice([0, 1, 3]))} for _ in range(2)]
        documents = tuple(tuple(sorted(row)) for row in rows)
        found.append(Plan(place(name, ranks, length, 2), draw.randrange(ranks), documents))
    return found


def test_what_lifetimes_fetch_is_counted_without_its_routes():
    policies = (
        Full(),
        Window(9),
        Window(20, 3),
        Neighbourhood(7, 3),
        Fixed(8, 2, 2, 4),
        Sharded(4, 1, 2, 3, 1),
    )
    for plan, policy in itertools.product(plans(30), policies):
        routes = Routes(plan, policy)
        ways = routes.arriving.values(), routes.leaving.values()
        assert counted(plan, policy) == tuple(sum(map(len, way)) for way in ways), (plan, policy)


def test_pieces_of_blocks_are_counted_without_their_numbers():
    for plan, (block, stride) in itertools.product(plans(30), [(4, 4), (6, 2), (3, 3)]):
        blocks = Blocks(plan, block, stride)
        numbers = [blocks.of_rank(rank) for rank in range(plan.placement.ranks)]
        assert blocks.counts == tuple(map(len, numbers)), (plan, block, stride)


@pytest.mark.parametrize(("left", "right"), [(3, 0), (40, 0), (2, 5), (200, 200)])
def test_neighbours_are_counted_without_looking_at_every_pair(left, right):
    def overlap(a: Segment, b: Segment) -> int:
        return max(0, min(a.stop, b.stop) - max(a.start, b.start))

    for plan in plans(12):
        placement, arriving, leaving = plan.placement, 0, 0
        for asker, owner in itertools.permutations(range(placement.ranks), 2):
            for one, held in itertools.product(
                placement.segments[asker], placement.segments[owner]
            ):
                beside = Segment(one.start - left, one.start), Segment(one.stop, one.stop + right)
                tokens = sum(overlap(part, held) for part in beside)
                arriving += tokens * (asker == plan.rank)
                leaving += tokens * (owner == plan.rank)
        assert placement.beside(plan.rank, left, right) == (arriving, leaving)


@pytest.mark.parametrize("preset", ["340m", "7b", "nemotron-h-8b", "lalte"])
def test_thousands_of_ranks_are_no_matter(preset):
    settings = load_settings(preset)
    argv = "--parallel.sp 4096 --train.seq_len 1048576 --train.batch_size 2 --train.micro_batch 1"
    work = workload(apply_overrides(settings, argv.split(), "test"), 4096, 50304, "bf16")
    first = traffic_of(work, 0)
    started = time.process_time()
    assert traffic_of(work, 4095).keys() >= {Label(OUTSIDE_LAYERS, "metrics")}
    assert traffic_of(work, 0) == first
    assert time.process_time() - started < 2 * MOST_SECONDS
