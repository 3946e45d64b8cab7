import json
import signal
import subprocess

import pytest

from longctx.train.trainer import train
from tests.cluster.hosts import TwoHosts, missing
from tests.cluster.test_local_launch import wait_for_steps
from tests.train.conftest import corpus, rows, settings  # noqa: F401
from tests.train.processes import run

STEPS = {"train__steps": 20, "train__seq_len": 63, "train__precision": "fp64"}
SPLITS = {
    "gathered": {},
    "chained": {"parallel__prefix": "scan", "parallel__stream": "ring"},
    "heads": {"parallel__heads": 2, "parallel__placement": "mirror"},
}


@pytest.mark.skipif(bool(missing()), reason=missing())
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
def test_a_sequence_across_two_hosts_gives_the_same_losses(settings, rows, split):  # noqa: F811
    expected = settings("one", **STEPS)
    train(expected)
    shared = settings("two-hosts", parallel__sp=4, **STEPS, **split)
    file = shared.run.path.parent / "two-hosts.toml"
    _write(shared, file)
    with TwoHosts() as hosts:
        launched = hosts.launch(2, 29511, "longctx", "train", str(file))
        outputs = [process.communicate(timeout=240)[0] for process in launched]
    assert [process.returncode for process in launched] == [0, 0], "\n".join(outputs)
    for a, b in zip(rows(expected), rows(shared), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-9
    left = subprocess.run(["pgrep", "-f", str(file)], capture_output=True, text=True)
    assert left.stdout == ""


CUT_SECONDS = 12


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_a_cable_that_is_cut_for_a_while_changes_nothing(settings, rows, tmp_path):  # noqa: F811
    options = {"train__steps": 40, "checkpoint__every": 5, "parallel__sp": 4}
    options |= {"parallel__timeout_seconds": CUT_SECONDS // 2}
    options |= {"model__depth": 2, "model__pattern": "LS"}
    whole, cut = settings("whole", **options), settings("cut", **options)
    run(4, whole)
    file = tmp_path / "cut.toml"
    _write(cut, file)
    with TwoHosts() as hosts:
        launched = hosts.torchrun(2, 29522, str(file))
        wait_for_steps(cut.run.path, 8)
        hosts.cut(CUT_SECONDS)
        outputs = [process.communicate(timeout=240)[0] for process in launched]
    assert [process.returncode for process in launched] == [0, 0], "\n".join(outputs)
    log = (cut.run.path / "log.txt").read_text()
    assert log.count("resumed at step") >= 1, log
    losses = [[(row["step"], row["loss"]) for row in rows(x)] for x in (whole, cut)]
    assert losses[0] == losses[1]
    assert rows(whole)[-1]["val_loss"] == rows(cut)[-1]["val_loss"]


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_a_signal_to_one_host_stops_both_after_they_saved(settings, tmp_path):  # noqa: F811
    config = settings(train__steps=100_000, parallel__sp=2)
    file = tmp_path / "stopped.toml"
    _write(config, file)
    with TwoHosts() as hosts:
        launched = hosts.torchrun(1, 29533, str(file))
        wait_for_steps(config.run.path, 3)
        launched[1].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=60)[0] for process in launched]
    assert [process.returncode for process in launched] == [75, 75], "\n".join(outputs)
    last = json.loads((config.run.path / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert (config.run.path / "checkpoints" / f"step-{last}").is_dir()
    assert "Traceback" not in "".join(outputs)


def _write(config, file) -> None:
    from longctx.config import to_toml

    file.write_text(to_toml(config))
