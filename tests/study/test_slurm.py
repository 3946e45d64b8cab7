"""What `longctx study --submit` gives to SLURM, whose commands are stubs here."""

import json
import os
from pathlib import Path

import pytest

from longctx.cli import main
from longctx.study import slurm as study_slurm
from longctx.study.results import read_results

AXES = """
[train]
seq_len = 32
[study.slurm]
gpus_per_node = 4
nodes = 2
time = "1:00:00"
partition = "a b"
[study.grid]
parallel.sp = [1, 8]
run.seed = [0, 1]
"""
STUBS = {
    "sbatch": 'n=$((100 + $(ls scripts | wc -l))); cat > "scripts/$n"; echo "$n"',
    "squeue": "cat queue",
}


@pytest.fixture
def out(tmp_path, monkeypatch):
    """The folder of the study, where commands of SLURM only write down what they are given."""
    for folder in ("bin", "scripts"):
        (tmp_path / folder).mkdir()
    for name, body in STUBS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "queue").touch()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study_slurm, "write_report", lambda results, folder: None)
    return tmp_path / "out"


def submit(file: str, capsys, *options: str) -> list[str]:
    """The lines that it prints."""
    assert main(["study", file, "--submit", *options]) == 0
    return capsys.readouterr().out.splitlines()


def finish(cell: Path) -> None:
    figures = {"step": 4, "val_loss": 1.0, "val_accuracy": 0.5}
    (cell / "summary.json").write_text(json.dumps(figures))


def test_cells_of_each_number_of_processes_are_an_array_in_the_shape_they_need(write, out, capsys):
    file = write(AXES.replace("nodes = 2", "nodes = 2\narray = 5"))
    said = submit(file, capsys)
    assert said == [
        "4 cells, 0 of them finished before, 0 in the queue",
        "job 100: 2 cells of 1 processes",
        "job 101: 2 cells of 8 processes",
        "job 102: gathers the results",
    ]
    small, large, gathers = (Path("scripts", str(100 + n)).read_text() for n in range(3))
    for line in ("--nodes=1", "--gpus-per-node=1", "--array=0-1%5", "--job-name=study"):
        assert f"\n#SBATCH {line}\n" in small
    for line in ("--nodes=2", "--gpus-per-node=4", "--time=1:00:00", "--partition='a b'"):
        assert f"\n#SBATCH {line}\n" in large
    assert f"\n#SBATCH --output={out}/slurm-%A_%a.out\n" in small
    assert "\nprocesses_per_node=1\n" in small
    assert "processes_per_node=4\n" in large
    cells = [f"{out}/sp8-seed{seed}" for seed in range(2)]
    assert f"\nconfigs=({cells[0]}/config.toml {cells[1]}/config.toml)\n" in large
    assert f"\nfailures=({cells[0]}/failures.txt {cells[1]}/failures.txt)\n" in large
    assert "\n#SBATCH --dependency=afterany:100:101\n" in gathers
    assert gathers.endswith(f" -m longctx study {file} --collect\n")
    assert (out / "sp1-seed0" / "config.toml").is_file()


def test_a_dry_run_prints_the_scripts_and_writes_nothing(write, out, capsys):
    file = write(AXES)
    shown = submit(file, capsys, "--dry-run")
    assert not out.exists()
    submit(file, capsys)
    scripts = [Path("scripts", name).read_text() for name in ("100", "101")]
    assert "\n".join(shown) + "\n" == "\n".join(scripts)


def test_a_dry_run_of_anything_else_is_refused(write, capsys):
    assert main(["study", write(AXES), "--dry-run"]) == 2
    assert "--dry-run goes with --submit" in capsys.readouterr().err


def test_what_is_finished_failed_for_good_or_in_the_queue_is_not_submitted(write, out, capsys):
    file = write(AXES)
    submit(file, capsys)
    finish(out / "sp1-seed0")
    Path("queue").write_text("101_1\n7_N/A\n")
    (out / "sp8-seed0" / "failures.txt").write_text("exit code 1: a\nexit code 1: b\n")
    said = submit(file, capsys)
    assert said[0].startswith("4 cells, 1 of them finished before, 1 failed 2 times")
    assert said[0].endswith(", 1 in the queue")
    assert said[1] == "job 103: 1 cells of 1 processes"
    assert json.loads((out / "jobs.json").read_text())["103"] == ["sp1-seed1"]
    statuses = {row.name: row.status for row in read_results(out).rows}
    assert statuses == {
        "sp1-seed0": "done",
        "sp1-seed1": "running",
        "sp8-seed0": "failed",
        "sp8-seed1": "running",
    }
    Path("queue").write_text("101_1\n103_0\n")
    assert len(submit(file, capsys)) == 1
    assert submit(file, capsys, "--study.retry_failed", "true")[1].endswith(
        "1 cells of 8 processes"
    )


def test_results_are_gathered_and_tell_what_failed(write, out, capsys):
    file = write(AXES)
    submit(file, capsys)
    finish(out / "sp1-seed0")
    Path("queue").write_text("101_1\n")
    (out / "sp8-seed0" / "failures.txt").write_text("exit code 1: a\nexit code 1: b\n")
    assert main(["study", file, "--collect"]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("4 cells: 1 done, 1 not run, 1 failed, 1 running; results in")
    assert captured.err == "longctx: cells that failed: sp8-seed0\n"
    assert read_results(out).rows[2].error == "exit code 1: b"


def test_nothing_is_trained_here_while_cells_are_in_the_queue(write, out, capsys):
    file = write(AXES)
    submit(file, capsys)
    Path("queue").write_text("101_1\n")
    assert main(["study", file]) == 2
    assert "1 cells are in SLURM's queue" in capsys.readouterr().err
    assert not (out / "sp8-seed1" / "console.txt").exists()


MISTAKES = {
    "nodes": ("nodes = 1\n", "cell sp8-seed0 needs 8 processes"),
    "a part of a node": ("nodes = 9\nprocesses_per_node = 3\n", "cell sp8-seed0 needs 8 processes"),
}


@pytest.mark.parametrize(("lines", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_cells_that_do_not_fit_the_nodes_are_told_before_anything_is_submitted(
    write, out, capsys, lines, words
):
    assert main(["study", write(AXES.replace("nodes = 2\n", lines)), "--submit"]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert not list(Path("scripts").iterdir())
    assert not (out / "sp1-seed0").exists()


def test_signs_of_a_pattern_in_the_name_of_the_folder_stay_as_they_are(write, out, capsys):
    submit(write(AXES), capsys, "--study.dir", f"{out}%j")
    for script in Path("scripts").iterdir():
        assert f"\n#SBATCH --output={out}%%j/slurm-%" in script.read_text()


def test_both_modes_at_once_are_refused(capsys):
    assert main(["study", "mqar", "--submit", "--collect"]) == 2
    assert "choose one of --submit and --collect" in capsys.readouterr().err


def test_where_squeue_is_not_jobs_are_taken_as_ended(write, out, capsys, monkeypatch):
    file = write(AXES)
    submit(file, capsys)
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["study", file, "--collect"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith(f"warning: {out}/jobs.json names jobs of SLURM")
    assert captured.out.startswith("4 cells: 4 not run")


@pytest.mark.parametrize("text", ["", "[1]", '{"7": 3}', "3"])
def test_a_damaged_list_of_jobs_is_one_line(text, write, out, capsys):
    out.mkdir()
    (out / "jobs.json").write_text(text)
    assert main(["study", write(AXES), "--submit"]) == 1
    assert capsys.readouterr().err.startswith(f"longctx: {out}/jobs.json: cannot read: ")


def test_a_refusal_of_squeue_or_sbatch_is_one_line(write, out, capsys):
    file = write(AXES)
    (out.parent / "bin" / "sbatch").write_text("#!/bin/bash\necho no account >&2\nexit 1\n")
    assert main(["study", file, "--submit"]) == 1
    assert capsys.readouterr().err == "longctx: no account\n"
    out.mkdir(exist_ok=True)
    (out / "jobs.json").write_text('{"7": ["sp1-seed0"]}')
    (out.parent / "bin" / "squeue").write_text("#!/bin/bash\necho down >&2\nexit 1\n")
    assert main(["study", file, "--submit"]) == 1
    assert capsys.readouterr().err == "longctx: down\n"
