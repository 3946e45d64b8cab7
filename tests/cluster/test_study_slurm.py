"""A study as an array of jobs on a real SLURM cluster: cancelled half way, and submitted again."""

import csv
import json
import os
from pathlib import Path

import pytest

from longctx.cli import main
from longctx.study.slurm import cells_in_queue
from tests.cluster.slurm import Slurm, missing, wait_for

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

ROOT = Path(__file__).parents[2]
STUDY = """
[data]
task = "mqar"
pairs = 2
answers = 2
vocabulary = 12
[model]
width = 16
depth = 1
pattern = "M"
[model.mixers.M]
kind = "softmax"
num_heads = 1
[train]
steps = 4
seq_len = 16
[eval]
every = 0
sequences = 4
[checkpoint]
every = 20

[study]
name = "it's $(touch x)"
[study.slurm]
gpus_per_node = 2
cpus_per_node = 1
time = "10"
array = 3
[study.variants.cell-of.short]
[study.variants.cell-of.fails.data]
task = ""
path = "later/*.txt"
[study.variants.cell-of.long.train]
steps = 1500
[study.variants.cell-of.last.run]
seed = 1
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, Slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        patch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
        patch.setenv("PYTHONPATH", str(ROOT))
        yield cluster


def submit(capsys) -> list[str]:
    """The numbers of the jobs, the last of which gathers results."""
    assert main(["study", "my study.toml", "--submit"]) == 0
    lines = capsys.readouterr().out.splitlines()
    return [line.split()[1].strip(":") for line in lines if line.startswith("job ")]


def steps(cell: Path) -> int:
    file = cell / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def statuses(out: Path) -> dict[str, str]:
    with (out / "study.csv").open(newline="") as table:
        return {row["cell"]: row["status"] for row in csv.DictReader(table)}


def contents(cell: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in cell.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_study_that_is_cancelled_half_way_repeats_no_finished_cell(
    slurm, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("my study.toml").write_text(STUDY)
    out = Path("runs/it's $(touch x)")
    array, gathers = submit(capsys)
    assert slurm.job(gathers)["Dependency"].startswith(f"afterany:{array}_*")
    assert cells_in_queue(out) == {"short", "fails", "long", "last"}
    failures = out / "fails" / "failures.txt"
    wait_for(lambda: (out / "short" / "summary.json").exists(), 120)
    wait_for(lambda: failures.exists() and steps(out / "long") >= 30, 120)
    assert submit(capsys) == []
    assert main(["study", "my study.toml", "--collect"]) == 0
    assert statuses(out)["short"] == "done"
    assert statuses(out)["fails"] == statuses(out)["long"] == "running"
    assert main(["study", "my study.toml"]) == 2
    assert "cells are in SLURM's queue" in capsys.readouterr().err
    slurm("scancel", array)
    wait_for(lambda: not cells_in_queue(out), 60)
    assert 30 <= steps(out / "long") < 1500
    wait_for(lambda: slurm.state(gathers) == "COMPLETED", 60)
    assert statuses(out)["long"] == "interrupted"
    assert "longctx: data.path = 'later/*.txt'" in failures.read_text()
    assert failures.read_text().count("\n") == 1

    done = [name for name, status in statuses(out).items() if status == "done"]
    before = {name: contents(out / name) for name in done}
    Path("later").mkdir()
    Path("later/text.txt").write_text("two times three is six; " * 200)
    again, gathers = submit(capsys)
    submitted = json.loads((out / "jobs.json").read_text())[again]
    assert submitted == [name for name in statuses(out) if name not in done]
    wait_for(lambda: slurm.state(gathers) == "COMPLETED", 180)
    assert set(statuses(out).values()) == {"done"}
    assert {name: contents(out / name) for name in done} == before
    assert "resumed at step" in (out / "long" / "log.txt").read_text()
    assert steps(out / "long") == 1500
    assert (out / "study.html").exists()
    assert "x" not in os.listdir()
