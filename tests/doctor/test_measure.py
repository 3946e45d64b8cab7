"""Rates that make the cost model give back what was measured, and the file that holds them."""

import json
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from longctx import host
from longctx.cli import main
from longctx.config import to_toml
from longctx.doctor import command, measure, storage
from longctx.doctor.cluster_file import cluster_of, merged
from longctx.doctor.crew import (
    Crew,
    Facts,
    _by_host,
    agreement,
    clocks,
    pairs_of,
    stragglers,
    tiers_of,
)
from longctx.doctor.findings import Finding
from longctx.doctor.measure import Machine, bench_of, provisional, solved, with_rates, work_of
from longctx.errors import OutsideError
from longctx.parallel import links
from longctx.parallel.links import LinkTime
from longctx.plan.clusters import KERNELS, load_cluster
from longctx.plan.kernel_time import Compute
from longctx.train.settings import load_settings

CPU = torch.device("cpu")
PEAKS = {"fp32": 1e11}
MACHINE = Machine(
    PEAKS,
    4e10,
    0.01,
    {name: {"256": 1e10, "1024": 2e10} for name in KERNELS},
    {},
)


@pytest.fixture
def bench():
    return bench_of(CPU, load_settings("tiny"), own=True)


@pytest.mark.parametrize("letter", ["-", "S", "L", "D", "B"])
def test_with_the_rate_that_is_found_a_layer_takes_as_long_as_was_measured(bench, letter):
    seconds, kernels = 0.5, {own: name for name, own in bench.letters.items()}.get(letter, "matmul")
    work = work_of(bench.model, 256, "fp32")
    cluster = with_rates(provisional("cpu", "fp32", PEAKS, 4e10), {"matmul": {"256": 5e10}})
    rate = solved(Compute(work, cluster, 0), kernels, letter, seconds)
    layer = Compute(work, with_rates(cluster, {kernels: {"256": rate}}), 0).layers[letter]
    assert layer.forward + layer.backward == pytest.approx(seconds)


def test_layers_of_the_config_are_timed_where_it_has_one_of_a_class(bench):
    kinds = {name: bench.kind(name) for name in bench.letters}
    assert kinds == {"softmax": "moh", "linear": "linear", "delta": "gdn", "sparse": "moba"}
    assert bench.model.width == 128
    ordinary = bench_of(CPU, load_settings("tiny"), own=False)
    assert ordinary.kind("softmax") == "softmax"
    assert ordinary.model.width == 512


def test_a_layer_that_needs_longer_sequences_is_left_to_an_ordinary_one():
    settings = load_settings("340m-softmax")
    softmax = replace(settings.model.mixers["S"], window=8192)
    model = replace(settings.model, mixers={"S": softmax})
    own = bench_of(CPU, replace(settings, model=model), own=True)
    assert own.model.mixers["S"].window == 0


@pytest.fixture
def quick(monkeypatch):
    """Measures next to nothing."""
    monkeypatch.setattr(measure, "TOKENS", {"cpu": (64, 128)})
    monkeypatch.setattr(measure, "ITEM_SECONDS", {"cpu": 0.0})
    monkeypatch.setattr(measure, "LEAST_CALLS", 1)
    monkeypatch.setattr(measure, "COPIED", {"cpu": 2**16})
    monkeypatch.setattr(measure, "peak_flops", lambda device, dtype: (1e11, "made up"))
    monkeypatch.setattr(storage, "WRITTEN", 2**20)


@pytest.mark.usefixtures("quick")
def test_what_is_measured_is_written_and_loads(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "tiny", "--measure", "--json", "--output", "here.toml"]) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    assert found[-1]["group"] == "measured"
    cluster = load_cluster("here.toml")
    assert cluster.processes_per_node == 1
    assert set(cluster.rates) == set(KERNELS)
    assert cluster.rates["delta"].tokens == (64, 128)
    assert [path.name for path in tmp_path.iterdir()] == ["here.toml"]


@pytest.mark.usefixtures("quick")
def test_a_report_leaves_nothing_behind(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor"]) == 0
    assert "\nstorage\n" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_a_problem_is_exit_code_1(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = {"x": [lambda: [Finding("problem", "a", "b")]]}
    monkeypatch.setattr(command, "local_checks", lambda settings, name: bad)
    assert main(["doctor"]) == 1
    assert "  problem  a: b" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--outptu", "x"], "nearest: --output"),
        (["nowhere.toml"], "no such file or preset"),
        (["--timeout_seconds", "0"], "must be at least 1"),
        (["--measure", "--output", "no/such/file.toml"], "folder is not there"),
        (["--measure", "--output", ""], "is a folder"),
        (["--measure", "--output", "/"], "is a folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, words, capsys):
    assert main(["doctor", *argv]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.usefixtures("quick")
def test_a_file_that_cannot_be_written_is_a_problem(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure.Bench, "measure", lambda self: MACHINE)
    (tmp_path / ".partial-here.toml").mkdir()
    assert main(["doctor", "--measure", "--output", "here.toml"]) == 1
    assert "here.toml: cannot be written (Is a directory)" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_measuring_that_fails_is_a_problem_beside_what_was_found(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    broken = mock.Mock(side_effect=RuntimeError("no\nkernel"))
    monkeypatch.setattr(measure.Bench, "_pass", broken)
    assert main(["doctor", "--measure", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["findings"]
    assert (found[-1]["found"], found[-1]["meaning"]) == ("measuring", "failed: no kernel")
    assert len(found) > 10


@pytest.mark.usefixtures("quick")
def test_lengths_that_take_too_much_memory_are_left_out(bench, monkeypatch):
    passes = measure.Bench._pass

    def small_device(self, block, tokens):
        if tokens > 64:
            raise torch.OutOfMemoryError("full")
        return passes(self, block, tokens)

    monkeypatch.setattr(measure.Bench, "_pass", small_device)
    assert {tuple(own) for own in bench.measure().rates.values()} == {("64",)}


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.usefixtures("quick")
def test_layers_are_timed_in_the_precision_of_the_config(monkeypatch, precision):
    settings = load_settings("tiny")
    train = replace(settings.train, precision=precision)
    seen = set()
    passes = measure.Bench._pass

    def watched(self, block, tokens):
        seen.update(weight.dtype for weight in block.parameters())
        return passes(self, block, tokens)

    monkeypatch.setattr(measure.Bench, "_pass", watched)
    bench_of(CPU, replace(settings, train=train), own=True).measure()
    assert seen == {{"fp64": torch.float64, "fp32": torch.float32}[precision]}


def test_processes_meet_before_hosts_are_checked_and_a_report_comes_if_they_do_not(
    monkeypatch, capsys
):
    order = []

    def nobody(*_):
        order.append("met")
        raise OutsideError("nobody came")

    def check():
        order.append("checked")
        return [FINDING]

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(command, "Peers", nobody)
    monkeypatch.setattr(command, "local_checks", lambda settings, name: {"versions": [check]})
    assert command.run(["--json"]) == 1
    assert order == ["met", "checked"]
    first, last = json.loads(capsys.readouterr().out)["findings"]
    assert first == FINDING._asdict()
    assert last["meaning"] == "failed: nobody came"


def test_memory_is_what_the_control_group_allows(bench, monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    monkeypatch.setattr(host, "GROUP", tmp_path)
    cluster = cluster_of(MACHINE, None, bench)
    assert (cluster.memory_gib, cluster.host_memory_gib) == (1.0, 1.0)


def test_a_gpu_that_only_the_driver_counts_is_not_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.device_here() == CPU


def test_all_gathers_that_no_device_could_hold_are_left_out():
    peers = SimpleNamespace(device=torch.device("cuda"), size=1024)
    assert links.Peers._sizes(peers) == [2**20]
    peers.size = 8
    assert links.Peers._sizes(peers) == list(links.GATHERED["cuda"])


def test_several_processes_become_a_cluster_with_links(bench, tmp_path):
    other = replace(MACHINE, fixed_seconds=0.03, rates={n: {"256": 3e10} for n in KERNELS})
    tiers = {"node": LinkTime(1e-4, 4e9), "fabric": LinkTime(5e-4, 1e9)}
    crew = Crew([], ["a", "a", "b", "b"], tiers)
    cluster = cluster_of(merged([MACHINE, other]), crew, bench)
    file = tmp_path / "cluster.toml"
    file.write_text(to_toml(cluster))
    loaded = load_cluster(str(file))
    assert loaded == cluster
    assert (loaded.processes_per_node, loaded.most_nodes) == (2, 2)
    assert loaded.fixed_seconds == pytest.approx(0.02)
    assert loaded.rates["softmax"].tokens == (256,)
    assert loaded.rates["softmax"].flops == (pytest.approx(2e10),)
    assert loaded.links["fabric"].bandwidth == 1e9


FINDING = Finding("ok", "x", "y", "versions")


def facts(host="a", version="2.13", findings=(FINDING,)):
    return Facts(host, {"torch": version}, "cpu", list(findings))


def test_other_versions_on_a_rank_are_a_problem():
    assert [f.level for f in agreement([facts(), facts()])] == ["ok"]
    (found,) = agreement([facts(), facts("b", "2.12")])
    assert found.level == "problem"
    assert "2.13 on rank 0, 2.12 on rank 1" in found.meaning


def test_the_rank_that_computes_most_slowly_is_named():
    assert stragglers([1e9] * 3, "aab")[0].level == "ok"
    (found,) = stragglers([1e9, 1e9, 5e8], "aab")
    assert found.level == "warning"
    assert "rank 2 at 50%" in found.found
    assert found.meaning.endswith("on b")


def test_what_only_some_hosts_have_names_them():
    only = Finding("problem", "disk", "full", "storage")
    found = _by_host([facts(), facts("b", findings=(FINDING, only)), facts("b", findings=())])
    assert found == [FINDING, only._replace(found="b: disk")]


def test_pairs_and_tiers():
    assert len(pairs_of(["a"] * 4)) == 6
    many = pairs_of([host for host in "abcd" for _ in range(8)])
    assert {(0, 8), (8, 16), (7, 8), (0, 31)} <= set(many)
    assert len(many) < 40
    hosts = [str(rank // 8) for rank in range(4096)]
    near = [hosts[a] == hosts[b] for a, b in pairs_of(hosts)]
    assert 64 < sum(near) <= 128
    assert 64 < len(near) - sum(near) <= 128
    in_turn = ["a", "b"] * 8
    assert len({in_turn[i] for i, j in pairs_of(in_turn) if in_turn[i] == in_turn[j]}) == 2
    measured = {
        (0, 1): LinkTime(1e-5, 4e9),
        (2, 3): LinkTime(3e-5, 1e9),
        (4, 5): LinkTime(1e-5, 4e9),
        (1, 2): LinkTime(1e-4, 1e9),
    }
    tiers, found = tiers_of(measured, ["a", "a", "b", "b", "c", "c"])
    assert tiers == {"node": LinkTime(1e-5, 4e9), "fabric": LinkTime(1e-4, 1e9)}
    assert [f.level for f in found] == ["warning", "ok"]
    assert "slowest ranks 2 and 3" in found[0].meaning


def test_a_clock_that_is_off_is_told():
    assert clocks([0.0, 0.1], ["a", "b"])[0].level == "ok"
    (found,) = clocks([0.0, -3.0], ["a", "b"])
    assert found.level == "warning"
    assert "b is -3.0 s off" in found.found
