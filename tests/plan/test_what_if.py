"""Simulated steps agree with formulas where these must be right, and say what delays cost."""

import json
import time

import pytest

from longctx.cli import main
from longctx.plan.choices import changed
from longctx.plan.clusters import load_cluster
from longctx.plan.costs import step_time
from longctx.plan.events import simulate
from longctx.plan.scene import Scene
from longctx.plan.what_if import what_if
from longctx.plan.workload import workload
from longctx.train.settings import load_settings

CLUSTER = load_cluster("8xh100")
VOCABULARY = 32768
RUN = {"train.seq_len": 262144, "train.batch_size": 1, "train.micro_batch": 0}


def work(processes=8, sp=8, preset="340m", **more):
    changes = RUN | {"parallel.sp": sp} | {n.replace("__", "."): v for n, v in more.items()}
    return workload(changed(load_settings(preset), changes), processes, VOCABULARY, "bf16")


def steady(work):
    scene = Scene(work, CLUSTER)
    program = scene.program()
    return scene.whole(simulate(program, scene.links).seconds)


def gap(run):
    """Between simulation and formulas, by what is neither the update nor fixed."""
    time = step_time(run, CLUSTER)
    return abs(steady(run) - time.total) / (time.total - time.fixed - time.optimizer)


AGREEING = {
    "one sequence": {},
    "ring": {"parallel__stream": "ring"},
    "a head at a time": {"parallel__gather_heads": 1},
    "contiguous": {"parallel__placement": "contiguous"},
    "heads": {"parallel__heads": 4, "parallel__prefix": "ulysses"},
    "shards": {"parallel__engine": "fsdp2", "train__micro_batch": 1, "train__batch_size": 4},
    "again": {"memory__checkpointing": "full", "parallel__engine": "fsdp2"},
    "kept": {"memory__checkpointing": "keep", "parallel__stream": "ring"},
    "replicas": {"sp": 4, "train__batch_size": 4, "parallel__engine": "fsdp2"},
    "two nodes": {"processes": 16, "sp": 16},
    "tensor parallel": {"sp": 4, "parallel__tp": 2, "parallel__engine": "fsdp2"},
    "delta rules": {"preset": "gdn-h1"},
}


@pytest.mark.parametrize("changes", AGREEING.values(), ids=AGREEING)
def test_where_computing_takes_longest_formulas_agree(changes):
    run = work(**{"parallel__prefix": "allgather"} | changes)
    assert gap(run) < 0.01


@pytest.mark.parametrize("heads", [0, 1])
def test_exchanges_that_nothing_hides_take_what_formulas_say(heads):
    run = work(
        train__seq_len=8192,
        parallel__prefix="allgather",
        parallel__engine="none",
        parallel__gather_heads=heads,
    )
    time = step_time(run, CLUSTER)
    assert time.exposed["stream"] + time.exposed["prefix"] > 0.1 * sum(time.compute.values())
    assert gap(run) < 0.01


def test_weights_that_nothing_hides_take_what_formulas_say():
    run = work(sp=1, train__seq_len=1024, train__batch_size=8, parallel__engine="fsdp2")
    time = step_time(run, CLUSTER)
    assert time.exposed["weights"] + time.exposed["gradients"] > 0.1 * sum(time.compute.values())
    assert gap(run) < 0.02  # one gather more is beside work


@pytest.mark.parametrize("placement", ["contiguous", "zigzag"])
@pytest.mark.parametrize("prefix", ["serial", "scan"])
def test_a_chain_is_paid_once_and_not_by_every_layer(prefix, placement):
    def chains(depth):
        """Seconds of waiting, simulated and by formulas."""
        run = work(
            preset="340m-linear",
            model__depth=depth,
            train__seq_len=2048,
            parallel__engine="none",
            parallel__prefix=prefix,
            parallel__placement=placement,
        )
        time = step_time(run, CLUSTER)
        return steady(run) - time.total + time.exposed["prefix"], time.exposed["prefix"]

    (one, alone), (nine, added) = chains(1), chains(9)
    assert one == pytest.approx(alone)
    assert added == pytest.approx(9 * alone)
    assert nine < added / 3


def test_delays_lengthen_a_step_and_the_same_seeds_tell_the_same():
    run = work()
    found = what_if(run, CLUSTER)
    assert found == what_if(run, CLUSTER)
    time = step_time(run, CLUSTER)
    computing = sum(time.compute.values()) + time.optimizer
    for way in found:
        assert way.steady < way.usual <= way.worst < 1.15 * way.steady
        assert way.one_slow - way.steady == pytest.approx(0.1 * computing, rel=0.01)


def test_other_transports_are_tried_where_they_are_legal():
    ways = [(way.prefix, way.stream, way.gather_heads) for way in what_if(work(), CLUSTER)]
    first = ways[0]
    assert len(ways) == len({*ways}) == 5
    assert {prefix for prefix, *_ in ways} == {"allgather", "scan", "serial"}
    assert {way[1:] for way in ways} == {("allgather", 0), ("allgather", 1), ("ring", 0)}
    assert all(way[0] == first[0] or way[1:] == first[1:] for way in ways)
    (alone,) = what_if(work(processes=1, sp=1), CLUSTER)
    assert (alone.prefix, alone.stream) == ("", "")
    assert alone.steady == pytest.approx(alone.predicted)


@pytest.mark.parametrize(
    "options",
    [
        {"parallel__heads": 8, "parallel__stream": "ring"},
        {"sp": 514, "processes": 514, "parallel__heads": 2, "parallel__stream": "ring"},
        {"sp": 257, "processes": 257},
        {"sp": 2, "train__batch_size": 256},
    ],
    ids=["heads", "primes", "prime", "replicas"],
)
def test_large_runs_are_simulated_in_part(options):
    sizes = {"processes": 512, "sp": 512, "train__seq_len": 1 << 20} | options
    started = time.process_time()
    scene = Scene(work(preset="7b", parallel__engine="fsdp2", **sizes), CLUSTER)
    program = scene.program()
    assert len(program.operations) < 80_000
    assert scene.ranks <= 256
    whole = scene.whole(simulate(program, scene.links).seconds)
    assert whole == pytest.approx(scene.time.total, rel=0.3)
    assert time.process_time() - started < 3


def test_a_plan_shows_what_delays_cost(capsys):
    argv = ["plan", "340m", "--cluster", "8xh100", "--processes", "8", "--vocab_size", "512"]
    argv += ["--search", "false", "--what_if", "true", "--parallel.sp", "8"]
    assert main(argv) == 0
    text = capsys.readouterr().out
    table = text[text.index("What if, as it is: prefix, stream") :].splitlines()
    assert table[3].split()[:2] == ["serial,", "allgather"]
    assert "and 16 of 24 layers" in table[6]
    assert max(map(len, text.splitlines())) <= 100
    assert main([*argv, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [way["layers"] for way in record["what_if"]] == [[16, 24]] * 5
