"""launch/slurm.sbatch on a real SLURM cluster: two nodes of two processes share sequences."""

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest

from longctx.cli import main
from longctx.config import apply_overrides, to_toml
from longctx.launch.slurm import SlurmConfig, fill_in
from longctx.train.settings import Settings, load_settings
from tests.cluster.slurm import Slurm, missing, wait_for

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

ROOT = Path(__file__).parents[2]
STEPS = 40
SMALL = {
    "model.width": 32,
    "model.depth": 2,
    "model.pattern": "LS",
    "train.seq_len": 48,
    "train.batch_size": 2,
    "train.steps": STEPS,
    "optim.warmup_steps": 2,
    "eval.every": 0,
    "eval.sequences": 2,
    "checkpoint.every": 5,
    "parallel.sp": 4,
    "parallel.timeout_seconds": 60,
}
SHAPE = ("--nodes", "2", "--gpus-per-node", "2", "--time", "10")
HOSTILE = 'it\'s $(touch x) "q"; `touch x` a\\b #'


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, Slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        patch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
        patch.setenv("PYTHONPATH", str(ROOT))
        yield cluster


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Where everything is written, also by jobs."""
    folder = tmp_path_factory.mktemp("runs of it's $(touch x)")
    (folder / "corpus").mkdir()
    for i in range(12):
        text = " ".join(f"{i} times {n} is {i * n};" for n in range(40))
        (folder / "corpus" / f"{i}.txt").write_text(text)
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def write(name: str, folder: Path, **changes) -> Settings:
    """A config file for a small run of this name."""
    options = SMALL | {"run.name": name, "run.dir": folder / name}
    options["data.path"] = folder / "corpus"
    options |= {key.replace("__", "."): value for key, value in changes.items()}
    argv = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    settings = apply_overrides(load_settings("tiny"), argv, "test")
    (folder / f"{name}.toml").write_text(to_toml(settings))
    return settings


def submit(capsys, *words: str) -> list[str]:
    """The numbers of the jobs that `longctx launch slurm` submits."""
    assert main(["launch", "slurm", *words]) == 0
    return [line.split()[1].strip(",") for line in capsys.readouterr().out.splitlines()]


def steps(settings: Settings) -> int:
    file = settings.run.path / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def losses(settings: Settings) -> list[tuple[int, float]]:
    lines = (settings.run.path / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, lines)]


def summary(settings: Settings) -> dict:
    return json.loads((settings.run.path / "summary.json").read_text())


def printed(folder: Path, job: str) -> str:
    return next(folder.glob(f"*-{job}.out")).read_text()


def finish(slurm: Slurm, job: str, folder: Path) -> None:
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    wait_for(lambda: slurm.state(job) in over, 180)
    assert slurm.state(job) == "COMPLETED", printed(folder, job)


def freeze(slurm: Slurm, job: str, settings: Settings, count: int) -> list[int]:
    """Stops the trainers of a job once they did so many steps, so that none is done too early.

    SLURM wakes what it preempts.
    """
    wait_for(lambda: slurm.state(job) == "RUNNING", 60)
    wait_for(lambda: steps(settings) >= count or slurm.state(job) != "RUNNING", 120)
    trainers = slurm.processes(f"SLURM_JOB_ID={job}\0", "LOCAL_RANK=")
    send(trainers, signal.SIGSTOP)
    return trainers


def send(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def is_waiting(pid: int, number: int) -> bool:
    """Whether a process is gone, or a signal waits for it to wake up."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return True
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (number - 1) & 1 for mask in masks) or "State:\tT" not in "\n".join(lines)


@pytest.fixture(scope="module")
def whole(runs):
    return write("whole", runs)


def test_a_chain_of_jobs_with_hostile_names_trains_one_after_the_other(slurm, runs, whole, capsys):
    longer = write(HOSTILE, runs, train__seq_len=96, train__steps=2, run__init_from=runs / "whole")
    first, second = submit(capsys, "whole.toml", f"{HOSTILE}.toml", *SHAPE)
    assert slurm.job(second)["Dependency"].startswith(f"afterok:{first}")
    finish(slurm, first, runs)
    finish(slurm, second, runs)
    assert summary(whole)["processes"] == 4
    assert summary(longer)["step"] == 2
    assert f"JobName={HOSTILE}\n" in slurm("scontrol", "show", "job", second)
    assert "x" not in os.listdir(runs)


def test_preemption_a_lost_node_and_a_time_limit_change_nothing(slurm, runs, whole, capsys):
    settings = write("interrupted", runs)
    (job,) = submit(capsys, "interrupted.toml", *SHAPE)
    freeze(slurm, job, settings, 3)
    slurm("sbatch", "-p", "high", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "true")
    assert slurm.start_again(job) == 1
    saved = steps(settings)
    assert saved < STEPS
    wait_for(lambda: steps(settings) >= saved + 2, 120)
    slurm.lose("n2")
    # The signal of a time limit of two minutes comes at the start.
    assert slurm.start_again(job, "timelimit=2") == 2
    trainers = freeze(slurm, job, settings, steps(settings) + 1)
    wait_for(lambda: all(is_waiting(pid, signal.SIGUSR2) for pid in trainers), 60)
    send(trainers, signal.SIGCONT)
    assert slurm.start_again(job, "timelimit=10") == 3
    finish(slurm, job, runs)
    output = printed(runs, job)
    assert output.count("stopped after it saved") == 2, output
    assert output.count("resumed at step") == 3, output
    assert losses(settings) == losses(whole)
    assert summary(settings)["val_loss"] == summary(whole)["val_loss"]
    assert not list(runs.glob(".longctx-stopped*"))


def test_a_cancelled_job_saves_and_is_not_queued_again(slurm, runs, capsys):
    settings = write("cancelled", runs)
    (job,) = submit(capsys, "cancelled.toml", *SHAPE)
    wait_for(lambda: steps(settings) >= 2, 120)
    slurm("scancel", job)
    wait_for(lambda: slurm.state(job) == "CANCELLED", 60)
    last = losses(settings)[-1][0]
    assert last < STEPS
    assert (settings.run.path / "checkpoints" / f"step-{last}").is_dir()
    assert slurm.job(job)["Restarts"] == "0"


def test_a_job_that_the_mesh_does_not_fit_ends_before_training(slurm, runs):
    settings = write("misfit", runs)
    config = SlurmConfig(nodes=2, gpus_per_node=2, time="10")
    script = fill_in(config, ["misfit.toml"], ["--parallel.sp", "3"], "misfit")
    job = slurm("sbatch", "--parsable", folder=runs, text=script)
    wait_for(lambda: slurm.state(job) == "FAILED", 60)
    assert printed(runs, job).startswith("longctx: parallel.sp = 3 does not divide the 4 processes")
    assert printed(runs, job).count("\n") == 1
    assert not settings.run.path.exists()
