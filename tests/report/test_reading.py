"""What is read of run directories, whatever is in them."""

import json
import math
import re
import sys

import numpy as np
import pytest

from longctx.report.page import render
from longctx.report.reading import read_runs
from tests.report.made import make_run, row


@pytest.fixture
def two(tmp_path):
    return [make_run(tmp_path / "a"), make_run(tmp_path / "b", "two", width=96)]


def page_of(*folders) -> str:
    return render(read_runs(map(str, folders)))


def test_a_broken_line_is_left_out_and_told_with_its_number(two):
    lines = (two[0] / "metrics.jsonl").read_text().splitlines()
    lines[9] = lines[9][:20]
    lines[19] = '{"loss": 1.0}'
    lines.append('{"step": 61, "loss": 123.5}')
    (two[0] / "metrics.jsonl").write_text("\n".join(lines))
    run = read_runs([str(two[0])])[0]
    assert run.notes == ["metrics.jsonl: left out 2 broken lines: 10, 20"]
    assert run.last("loss") == 123.5
    assert len(run.series["loss"].x) == 59
    html = page_of(two[0])
    assert "left out 2 broken lines: 10, 20" in html


def test_a_file_reads_the_same_at_once_and_line_by_line(two):
    whole = read_runs([str(two[0])])[0]
    path = two[0] / "metrics.jsonl"
    path.write_text(path.read_text() + "{\n")
    by_line = read_runs([str(two[0])])[0]
    assert whole.notes == []
    assert whole.series.keys() == by_line.series.keys()
    for name, series in whole.series.items():
        assert np.array_equal(series.x, by_line.series[name].x), name
        assert np.array_equal(series.y, by_line.series[name].y), name
    assert whole.lists.keys() == by_line.lists.keys() == {"router/3/load", "val_loss_by_position"}
    for name, (steps, lists) in whole.lists.items():
        assert np.array_equal(steps, by_line.lists[name][0])
        assert lists == by_line.lists[name][1]


def test_without_pyarrow_a_file_reads_the_same(two, monkeypatch):
    whole = read_runs([str(two[0])])[0]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    without = read_runs([str(two[0])])[0]
    assert without.notes == []
    assert without.series.keys() == whole.series.keys()


def test_odd_metrics_do_no_harm(tmp_path):
    folder = make_run(tmp_path / "a")
    odd = {"lr": None, "mfu": "high", "grad_norm": True, "router/3/load": [], "x": {"a": 1}}
    odd |= {"loss": 10**400, "exchange_bytes": -5, "val_loss_by_position": [None], "y": [["a"]]}
    lists = {"val_loss_by_position": [10**400, math.nan, "x", 1.5] + [None] * 2000}
    lists |= {"router/3/load": [math.nan, math.inf, 0.5]}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row(61, **odd)) + "\n")
        file.write('{"step": 62, "loss": NaN, "lr": Infinity, "mfu": 1e308}\n')
        file.write(json.dumps(row(63, **lists)) + "\n")
        file.write(json.dumps(row(1) | {"step": 10**30}) + "\n")
    (folder / "summary.json").write_text(f'{{"val_loss": {10**400}, "tokens": NaN}}')
    html = page_of(folder)
    assert not re.search(r"[\s\",>M](nan|inf)\b", html)
    run = read_runs([str(folder)])[0]
    assert run.notes == ["metrics.jsonl: left out 1 broken lines: 64"]
    assert run.lists["val_loss_by_position"][1][-1][:4] == [None, None, None, 1.5]


def test_a_page_holds_no_secret(tmp_path):
    folder = make_run(tmp_path / "a", name="s3://me:hunter2@store")
    (folder / "config.toml").open("a").write('\n[checkpoint]\ndir = "s3://me:hunter2@bucket"\n')
    (folder / "log.txt").open("a").write("warning: s3://me:hunter2@bucket is full\n")
    (folder / "summary.json").write_text('{"device": "api_key=hunter2", "x_token": "hunter2"}')
    (folder / "environment.json").write_text('{"command": ["--api_key", "hunter2"]}')
    html = page_of(folder, make_run(tmp_path / "b"))
    assert "hunter2" not in html
    assert html.count("s3://[redacted]@bucket") == 3


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = read_runs([str(make_run(tmp_path / name)) for name in ("a", "b")])
    assert [run.name for run in runs] == [f"one ({run.path})" for run in runs]


def test_a_run_that_is_named_twice_is_shown_once(two):
    first, second = map(str, two)
    assert [str(run.path) for run in read_runs([first, second, f"{first}/", f"{second}/../a"])] == [
        first,
        second,
    ]
