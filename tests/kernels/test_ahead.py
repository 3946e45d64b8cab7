"""Kernels compile for GPUs that are not here, within recorded budgets.

`python -m longctx_kernels.ahead` records them, for all launches.
"""

import ast
import json
import random
from pathlib import Path

import pytest
import torch
from longctx_kernels import ahead, tune
from longctx_kernels import launch as launching
from longctx_kernels.specimens import Subject, calls, specimens, subject_of

pytestmark = pytest.mark.alone
ROOT = Path(__file__).parents[2]
KERNELS = sorted((ROOT / "kernels" / "longctx_kernels").glob("*.py"))
WITHOUT_DOT = {
    "decay_scan",
    "gather_rows_kernel",
    "lifetime_delta_kernel",
    "norm_gate_backward",
    "norm_gate_forward",
    "scatter_rows_kernel",
    "short_convolution_backward",
    "short_convolution_forward",
}
SAMPLE = 10
"""Launches that are compiled for each architecture but sm_90."""


def chosen() -> list[tuple[str, int]]:
    """(architecture, index): all at bf16 and D 128 for sm_90, some at D 64 for the others."""
    picked = []
    for architecture in ahead.SHARED_LIMITS:
        size = 128 if architecture == "sm_90" else 64
        fitting = [
            (architecture, index)
            for index, found in enumerate(specimens(architecture))
            if found.dtype == torch.bfloat16 and found.size == size
        ]
        everything = architecture == "sm_90"
        picked += fitting if everything else random.Random(architecture).sample(fitting, SAMPLE)
    return picked


@pytest.fixture(scope="module")
def results() -> list[ahead.Result]:
    return ahead.compile_specimens(chosen(), ahead.PROCESSES)


@pytest.mark.cluster
def test_every_launch_compiles(results):
    assert not [(r.architecture, r.key, r.call, r.error) for r in results if r.compiled is None]


@pytest.mark.cluster
def test_nothing_spills_more_than_recorded(results):
    budget = json.loads((ROOT / ahead.BUDGET).read_text())
    for r in results:
        if r.compiled is not None:
            assert r.compiled.spilled_bytes <= budget[r.architecture][r.key], (r.key, r.call)


@pytest.mark.cluster
def test_a_block_finds_the_shared_memory_it_needs(results):
    for r in results:
        if r.compiled is not None:
            limit = ahead.SHARED_LIMITS[r.architecture]
            assert r.compiled.shared_bytes <= limit, (r.architecture, r.key, r.call)


@pytest.mark.cluster
def test_products_use_the_matrix_units_of_hopper(results):
    for r in results:
        if r.compiled and r.architecture == "sm_90" and r.kernel not in WITHOUT_DOT:
            assert r.compiled.instructions.get("wgmma"), (r.key, r.call)


def test_the_budget_covers_every_launch():
    budget = json.loads((ROOT / ahead.BUDGET).read_text())
    for architecture in ahead.SHARED_LIMITS:
        for found in specimens(architecture):
            dtype = str(found.dtype).partition(".")[2]
            key = f"{found.launch.kernel.__name__} {found.size} {dtype}"
            assert key in budget[architecture]


def test_every_kernel_is_a_specimen():
    """A kernel that nobody launches here would never be compiled before it meets a GPU."""
    jitted = {
        node.name
        for path in KERNELS
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and not node.name.startswith("_")
        and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    }
    launched = {found.launch.kernel.__name__ for found in specimens("sm_90")}
    assert launched
    assert launched <= jitted


def test_every_entry_of_the_tables_is_read_by_a_specimen():
    for family in launching.read_tables().values():
        kernels = family["sm_90"]
        for kernel, by_size in kernels.items():
            for size in by_size:
                assert subject_of("sm_90", kernels, kernel, size).size == int(size)
            assert kernels[kernel] is by_size


def dots_transposed(source: str) -> list[str]:
    """Functions in which `tl.trans` is applied to what a dot made: miscompiled on Hopper."""

    def has_dot(node: ast.AST, names: set[str]) -> bool:
        return any(
            (isinstance(x, ast.Name) and x.id in names)
            or (isinstance(x, ast.Call) and ast.unparse(x.func) in ("tl.dot", "_dot"))
            for x in ast.walk(node)
        )

    found = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        names: set[str] = set()
        assigned = [x for x in ast.walk(function) if isinstance(x, ast.Assign | ast.AugAssign)]
        # A name made from a name made from a dot counts too.
        for _ in range(len(assigned)):
            for node in assigned:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if has_dot(node.value, names):
                    names |= {t.id for t in targets if isinstance(t, ast.Name)}
        for node in ast.walk(function):
            is_trans = isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.trans"
            if is_trans and any(has_dot(x, names) for x in node.args):
                found.append(function.name)
    return found


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_no_product_is_transposed(path):
    assert not dots_transposed(path.read_text())


def test_the_check_for_transposed_products_finds_them():
    assert dots_transposed("def f(a):\n b = tl.dot(a, a)\n c = b * 2\n d = tl.trans(c.to(x))") == [
        "f"
    ]
    assert dots_transposed("def f(a):\n return tl.dot(tl.trans(_dot(a, a)), a)") == ["f"]
    assert not dots_transposed("def f(a):\n return tl.dot(tl.trans(a), a)")


def test_a_report_has_a_row_per_launch():
    options = {"BLOCK_T": 64, "num_warps": 4, "num_stages": 2}
    compiled = ahead.Compiled("k", "sm_90", options, 80, 8, 2048, {"wgmma": 4})
    good = ahead.Result("call", 64, "bfloat16", "k", "sm_90", compiled)
    bad = ahead.Result("call", 128, "bfloat16", "k", "sm_90", None, "Error: too | bad")
    text = ahead.report([good, bad], "command")
    assert "2 launches, 1 of them do not compile, 1 spill" in text
    assert (
        "| k | call | 64 | bfloat16 | BLOCK_T 64, 4 warps, 2 stages | 80 | 8 | 2.0 | 4 wgmma |"
        in text
    )
    assert "Error: too / bad |" in text
    assert ahead.spill_budget([good, bad]) == {"sm_90": {"k 64 bfloat16": 8}}


def test_recording_one_architecture_keeps_the_budgets_of_others(tmp_path, capsys, monkeypatch):
    options = {"BLOCK_T": 64, "num_warps": 4, "num_stages": 2}

    def compiled(chosen, _processes):
        assert {name for name, _ in chosen} == {"sm_90"}
        large = ahead.Compiled("k", "sm_90", options, 80, 8, 228 << 10, {})
        return [ahead.Result("call", 64, "bfloat16", "k", "sm_90", large)]

    monkeypatch.setattr(ahead, "compile_specimens", compiled)
    table, budget = tmp_path / "new" / "table.md", tmp_path / "budget.json"
    budget.write_text('{"sm_80": {"k 64 bfloat16": 1}, "sm_90": {"gone": 1}}')
    arguments = ["--architectures", "sm_90", "--out", str(table), "--budget", str(budget)]
    assert ahead.main(arguments) == 1
    assert "sm_90 k 64 bfloat16 (call): too much shared memory" in capsys.readouterr().err
    assert "| k | call | 64 |" in table.read_text()
    assert json.loads(budget.read_text()) == {
        "sm_80": {"k 64 bfloat16": 1},
        "sm_90": {"k 64 bfloat16": 8},
    }


def test_tuning_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert capsys.readouterr().err == "tune needs a CUDA GPU: it times kernels\n"


def test_tuning_leaves_the_fastest_legal_options(tmp_path, monkeypatch):
    """With a stopwatch that likes 8 warps and small tiles, of which the smallest spill."""
    table = {"64": {"BLOCK_T": 64, "num_warps": 4, "num_stages": 2}}

    def milliseconds(_subject):
        return table["64"]["BLOCK_T"] + 10 / table["64"]["num_warps"]

    def spilled(*_):
        return 0 if table["64"]["BLOCK_T"] > 16 else 8

    monkeypatch.setattr(tune, "milliseconds", milliseconds)
    monkeypatch.setattr(tune, "spilled_bytes", spilled)
    subject = Subject(next(calls()), 64, torch.bfloat16)
    tune.tune_entry("sm_90", "decay_states", table, subject, quick=False)
    assert table["64"] == {"BLOCK_T": 32, "num_warps": 8, "num_stages": 2}
    tune.write_table(tmp_path / "t.json", table)
    assert json.loads((tmp_path / "t.json").read_text()) == table
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]


def test_what_cannot_be_compiled_is_no_candidate():
    kernels = launching.read_tables()["decay"]["sm_90"]
    table = kernels["decay_states"]
    shipped = dict(table["64"])
    subject = subject_of("sm_90", kernels, "decay_states", "64")
    assert tune.spilled_bytes("sm_90", "decay_states", subject) < float("inf")
    try:
        table["64"] = shipped | {"BLOCK_T": 48}
        assert tune.spilled_bytes("sm_90", "decay_states", subject) == float("inf")
    finally:
        table["64"] = shipped


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_constants_are_computed_with_plain_operators(path):
    """Triton 3.6 cannot multiply a constant by what `tl.cdiv` makes of constants."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "tl.constexpr":
            assert "tl.cdiv" not in ast.unparse(node.value), f"{path.name}:{node.lineno}"
