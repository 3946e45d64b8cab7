"""A run goes on only from checkpoints of its own."""

import pytest
import torch

from longctx.checkpoint import CheckpointConfig, Checkpoints, whole
from longctx.config import to_dict
from longctx.errors import InputError
from longctx.train.run_directory import open_run, write_config
from longctx.train.settings import Settings


def save(settings: Settings, step: int) -> None:
    state = {"data_fingerprint": "data", "config": to_dict(settings)}
    checkpoints = Checkpoints(settings.checkpoints, CheckpointConfig())
    checkpoints.save(step, [whole("model/w", torch.ones(1))], state, wait=True)


@pytest.fixture
def run(settings):
    """Settings of a run that has saved step 3."""
    made = settings()
    write_config(made)
    save(made, 3)
    return made


def test_a_run_goes_on_from_its_newest_checkpoint(run):
    assert open_run(run, "data") == run.run.path / "checkpoints/step-3"


def test_a_new_run_starts_without_a_checkpoint(settings):
    assert open_run(settings("new"), "data") is None


def test_other_data_are_refused(run):
    with pytest.raises(InputError, match=r"step-3: was trained on other data"):
        open_run(run, "other data")


def test_checkpoints_of_another_run_are_refused(run, settings):
    other = settings(train__steps=7)
    save(other, 4)
    with pytest.raises(InputError, match=r"step-4: is of another run \(train\.steps: 7 -> 6\)"):
        open_run(run, "data")


def test_a_new_run_does_not_write_among_checkpoints_of_another(run, settings):
    new = settings("new", checkpoint__dir=run.checkpoints)
    with pytest.raises(InputError, match=r"checkpoint\.dir = .*: holds checkpoints of another run"):
        open_run(new, "data")


def test_a_run_does_not_start_anew_because_its_checkpoints_were_left_behind(
    run, settings, tmp_path
):
    moved = settings(checkpoint__dir=tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"is empty, but the run has .*/step-3; move"):
        open_run(moved, "data")
    run.checkpoints.rename(tmp_path / "elsewhere")
    assert open_run(moved, "data") == tmp_path / "elsewhere/step-3"


def test_a_damaged_state_is_named(run):
    (run.checkpoints / "step-3/state.json").write_text("{}")
    with pytest.raises(InputError, match=r"state\.json: damaged .* no older checkpoint is good"):
        open_run(run, "data")


def test_a_run_that_was_killed_before_it_had_a_config_starts(settings):
    new = settings("new")
    new.run.path.mkdir()
    (new.run.path / ".partial-config.toml").write_text("[mod")
    assert open_run(new, "data") is None
