"""Who computes the cores: what a config may ask for, and what it gets."""

import pytest

from longctx.cli import main
from longctx.config import apply_overrides
from longctx.train.settings import load_settings

TINIEST = ["--train.steps", "2", "--train.seq_len", "32", "--eval.sequences", "1"]
TINIEST += ["--train.device", "cpu", "--train.batch_size", "1"]


def train(tmp_path, *options: str) -> int:
    return main(["train", "tiny", *TINIEST, "--run.dir", str(tmp_path / "run"), *options])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.backend", "triton"], "model.mixers.L: backend 'triton' needs Triton and a CUDA"),
        (["--model.backend", "fla"], "model.mixers.L: backend 'fla' needs a CUDA device"),
        (["--model.mixers.L.backend", "fla"], "model.mixers.L: backend 'fla' needs a CUDA device"),
        (["--model.backend", "tritn"], "model.backend"),
        (["--model.mixers.S.inner.backend", "fla"], "backend = 'fla': is for linear layers"),
    ],
)
def test_what_this_machine_cannot_do_is_one_line_and_nothing_is_written(
    options, message, tmp_path, capsys
):
    assert train(tmp_path, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_mixer_takes_the_backend_of_the_model_unless_it_has_its_own():
    options = ["--model.backend", "fla", "--model.mixers.L.backend", "torch"]
    layers = apply_overrides(load_settings("tiny"), options, "test").model.layers
    assert layers[0].computes_with == "torch"
    assert layers[3].inner.computes_with == "auto"
    layers = apply_overrides(load_settings("tiny"), options[:2], "test").model.layers
    assert layers[0].computes_with == "fla"


def test_a_resumed_run_may_change_who_computes(tmp_path):
    assert train(tmp_path, "--train.stop_after", "1") == 0
    assert train(tmp_path, "--model.backend", "torch", "--model.mixers.L.backend", "auto") == 0


def test_fla_is_refused_where_a_sequence_is_split(tmp_path, capsys):
    options = ["--model.backend", "fla", "--parallel.sp", "2", "--train.seq_len", "64"]
    assert main(["check", "tiny", "2", *options, "--run.dir", str(tmp_path / "run")]) == 2
    assert "fla" in capsys.readouterr().err
