"""The scripts that start processes on this machine, with longctx and python replaced by stubs."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longctx.launch.ports import free_port

ROOT = Path(__file__).parents[2]
HOSTILE = 'it\'s $(touch x); `touch x` "q" a\\b\n#*'
TRAIN = ["train", HOSTILE, "--run.dir", HOSTILE]
LONGCTX = """#!/bin/bash
[[ $1 == check ]] && exit
printf '%s\\0' "$@" >> "words-${RANK:-0}"
printf '\\0' >> "words-${RANK:-0}"
[[ $2 == fails ]] && exit 3
[[ $2 == stops ]] && exit 75
exit 0
"""
PYTHON = """#!/bin/bash
[[ $* == "-m longctx.launch.ports" ]] && echo 29999 && exit
printf '%s\\0' "$@" > agent
[[ ${STOPS:-} ]] && echo step-3 > "$LONGCTX_STOPPED_FILE"
exit 0
"""


@pytest.fixture
def stubs(tmp_path):
    """A folder whose longctx and python write down what they are given."""
    (tmp_path / "bin").mkdir()
    for name, body in {"longctx": LONGCTX, "python": PYTHON}.items():
        (tmp_path / "bin" / name).write_text(body)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def run(folder: Path, script: str, *words: str, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PATH": f"{folder}/bin:{os.environ['PATH']}"} | variables
    command = [str(ROOT / "launch" / script), *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def trained(file: Path) -> list[list[str]]:
    """The words of each run of longctx that was written into a file."""
    return [line.split("\0") for line in file.read_text().split("\0\0")[:-1]]


@pytest.mark.parametrize("processes", ["1", "2"])
def test_local_hands_on_every_word(stubs, processes):
    assert run(stubs, "local.sh", "-n", processes, *TRAIN[1:]).returncode == 0
    for rank in range(int(processes)):
        assert trained(stubs / f"words-{rank}") == [TRAIN]
    assert not (stubs / "x").exists()


def test_torchrun_hands_on_every_word(stubs):
    shape = {"NNODES": "2", "NPROC_PER_NODE": "3", "MASTER_ADDR": "10.0.0.1", "RDZV_ID": HOSTILE}
    done = run(stubs, "torchrun.sh", *TRAIN[1:], **shape)
    assert done.returncode == 0, done.stderr
    words = (stubs / "agent").read_text().split("\0")[:-1]
    assert words[-5:] == ["longctx", *TRAIN]
    wanted = {"--nnodes=2", "--nproc-per-node=3", f"--rdzv-id={HOSTILE}"}
    assert wanted | {"--rdzv-endpoint=10.0.0.1:29400", "--local-addr=10.0.0.1"} <= set(words)
    assert not (stubs / "x").exists()


def test_torchrun_ends_with_75_if_the_trainers_said_that_they_were_stopped(stubs):
    assert run(stubs, "torchrun.sh", "tiny", NPROC_PER_NODE="1", STOPS="1").returncode == 75


MISTAKES = {
    "no config": ([], {}, "give a config"),
    "rank": (["tiny"], {"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK=2: must be below NNODES=2"),
    "number": (["tiny"], {"NNODES": "2$(touch x)"}, "is no number"),
    "arithmetic": (["tiny"], {"PATIENCE": "a[$(touch x)]"}, "is no number"),
    "processes": (["tiny"], {"NPROC_PER_NODE": "0"}, "give the number of processes"),
}


@pytest.mark.parametrize(("words", "shape", "said"), MISTAKES.values(), ids=MISTAKES.keys())
def test_torchrun_tells_a_mistake_in_one_line(stubs, words, shape, said):
    done = run(stubs, "torchrun.sh", *words, **shape)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (stubs / "x").exists()


def test_a_rendezvous_that_nobody_hosts_is_one_line_after_a_bounded_time(stubs):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PATIENCE": "1"}
    started = time.monotonic()
    shape = {"NNODES": "2", "NODE_RANK": "1", "NPROC_PER_NODE": "2"}
    done = run(stubs, "torchrun.sh", "tiny", **shape, **address)
    assert done.returncode == 1
    assert f"no answer from 127.0.0.1:{address['MASTER_PORT']} within 1 s" in done.stderr
    assert done.stderr.count("\n") == 1
    assert time.monotonic() - started < 10
    assert not (stubs / "agent").exists()


def test_a_ladder_trains_its_stages_in_order_with_the_options_of_all(stubs):
    done = run(stubs, "ladder.sh", "first", HOSTILE.strip(), "--", "--run.seed", HOSTILE)
    assert done.returncode == 0, done.stderr
    options = ["--run.seed", HOSTILE]
    expected = [["train", "first", *options], ["train", HOSTILE.strip(), *options]]
    assert trained(stubs / "words-0") == expected
    assert not (stubs / "x").exists()


@pytest.mark.parametrize(("stage", "code"), [("fails", 3), ("stops", 75)])
def test_a_ladder_ends_at_the_first_stage_that_does_not_finish(stubs, stage, code):
    assert run(stubs, "ladder.sh", "-n", "2", "first", stage, "last").returncode == code
    assert [words[1] for words in trained(stubs / "words-0")] == ["first", stage]


@pytest.mark.parametrize("words", [[], ["--", "--train.steps", "3"], ["tiny", "--train.steps"]])
def test_a_ladder_without_stages_says_what_it_wants(stubs, words):
    done = run(stubs, "ladder.sh", *words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize("name", ["torchrun.sh", "ladder.sh", "local.sh", "slurm.sbatch"])
def test_shellcheck_finds_nothing(name):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, ROOT / "launch" / name], capture_output=True)
    assert done.returncode == 0, done.stdout.decode()
