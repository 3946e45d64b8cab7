import pytest

from longctx import cli
from longctx.config import apply_overrides
from longctx.errors import OutsideError
from longctx.parallel.stopping import STOPPED_FILE, tell_launcher
from longctx.train import trainer
from longctx.train.settings import load_settings


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The file that a launcher waits for."""
    monkeypatch.setenv(STOPPED_FILE, str(tmp_path / "stopped"))
    return tmp_path / "stopped"


@pytest.fixture
def run_settings(tmp_path):
    """Of a run that has not begun."""
    return apply_overrides(load_settings("tiny"), ["--run.dir", str(tmp_path / "run")], "test")


def test_the_first_process_of_a_host_says_what_was_saved(file, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert tell_launcher("step-3")
    assert not file.exists()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert tell_launcher("step-3")
    assert file.read_text() == "step-3\n"
    assert list(file.parent.iterdir()) == [file]


def test_without_a_launcher_nothing_is_written(monkeypatch, tmp_path):
    monkeypatch.delenv(STOPPED_FILE, raising=False)
    monkeypatch.chdir(tmp_path)
    assert not tell_launcher("step-3")
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv(STOPPED_FILE, str(tmp_path / "nowhere" / "stopped"))
    with pytest.raises(OutsideError, match=r"nowhere/stopped.*cannot write"):
        tell_launcher("step-3")


@pytest.mark.parametrize(("stopped_by", "written"), [("SIGTERM", True), ("", False)])
def test_a_run_ends_with_0_for_a_launcher_that_waits(
    run_settings, file, monkeypatch, stopped_by, written
):
    monkeypatch.setattr(trainer, "train", lambda *_: stopped_by)
    assert cli._train(run_settings, None) == 0
    assert file.exists() == written


def test_a_stopped_run_ends_with_75_otherwise(run_settings, monkeypatch):
    monkeypatch.delenv(STOPPED_FILE, raising=False)
    monkeypatch.setattr(trainer, "train", lambda *_: "SIGTERM")
    assert cli._train(run_settings, None) == cli.STOPPED
