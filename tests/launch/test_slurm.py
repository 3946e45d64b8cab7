"""What `longctx launch slurm` submits, and what its script does with values that look like code."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longctx.cli import main
from longctx.launch.slurm import SlurmConfig, fill_in

HOSTILE = 'it\'s $(touch x); `touch x` "q" a\\b #*'
SHAPE = ["--nodes", "2", "--gpus-per-node", "1"]
STUBS = {
    "sbatch": 'n=$(ls jobs | wc -l); printf "%s\\n" "$@" > "jobs/$n"; cat > "scripts/$n"; echo $n',
    "srun": 'printf "%s\\0" "$@" > srun',
    "python": 'printf "%s\\0" "$@" >> python',
    "squeue": "echo RUNNING",
    "scontrol": 'printf "%s\\n" "$@" > scontrol',
}


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder in which commands of SLURM, and python, only write down what they are given."""
    for folder in ("bin", "jobs", "scripts"):
        (tmp_path / folder).mkdir()
    for name, body in STUBS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def launch(*words: str) -> int:
    return main(["launch", "slurm", *words])


def config_file(folder: Path, name: str, run: str) -> str:
    (folder / name).write_text(f'[run]\nname = """{run}"""\n' + TINY)
    return name


TINY = '[model]\nwidth = 32\npattern = "L"\n[model.mixers.L]\nkind = "linear"\n'


def run_script(
    cluster: Path, script: str, output: Any = subprocess.PIPE, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs a script as SLURM would, where each command is a stub."""
    inside = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "4"}
    script = script.replace(f"\nbin={Path(sys.executable).parent}\n", "\nbin=bin\n")
    return subprocess.run(
        ["bash"],
        input=script.replace("sleep 2", "sleep 0.1"),
        cwd=cluster,
        env=os.environ | inside | variables,
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
    )


def words(file: Path) -> list[str]:
    return file.read_text().split("\0")[:-1]


def test_a_chain_is_one_job_after_the_other(cluster, capsys):
    names = [config_file(cluster, f"{i}.toml", f"stage {i}") for i in range(3)]
    assert launch(*names, *SHAPE, "--partition", "a", "--", "--train.batch_size", "8") == 0
    assert capsys.readouterr().out == "job 0\njob 1, after job 0\njob 2, after job 1\n"
    assert (cluster / "jobs" / "0").read_text() == "--parsable\n"
    options = (cluster / "jobs" / "2").read_text().split()
    assert options == ["--parsable", "--dependency=afterok:1", "--kill-on-invalid-dep=yes"]
    script = (cluster / "scripts" / "1").read_text()
    for line in ("configs=(1.toml)", "#SBATCH --partition=a", "#SBATCH --job-name='stage 1'"):
        assert f"\n{line}\n" in script
    assert "\noptions=(--train.batch_size 8)\n" in script


def test_an_array_is_one_job_of_several_configs(cluster):
    names = [config_file(cluster, f"{i}.toml", f"run{i}") for i in range(3)]
    assert launch(*names, *SHAPE, "--array", "2") == 0
    script = (cluster / "scripts" / "0").read_text()
    assert "\n#SBATCH --array=0-2%2\n" in script
    run_script(cluster, script, SLURM_ARRAY_TASK_ID="2")
    assert "2.toml" in words(cluster / "srun")
    assert not {"0.toml", "1.toml"} & set(words(cluster / "srun"))


def test_a_dry_run_prints_a_script_and_submits_nothing(cluster, capsys):
    assert launch("tiny", *SHAPE, "--dry-run", "--time=1:00:00", "--sbatch", "nice=5", "hold") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("#!")
    for line in ("--nodes=2", "--gpus-per-node=1", "--time=1:00:00", "--nice=5", "--hold"):
        assert printed.count(f"#SBATCH {line}\n") == 1, line
    assert not list((cluster / "jobs").iterdir())
    assert subprocess.run(["bash", "-n"], input=printed, text=True).returncode == 0


def test_no_value_reaches_a_shell(cluster):
    name = config_file(cluster, f"{HOSTILE}.toml", "run")
    secrets = cluster / f"{HOSTILE} secrets"
    secrets.write_text(f"# keys\nSECRET={HOSTILE}\na[$(touch x)]=1\n$(touch x)\n")
    own = ("--job-name", HOSTILE.replace("/", ""), "--env-file", str(secrets))
    given = ("--sbatch", f"comment={HOSTILE}", "--", "--run.dir", HOSTILE, "--data.path", HOSTILE)
    assert launch(name, *SHAPE, *own, *given) == 0
    script = (cluster / "scripts" / "0").read_text()
    done = run_script(cluster, script)
    assert done.returncode == 0, done.stderr
    step, check = words(cluster / "srun"), words(cluster / "python")
    train = [name, "--run.dir", HOSTILE, "--data.path", HOSTILE]
    assert step[-len(train) :] == train
    assert check[: len(train) + 4] == ["-m", "longctx", "check", name, "2", *train[1:]]
    # What srun is given runs on every node, and there too.
    node = {"SLURM_NODEID": "1", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}
    (cluster / "python").unlink()
    command = step[step.index("bash") :]
    subprocess.run(command, cwd=cluster, env=os.environ | node, check=True)
    agent = words(cluster / "python")
    assert agent[-len(train) :] == train
    assert {"--rdzv-endpoint=10.0.0.1:20007", "--rdzv-conf=is_host=0"} <= set(agent)
    assert not (cluster / "x").exists()


def test_secrets_reach_the_trainers_and_no_command_line(cluster):
    (cluster / "secrets").write_text("WANDB_API_KEY=abc$(touch x)'")
    (cluster / "bin" / "srun").write_text("#!/bin/bash\nprintenv WANDB_API_KEY > key\n")
    assert launch("tiny", *SHAPE, "--env-file", "secrets") == 0
    script = (cluster / "scripts" / "0").read_text()
    done = run_script(cluster, script)
    assert (cluster / "key").read_text() == "abc$(touch x)'\n"
    assert "abc" not in script + done.stdout + done.stderr
    assert not (cluster / "x").exists()


STOPS = {
    "stopped": ('echo step-3 > "$LONGCTX_STOPPED_FILE"', "RUNNING", True),
    "finished": ("true", "RUNNING", False),
    "cancelled": ('echo step-3 > "$LONGCTX_STOPPED_FILE"', "COMPLETING", False),
}


@pytest.mark.parametrize(("step", "state", "again"), STOPS.values(), ids=STOPS.keys())
def test_only_a_job_that_was_told_to_stop_is_queued_again(cluster, step, state, again):
    (cluster / "bin" / "srun").write_text(f"#!/bin/bash\n{step}\n")
    (cluster / "bin" / "squeue").write_text(f"#!/bin/bash\necho {state}\n")
    script = fill_in(SlurmConfig(nodes=2), ["tiny"], [], "job")
    assert run_script(cluster, script).returncode == 0
    assert (cluster / "scontrol").exists() == again
    assert not list(cluster.glob(".longctx-stopped*"))


def test_a_failed_step_fails_the_job(cluster):
    (cluster / "bin" / "srun").write_text("#!/bin/bash\nexit 3\n")
    assert run_script(cluster, fill_in(SlurmConfig(), ["tiny"], [], "job")).returncode == 3


SAYS = "echo 'longctx: no disk'; echo 'longctx: rank 0 on a ended; what it said is above'; exit 3"
FAILURES = {
    "first": (SAYS, "RUNNING", "", ["exit code 3: longctx: no disk"], True),
    "second": (SAYS, "RUNNING", "before\n", ["before", "exit code 3: longctx: no disk"], False),
    "said nothing of longctx": (
        "echo killed; exit 9",
        "RUNNING",
        "",
        ["exit code 9: killed"],
        True,
    ),
    "cancelled": (SAYS, "COMPLETING", "", [], False),
    "finished": ("exit 0", "RUNNING", "", [], False),
    "stopped": ('echo 3 > "$LONGCTX_STOPPED_FILE"', "RUNNING", "", [], True),
}


@pytest.mark.parametrize(
    ("step", "state", "before", "lines", "again"), FAILURES.values(), ids=FAILURES.keys()
)
def test_a_cell_of_a_study_that_failed_is_written_down_and_queued_once_more(
    cluster, step, state, before, lines, again
):
    (cluster / "bin" / "srun").write_text(f"#!/bin/bash\n{step}\n")
    (cluster / "bin" / "squeue").write_text(f"#!/bin/bash\necho {state}\n")
    (cluster / HOSTILE).write_text(before)
    config = SlurmConfig(array=2)
    script = fill_in(config, ["tiny", "tiny"], [], "job", ["no", HOSTILE])
    with (cluster / "said.txt").open("wb") as said:
        run_script(cluster, script, said, SLURM_ARRAY_TASK_ID="1")
    written = (cluster / HOSTILE).read_text().splitlines()
    assert [line.partition("; all it said: ")[0] for line in written] == lines
    assert not lines or written[-1].endswith(f"; all it said: {cluster}/said.txt")
    assert (cluster / "scontrol").exists() == again
    assert not (cluster / "no").exists()
    assert not (cluster / "x").exists()


MISTAKES = {
    "mesh": (["tiny", *SHAPE, "--", "--parallel.sp", "3"], "2 x 1 = 2 processes: parallel.sp = 3"),
    "newline": (["tiny", *SHAPE, "--", "--run.dir", "a\nb"], "'a\\nb' holds a line break"),
    "newline in a name": (["tiny", *SHAPE, "--job-name", "a\nb"], "#SBATCH --job-name"),
    "no config": (["--nodes", "2"], "needs a config file or preset"),
    "unknown option": (["tiny", "--node", "2"], "nearest: --nodes"),
    "nothing to run on": (["tiny", "--gpus-per-node", "0"], "--processes_per_node"),
    "no such file": (["tiny", "--env-file", "nowhere"], "--env_file = 'nowhere'"),
    "option of its own": (["tiny", *SHAPE, "--sbatch", "time=3"], "--sbatch time"),
    "no option": (["tiny", "--sbatch", "--x"], "--x"),
    "one folder for two": (["tiny", "tiny", *SHAPE], "two of these configs train into runs/tiny"),
    "misspelt training option": (["tiny", "--", "--train.stepz", "1"], "nearest: --train.steps"),
}


@pytest.mark.parametrize(("argv", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_and_nothing_is_submitted(cluster, capsys, argv, words):
    assert launch(*argv) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not list((cluster / "jobs").iterdir())


def test_without_sbatch_one_line_says_so(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert launch("tiny", *SHAPE) == 1
    assert capsys.readouterr().err.startswith("longctx: sbatch is not here")


def test_a_refusal_of_sbatch_is_told_with_what_was_submitted(cluster, capsys):
    names = [config_file(cluster, f"{i}.toml", f"run{i}") for i in range(2)]
    stub = STUBS["sbatch"] + '\n[ "$#" = 1 ] || { echo "sbatch: error: no" >&2; exit 1; }\n'
    (cluster / "bin" / "sbatch").write_text(f"#!/bin/bash\n{stub}")
    assert launch(*names, *SHAPE) == 1
    assert "sbatch: error: no; in the queue already: 0" in capsys.readouterr().err
