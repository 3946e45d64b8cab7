"""Profiles of steps: their files, and a page whose parts add up."""

import gzip
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from longctx.config.steps import range_of_steps
from longctx.errors import InputError
from longctx.model.decoder import Decoder, initialise
from longctx.sequence import ranges as ranges_module
from longctx.sequence.ledger import Label, Ledger
from longctx.sequence.local import LocalView
from longctx.sequence.ranges import EXCHANGE, NOTHING, Range, Ranges
from longctx.train.metrics import LogConfig
from longctx.train.profile import Profiler, watched
from longctx.train.profile_summary import (
    PARTS,
    Profile,
    covered,
    device_times,
    parts_of,
    summarise,
)
from longctx.train.settings import load_settings
from longctx.train.watchdog import UNHURRIED
from tests.train import processes

GATHER = Label(3, "gather", backward=True)


@pytest.fixture
def sleep(monkeypatch):
    """Lets two milliseconds pass, in which nothing else takes time."""
    now = [0]
    monkeypatch.setattr(ranges_module, "time", SimpleNamespace(perf_counter_ns=lambda: now[0]))

    def sleep() -> None:
        now[0] += 2_000_000

    return sleep


def test_steps_are_named_as_those_that_are_skipped():
    config = LogConfig(profile_steps=("10-12", "20"))
    assert [step for step in range(30) if config.profiles(step)] == [10, 11, 12, 20]


@pytest.mark.parametrize("text", ["0", "3-2", "ten", "1-", "-1"])
def test_what_is_no_step_is_refused_by_name(text):
    with pytest.raises(InputError, match=r"log\.profile_steps"):
        LogConfig(profile_steps=(text,))
    with pytest.raises(InputError, match=r"data\.skip_steps"):
        range_of_steps(text, "data.skip_steps")


def test_without_a_profile_a_range_is_nothing_and_nothing_is_kept():
    ranges = Ranges()
    assert ranges(EXCHANGE, GATHER) is NOTHING
    ranges.enter("layer", 1)
    ranges.leave("layer")
    ranges.departs(GATHER)()
    with ranges.record("step 1") as recorded:
        pass
    assert [found.name for found in recorded.ranges] == ["step 1"]
    assert recorded.flights == []


def test_parts_add_up_to_the_step_and_overlaps_count_once(sleep):
    ranges = Ranges()
    with ranges.record("step 1") as recorded:
        with ranges("data"):
            sleep()
        with ranges("forward"):
            arrives = ranges.departs(GATHER)
            sleep()
            with ranges(EXCHANGE, GATHER):
                sleep()
            arrives()
        with ranges("checkpoint"), ranges(EXCHANGE, GATHER):
            sleep()
        sleep()
    expected = dict.fromkeys(("data", "compute", EXCHANGE, "checkpoint", "other"), 0.002)
    expected |= {"step": 0.01, "in flight": 0.004, "optimizer": 0, "evaluation": 0}
    assert parts_of(recorded) == pytest.approx(expected)


def test_a_range_that_is_left_open_ends_with_the_one_around_it(sleep):
    ranges = Ranges()
    with ranges.record("step 1") as recorded:
        with ranges("backward"):
            ranges.enter("layer", 7)
            sleep()
        ranges.leave("layer")
    inner, outer, step = recorded.ranges
    assert (inner.name, outer.name, step.name) == (7, "backward", "step 1")
    assert inner.end <= outer.end <= step.end
    assert outer.own < inner.own


def test_a_failed_step_leaves_nothing_behind():
    ranges = Ranges()
    with pytest.raises(ValueError, match="broken"), ranges.record("step 1"), ranges("forward"):
        raise ValueError("broken")
    with ranges.record("step 2") as recorded, ranges("data"):
        pass
    assert [found.name for found in recorded.ranges] == ["data", "step 2"]


@pytest.mark.parametrize(
    "way", ["none", "full", pytest.param("compiled", marks=pytest.mark.cluster)]
)
def test_each_layer_is_a_range_forward_and_backward_while_it_is_watched(way):
    settings = load_settings("tiny")
    memory = type(settings.memory)(checkpointing="full" if way == "full" else "none")
    model, ranges = Decoder(settings.model, 32, memory), Ranges()
    initialise(model, 0)
    if way == "compiled":
        torch._dynamo.reset()
        for block in model.blocks:
            block.mixer.compile(fullgraph=True, backend="eager")
    tokens = torch.arange(32)[None] % 32

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(tokens, tokens, LocalView(((0,),), 32)).cross_entropy
        with ranges("backward"):
            loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    expected = run()
    with watched(model, ranges), ranges.record("step 1") as recorded:
        found = run()
    assert all(torch.equal(a, b) for a, b in zip(expected, found))
    names = [str(r.name) for r in recorded.ranges if r.kind == "layer"]
    kinds = ["linear", "linear", "linear", "moh"]
    forward = [f"layer {n}, {kind} (forward)" for n, kind in enumerate(kinds)]
    backward = [f"layer {n}, {kind} (backward)" for n, kind in enumerate(kinds)]
    assert names == forward + backward[::-1]
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)


def test_what_a_gpu_does_counts_overlaps_once():
    def event(name: str, start: float, length: float, cat: str = "kernel") -> dict:
        return {"name": name, "cat": cat, "ts": start, "dur": length}

    events = [event("gemm", 0, 10), event("copy", 5, 10, "gpu_memcpy"), event("aten", 0, 99, "cpu")]
    events += [event("ncclDevKernel_AllGather", 12, 20), event("ncclDevKernel_AllGather", 30, 5)]
    times = device_times({"traceEvents": events})
    assert times == pytest.approx({"compute": 15e-6, "exchange": 23e-6, "exposed exchange": 20e-6})
    assert device_times({}) == {}
    assert covered([Range("", "", 5, 9), Range("", "", 0, 7), Range("", "", 20, 21)]) == 10


def test_the_page_of_many_ranks_and_layers_stays_one_page():
    ranges = Ranges()
    with ranges.record("step 1") as recorded, ranges(EXCHANGE, GATHER):
        pass
    parts = parts_of(recorded)
    text = summarise(Profile(1, recorded, [parts] * 500, {}, ["linear"] * 90, {}))
    assert len(text.splitlines()) < 60
    assert max(map(len, text.splitlines())) <= 130
    assert "484 more ranks" in text
    assert "74 other layers" in text


def profile_of_nothing(folder, watchdog) -> SimpleNamespace:
    """Profiles a step that does nothing; the log."""
    ledger = Ledger()
    mesh = SimpleNamespace(
        ledger=ledger, device=torch.device("cpu"), rank=0, size=1, gather=lambda x: [x]
    )
    told: list[str] = []
    log = SimpleNamespace(warn=told.append, info=told.append, told=told)
    model = Decoder(load_settings("tiny").model, 9)
    profiler = Profiler(LogConfig(profile_steps=("1",)), folder, mesh, model)
    with profiler.step(1, log, watchdog):
        pass
    return log


def test_writing_a_profile_is_no_part_of_a_step_that_may_hang(tmp_path, monkeypatch):
    beats = []
    watchdog = SimpleNamespace(beat=lambda step, phase: beats.append((step, phase)))
    monkeypatch.setattr(Profiler, "_write", lambda self, *_: beats.append("write"))
    profile_of_nothing(tmp_path, watchdog)
    assert beats == [(1, "profile"), "write"]
    assert "profile" in UNHURRIED


@pytest.mark.parametrize("written", [None, '{"traceEvents": ['])
def test_a_trace_that_cannot_be_written_is_a_warning_and_leaves_nothing(
    tmp_path, monkeypatch, written
):
    def export(_traced: object, path: str) -> None:
        Path(f"{path}.tmp").write_text("what torch leaves on a full disk")
        if written:
            Path(path).write_text(written)

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", export)
    log = profile_of_nothing(tmp_path, SimpleNamespace(beat=lambda *_: None))
    warning, done = log.told
    assert warning.startswith(f"{tmp_path}/profile/step-1/rank-0.json.gz: cannot write: ")
    assert ("is the disk full?" in warning) == (written is None)
    assert done.startswith("profile of step 1")
    assert [path.name for path in (tmp_path / "profile/step-1").iterdir()] == ["summary.txt"]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """A run of two processes that share sequences, with a profile of its fourth and fifth step."""
    from longctx.config import apply_overrides

    folder = tmp_path_factory.mktemp("profiled")
    (folder / "text.txt").write_text("words and numbers and words " * 2000)
    argv = f"--run.dir {folder}/run --data.path {folder}/text.txt --train.seq_len 64 "
    argv += "--train.batch_size 2 --train.steps 5 --model.width 32 --eval.sequences 2 "
    argv += "--parallel.sp 2 --log.profile_steps 4-5 --checkpoint.every 5"
    settings = apply_overrides(load_settings("tiny"), argv.split(), "test")
    processes.run(2, settings)
    return settings


def trace_of(settings, step: int, rank: int) -> list[dict]:
    file = settings.run.path / "profile" / f"step-{step}" / f"rank-{rank}.json.gz"
    return json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]


@pytest.mark.cluster
def test_each_process_names_every_exchange_layer_and_wait(profiled):
    config = profiled.model
    for rank in (0, 1):
        events = trace_of(profiled, 4, rank)
        named = {e["name"] for e in events if e.get("cat") == "user_annotation"}
        assert {"step 4", "data", "forward", "backward", "optimizer"} <= named
        for verb in ("prefix of layer 0", "stream of layer 3"):
            assert {f"{verb} (forward)", f"{verb} (backward)"} <= named
        assert {"weights of layer 0 (forward)", "gradients of layer 3 (forward)"} <= named
        assert {"metrics", "gradient norm"} <= named
        ours = {e["name"] for e in events if e.get("pid") == "longctx"}
        for number, letter in enumerate(config.letters):
            kind = config.mixers[letter].kind
            for direction in ("forward", "backward"):
                assert f"layer {number}, {kind} ({direction})" in ours
    assert "checkpoint" in {e["name"] for e in trace_of(profiled, 5, 0)}


@pytest.mark.cluster
def test_rows_of_ours_lie_where_torch_saw_the_same(profiled):
    events = trace_of(profiled, 4, 1)
    for name in ("optimizer", "data", "stream of layer 3 (forward)"):
        theirs = [e for e in events if e["name"] == name and e.get("cat") == "user_annotation"]
        ours = [e for e in events if e["name"] == name and e["pid"] == "longctx" and "dur" in e]
        assert len(theirs) == len(ours)
        for outer, inner in zip(theirs, ours):
            assert outer["ts"] - 500 < inner["ts"]  # microseconds
            assert inner["ts"] + inner["dur"] < outer["ts"] + outer["dur"] + 500


@pytest.mark.cluster
def test_the_page_adds_up_to_the_time_that_the_step_took(profiled):
    rows = (profiled.run.path / "metrics.jsonl").read_text().splitlines()
    text = (profiled.run.path / "profile" / "step-4" / "summary.txt").read_text()
    table = text.split("rank  ")[1].splitlines()
    figures = {rank: list(map(float, line.split()[1:])) for rank, line in enumerate(table[1:3])}
    for step, *parts, under_way in figures.values():
        assert sum(parts) == pytest.approx(step, rel=0.02)
        exposed = parts[PARTS.index(EXCHANGE) - 1]
        assert 0 < exposed <= under_way + 0.01 < step
    timed, named = 1e3 * json.loads(rows[3])["seconds"], sum(figures[0][1:5])
    assert 0.3 * timed < named <= 1.02 * timed  # compute, exchange, data, optimizer
    assert timed <= figures[0][0] + 0.01


@pytest.mark.cluster
def test_every_call_that_the_ledger_counts_is_in_the_page(profiled):
    rows = (profiled.run.path / "metrics.jsonl").read_text().splitlines()
    text = (profiled.run.path / "profile" / "step-4" / "summary.txt").read_text()
    lines = text.split("MB received\n")[1].split("\n\n")[0].splitlines()
    assert sum(int(line.split()[-2]) for line in lines) == json.loads(rows[3])["exchange_calls"]
    verbs = {line[:34].strip() for line in lines}
    assert {"stream", "stream (backward)", "prefix", "prefix (backward)", "weights"} <= verbs


@pytest.mark.cluster
def test_ranges_cost_nothing_measurable_without_a_profile(profiled):
    rows = [json.loads(x) for x in (profiled.run.path / "metrics.jsonl").read_text().splitlines()]
    counted = sum("dur" in e for e in trace_of(profiled, 4, 0) if e["pid"] == "longctx")
    ranges, rounds, best = Ranges(), 2000, float("inf")
    for _ in range(10):
        started = time.perf_counter()
        for _ in range(rounds):
            with ranges(EXCHANGE, GATHER):
                pass
            ranges.departs(GATHER)()
        best = min(best, (time.perf_counter() - started) / rounds)
    fastest = min(row["seconds"] for row in rows)
    assert counted * best < 0.001 * fastest, (counted, best, fastest)
