"""The benches time what is correct and nothing else."""

import ast
import json
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[1] / "kernels" / "bench"
MODULES = [path.stem for path in BENCH.glob("*.py")]


@pytest.fixture
def bench(monkeypatch):
    """The bench's main module; its modules are found by bare names while a test runs."""
    monkeypatch.syspath_prepend(str(BENCH))
    threads = torch.get_num_threads()
    import cpu

    yield cpu
    torch.set_num_threads(threads)
    for name in MODULES:
        sys.modules.pop(name, None)


def test_a_quick_run_reports_every_section(bench, tmp_path, capsys):
    out = tmp_path / "report.md"
    assert bench.main(["--quick", "--plain-malloc", "--out", str(out)]) == 0
    report = out.read_text()
    assert capsys.readouterr().out == report + "\n"
    for title in ("Correctness", "Training step", "Mixers", "Peer"):
        assert f"\n## {title}" in report
    assert "FAIL" not in report


def test_a_wrong_operator_is_not_timed(bench, tmp_path, capsys, monkeypatch):
    right = bench.checks.decay_attention
    monkeypatch.setattr(bench.checks, "decay_attention", lambda q, *a, **k: right(2 * q, *a, **k))
    out = tmp_path / "report.md"
    assert bench.main(["--quick", "--plain-malloc", "--out", str(out)]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("not timed: decay_attention differs")
    assert not captured.out
    assert not out.exists()


def test_every_registered_mixer_is_timed(bench):
    import layers

    from longctx.mixers import MixerConfig

    assert bench.time_mixers is layers.time_mixers
    kinds = {example.config(num_heads=8).kind for example in layers.examples()}
    assert kinds == set(MixerConfig.kinds())


@pytest.mark.usefixtures("bench")
def test_a_missed_target_fails_the_run():
    from report import Section, verdict

    assert Section("", [], [verdict("too slow", is_met=False, is_judged=True)]).is_failed
    assert not Section("", [], [verdict("fast", is_met=True, is_judged=True)]).is_failed
    assert not Section("", [], [verdict("too slow", is_met=False, is_judged=False)]).is_failed


@pytest.mark.usefixtures("bench")
def test_a_plan_that_is_off_fails_the_run():
    from predicted import Found, report

    step = Found(1.0, 0.0)
    text, is_met = report("tiny", [1024, 2048], [(Found(1.19, 0.0), step), (step, step)])
    assert is_met
    assert "| 1,024 | 1.000 | 1.190 | +19% |" in text
    text, is_met = report("tiny", [1024, 2048], [(step, step), (Found(0.75, 0.0), step)])
    assert not is_met
    assert "FAIL: time off by 25% at most" in text


@pytest.fixture
def gpu_bench(monkeypatch):
    """The GPU bench's main module, without a GPU."""
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    import gpu

    yield gpu
    torch.set_num_threads(threads)
    for name in MODULES:
        sys.modules.pop(name, None)


def test_the_gpu_bench_runs_without_a_gpu_and_judges_nothing(
    gpu_bench, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(gpu_bench, "fla_version", lambda: "")
    assert gpu_bench.main(["--tiny", "--out", str(tmp_path)]) == 0
    report = (tmp_path / "cpu.md").read_text()
    assert "\n## Correctness\n" in report
    assert "\n## Lifetime attention\n" in report
    assert "Peer not installed" in report
    assert capsys.readouterr().out.count("no GPU: not judged") == report.count("no GPU: not judged")
    found = json.loads((tmp_path / "cpu.json").read_text())
    ops = {"decay constant", "decay scalar", "decay diagonal", "lifetime", "blocklist"}
    ops |= {"short convolution", "norm gate", "selected rows", "selected blocks"}
    ops |= {"delta none", "delta scalar", "delta diagonal"}
    assert {check["op"] for check in found["checks"]} == ops
    assert {check["precision"] for check in found["checks"]} == {"bf16", "fp16", "fp32"}
    assert all(check["is_green"] for check in found["checks"])
    assert all(row["cost"]["both"]["median"] > 0 for row in found["rows"])
    assert {row["who"] for row in found["rows"]} == {"longctx", "torch SDPA flash", "torch eager"}
    assert found["verdicts"]
    assert all(line.startswith("no GPU: not judged") for line in found["verdicts"])


def test_the_gpu_bench_times_nothing_red(gpu_bench, tmp_path, capsys, monkeypatch):
    makers = sys.modules["gpu_problems"]
    right = makers.decay_attention

    def wrong(*tensors, **options):
        out, final = right(*tensors, **options)
        is_ours = options.get("g") is not None and options["backend"] == "auto"
        return (out * 1.01 if is_ours else out), final

    def decay_problems(device, tiny):
        return [make for make in all_problems(device, tiny) if "_decay" in repr(make)]

    all_problems = gpu_bench.gpu_checks.problems
    monkeypatch.setattr(makers, "decay_attention", wrong)
    monkeypatch.setattr(gpu_bench.gpu_checks, "problems", decay_problems)
    assert gpu_bench.main(["--tiny", "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "cpu.json").read_text())
    notes = {row["item"].split()[0]: row["note"] for row in found["rows"]}
    assert notes["scalar"].startswith("not timed: decay scalar, ")
    assert " off by " in notes["scalar"]
    assert notes["constant"] == notes["diagonal"] == ""
    # Nobody looked at this one at all.
    assert notes["causal"] == "not timed: it was not checked"
    timed = {row["item"].split()[0] for row in found["rows"] if row["cost"]}
    assert timed == {"constant", "diagonal"}
    assert "RED decay scalar" in capsys.readouterr().err


def test_a_result_that_moves_is_red(gpu_bench):
    checks = gpu_bench.gpu_checks
    calls = []

    def call(x, _backend):
        calls.append(1)
        return {"out": x["q"] * (1 + 1e-2 * (len(calls) == 2))}

    inputs = {"q": torch.randn(100).bfloat16()}
    made = checks.check(checks.Problem("op", "name", inputs, call), "bf16")
    assert made.trouble == "out, dq differ between two runs"
    assert not made.is_green
    assert checks.check(checks.Problem("op", "name", inputs, call), "bf16").is_green


def test_a_section_that_breaks_leaves_the_results_of_others(gpu_bench, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of memory")
        yield

    monkeypatch.setattr(gpu_bench.gpu_checks, "run_checks", broken)
    assert gpu_bench.main(["--tiny", "--out", str(tmp_path)]) == 1
    assert "checks broke off: RuntimeError: out of memory" in (tmp_path / "cpu.md").read_text()
    found = json.loads((tmp_path / "cpu.json").read_text())
    assert {row["cost"] for row in found["rows"]} == {None}


def test_shares_of_compilation_cover_everything_once(gpu_bench, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(gpu_bench, "time_item", lambda make, _device: [done.append(make)])
    monkeypatch.setattr(gpu_bench.gpu_checks, "check", lambda made, name: done.append((made, name)))
    makers = [lambda dtype, i=i: (i, dtype) for i in range(5)]
    monkeypatch.setattr(gpu_bench, "problems", lambda _device, _tiny: makers)
    for share in range(3):
        assert gpu_bench.main(["--tiny", "--out", str(tmp_path), "--warm", f"{share}/3"]) == 0
    checks = [x for x in done if isinstance(x, tuple)]
    assert len(checks) == len(set(checks)) == 15
    items = [make for g in gpu_bench.groups(torch.device("cpu"), True) for make in g.makers]
    assert len(done) - len(checks) == len(items)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("gpu_bench")
def test_targets_of_the_gpu_bench_are_judged():
    from gpu_bench import Row, Rows, targets
    from gpu_timing import Cost, Timing

    def row(item, who, milliseconds, error=1e-3):
        timing = Timing(*[milliseconds] * 3)
        return Row(item, who, {"out": error}, Cost(timing, timing, None, None))

    def lines(*rows, start):
        return [t.line(Rows(rows), "") for t in targets() if t.text.startswith(start)]

    first = "constant B2 T16384 H16 D128"
    ours, slow = row(first, "longctx", 1.0), row(first, "fla simple_gla", 2.5)
    wrong = row(first, "fla lightning", 1.5, error=0.3)
    assert [x[:4] for x in lines(ours, slow, wrong, start=first)] == ["PASS"] * 3
    close = row(first, "fla lightning", 1.5, error=9e-4)
    assert [x[:4] for x in lines(ours, slow, close, start=first)] == ["FAIL", "PASS", "FAIL"]
    alone = lines(row(first, "longctx", 1.3), start=first)
    assert [x[:10] for x in alone] == ["not judged", f"FAIL: {first}"[:10], "not judged"]
    causal, window = row("causal T131072", "longctx", 90.0), row("window T131072", "longctx", 10.0)
    assert [x[:4] for x in lines(causal, window, start="window")] == ["PASS"]


def test_the_gpu_bench_refuses_to_judge_a_cpu(gpu_bench, capsys):
    assert gpu_bench.main([]) == 2
    assert "--tiny" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(BENCH.glob("gpu*.py")), ids=lambda path: path.stem)
def test_the_gpu_bench_imports_only_what_a_bare_gpu_machine_has(path):
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    allowed = {"torch", "triton", "numpy", "longctx_kernels", "fla", *MODULES}
    assert imported <= allowed | sys.stdlib_module_names
