import subprocess

import pytest

from longctx.train.trainer import train
from tests.cluster.hosts import TwoHosts, missing
from tests.train.conftest import corpus, rows, settings  # noqa: F401

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


def _write(config, file) -> None:
    from longctx.config import to_toml

    file.write_text(to_toml(config))
