"""The CPU bench times what is correct and nothing else."""

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
