"""A save is seen by all or by nobody, is of the moment it was asked for, and removes only then."""

import errno
import os
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from longctx.checkpoint import (
    CheckpointConfig,
    Checkpoints,
    latest,
    open_checkpoint,
    resolve,
    saving,
    shards,
    store,
    whole,
)
from longctx.errors import InputError, OutsideError
from tests.checkpoint.crews import bytes_under, save, split, state_of, tensors_of, together


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_everything_is_on_the_disk_before_the_checkpoint_gets_its_name(tmp_path, monkeypatch):
    events = []

    def note(real, describe):
        def call(*args):
            events.append(describe(*args))
            return real(*args)

        return call

    def target(handle):
        return "sync " + Path(os.readlink(f"/proc/self/fd/{handle}")).name

    save(tmp_path, 3)
    monkeypatch.setattr(os, "fsync", note(os.fsync, target))
    for name in ("rename", "replace"):
        real = getattr(Path, name)
        monkeypatch.setattr(Path, name, note(real, lambda a, b: f"{a.name} -> {b.name}"))
    save(tmp_path, 5, keep=1)
    assert events == [
        "sync shard-00001-of-00001.safetensors",
        "sync state.json",
        "sync manifest.json",
        "sync .partial-step-5",
        ".partial-step-5 -> step-5",
        f"sync {tmp_path.name}",
        "sync .partial-latest",
        ".partial-latest -> latest",
        f"sync {tmp_path.name}",
        "step-3 -> .removed-step-3",
    ]
    assert names(tmp_path) == ["latest", "step-5"]
    assert (tmp_path / "latest").read_text() == "step-5\n"


def test_the_newest_and_round_steps_are_kept(tmp_path):
    for step in range(1, 12):
        save(tmp_path, step, keep=2, keep_every=4)
    assert names(tmp_path) == ["latest", "step-10", "step-11", "step-4", "step-8"]
    save(tmp_path, 12, keep=1)
    assert names(tmp_path) == ["latest", "step-12"]


def test_what_was_just_saved_is_kept_even_if_a_later_step_is_there(tmp_path):
    save(tmp_path, 30)
    save(tmp_path, 20, keep=1)
    assert names(tmp_path) == ["latest", "step-20", "step-30"]


def test_leftovers_are_swept(tmp_path):
    for name in (".partial-step-99", ".removed-step-2", ".replaced-step-7"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("")
    (tmp_path / "notes.txt").write_text("mine")
    assert latest(tmp_path) is None
    save(tmp_path, 7)
    assert names(tmp_path) == ["latest", "notes.txt", "step-7"]


def test_a_step_that_is_saved_again_replaces_the_earlier_one(tmp_path):
    save(tmp_path, 5, 2)
    save(tmp_path, 5, 1)
    assert names(tmp_path) == ["latest", "step-5"]
    assert open_checkpoint(latest(tmp_path)).names == tensors_of(5).keys()


def test_an_earlier_save_counts_while_its_step_has_no_other(tmp_path):
    save(tmp_path, 5)
    (tmp_path / "step-5").rename(tmp_path / ".replaced-step-5")
    assert latest(tmp_path) == tmp_path / ".replaced-step-5"
    assert open_checkpoint(latest(tmp_path)).state["step"] == 5
    save(tmp_path, 6, keep=2)
    assert names(tmp_path) == [".replaced-step-5", "latest", "step-6"]
    save(tmp_path, 7, keep=2)
    assert names(tmp_path) == ["latest", "step-6", "step-7"]


def test_folders_of_an_older_format_are_neither_resumed_nor_ignored(tmp_path):
    assert latest(tmp_path / "nothing") is None
    (tmp_path / "step-8").mkdir()
    with pytest.raises(InputError, match=r"step-8: has no manifest\.json"):
        latest(tmp_path)
    save(tmp_path, 9)
    assert latest(tmp_path) == tmp_path / "step-9"


def test_a_path_means_a_checkpoint_a_run_or_a_folder_of_checkpoints(tmp_path):
    folder = tmp_path / "checkpoints"
    save(folder, 5)
    save(folder, 12)
    for path in (tmp_path, folder, folder / "step-12", str(tmp_path)):
        assert resolve(path) == folder / "step-12"
    assert resolve(folder / "step-5") == folder / "step-5"
    folder.rename(tmp_path / "moved")
    with pytest.raises(InputError, match="no checkpoint here"):
        resolve(tmp_path)
    (tmp_path / "config.toml").write_text(f'[checkpoint]\ndir = "{tmp_path}/moved"\n')
    assert resolve(tmp_path) == tmp_path / "moved/step-12"


def full_disk(*_args):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", [12, 13])
@pytest.mark.parametrize("guilty", [0, 2])
def test_if_one_process_fails_nobody_publishes(tmp_path, monkeypatch, step, guilty):
    save(tmp_path, 12, 3)
    before = bytes_under(tmp_path)
    write = saving.write_shard

    def write_unless_guilty(file, boxes):
        total = write(file, boxes)
        return full_disk() if f"shard-0000{guilty + 1}" in file.name else total

    monkeypatch.setattr(saving, "write_shard", write_unless_guilty)

    def work(crew):
        boxes = split(tensors_of(step), crew.rank, 3)
        Checkpoints(tmp_path, CheckpointConfig(), crew).save(step, boxes, {}, wait=True)

    errors = together(3, work)
    text = (
        f"{tmp_path}/step-{step}/shard-0000{guilty + 1}-of-00003.safetensors: cannot write the "
        f"checkpoint (process {guilty}): the disk is full; older checkpoints are intact"
    )
    assert [str(error) for error in errors] == [text] * 3
    assert all(isinstance(error, OutsideError) for error in errors)
    assert bytes_under(tmp_path) == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("broken", ["begin", "publish"])
def test_a_failure_of_the_first_process_reaches_all(tmp_path, monkeypatch, broken):
    save(tmp_path, 12, 2)
    before = bytes_under(tmp_path)
    monkeypatch.setattr(store.LocalStore, broken, full_disk)

    def work(crew):
        boxes = split(tensors_of(13), crew.rank, 2)
        Checkpoints(tmp_path, CheckpointConfig(), crew).save(13, boxes, {}, wait=True)

    errors = together(2, work)
    assert len({str(error) for error in errors}) == 1
    assert "step-13" in str(errors[0])
    assert "(process 0): the disk is full" in str(errors[0])
    assert bytes_under(tmp_path) == before


def test_a_failed_rename_puts_the_earlier_save_back(tmp_path, monkeypatch):
    save(tmp_path, 12)
    before = bytes_under(tmp_path)
    rename = Path.rename

    def refuse_partial(path, target):
        if path.name.startswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_partial)
    with pytest.raises(OutsideError, match="Input/output error"):
        save(tmp_path, 12)
    assert bytes_under(tmp_path) == before


@pytest.mark.parametrize("wait", [False, True], ids=["asynchronous", "synchronous"])
def test_a_disk_that_is_really_full_is_one_error(tmp_path, wait):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "longctx-test", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    try:
        save(disk, 1)
        before = bytes_under(disk)
        checkpoints = Checkpoints(disk, CheckpointConfig())
        large = [whole("model/large", torch.zeros(100_000))]
        with pytest.raises(OutsideError, match=r"step-2/shard-.*: the disk is full; older"):
            checkpoints.save(2, large, {}, wait) or checkpoints.wait()
        assert bytes_under(disk) == before
        save(disk, 3)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutsideError, match="file/checkpoints/step-1: cannot write the checkpoint"):
        save(tmp_path / "file/checkpoints", 1)


class Gate:
    """Holds back the writing of shards until it is opened."""

    def __init__(self, monkeypatch):
        self.entered, self.opened = threading.Event(), threading.Event()
        monkeypatch.setattr(saving, "write_shard", self._write)

    def _write(self, file, boxes):
        self.entered.set()
        assert self.opened.wait(20)
        return shards.write_shard(file, boxes)


def test_a_save_in_the_background_is_of_the_time_of_the_call(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    tensors, state = tensors_of(5), state_of(5)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(5, [whole(name, tensor) for name, tensor in tensors.items()], state)
    assert gate.entered.wait(20)
    assert latest(tmp_path) is None
    checkpoints.settle()
    for tensor in tensors.values():
        tensor.zero_()
    state["tokens"] = state["config"]["run"]["seed"] = -1
    gate.opened.set()
    checkpoints.wait()
    checkpoint = open_checkpoint(latest(tmp_path))
    assert checkpoint.state == {**state_of(5), "step": 5}
    for name, tensor in tensors_of(5).items():
        assert torch.equal(checkpoint.read(name), tensor), name


def test_a_second_save_waits_for_the_first_and_spoils_nothing(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    tensor = torch.full((1000,), 1.0)
    checkpoints.save(1, [whole("model/w", tensor)], {})
    assert gate.entered.wait(20)
    checkpoints.settle()
    tensor.fill_(2.0)
    second = threading.Thread(target=checkpoints.save, args=(2, [whole("model/w", tensor)], {}))
    second.start()
    second.join(0.05)
    assert second.is_alive()
    gate.opened.set()
    second.join()
    checkpoints.wait()
    for step in (1, 2):
        found = open_checkpoint(tmp_path / f"step-{step}").read("model/w")
        assert torch.equal(found, torch.full((1000,), float(step)))


def test_copies_follow_boxes_that_change_their_shape(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=9))
    for step, tensor in enumerate([torch.ones(3), torch.ones(4), torch.ones(4).double()]):
        checkpoints.save(step, [whole("model/w", tensor)], {})
        checkpoints.wait()
        assert torch.equal(open_checkpoint(latest(tmp_path)).read("model/w"), tensor)


def test_a_failure_in_the_background_is_told_once_and_the_next_save_works(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    boxes = [whole("model/w", torch.ones(3))]
    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_shard", full_disk)
        checkpoints.save(1, boxes, {})
        checkpoints._join()
        assert "step-1" in (text := checkpoints.failure() or "")
        assert "the disk is full" in text
        assert checkpoints.failure() is None
        for _ in range(2):  # told or not, the last save has failed
            with pytest.raises(OutsideError, match="step-1"):
                checkpoints.wait()
        checkpoints.save(2, boxes, {})
        checkpoints._join()
    checkpoints.save(3, boxes, {})
    checkpoints._join()
    assert "step-2" in (checkpoints.failure() or "")
    checkpoints.wait()
    assert names(tmp_path) == ["latest", "step-3"]


def test_without_the_background_a_save_raises_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "write_shard", full_disk)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(asynchronous=False))
    with pytest.raises(OutsideError, match="the disk is full"):
        checkpoints.save(1, [], {})


def test_an_interrupted_save_is_swept_when_the_run_goes_on(tmp_path):
    save(tmp_path, 5)
    for name in (".partial-step-6", ".removed-step-4", ".replaced-step-5"):
        (tmp_path / name).mkdir()
    Checkpoints(tmp_path, CheckpointConfig())
    assert names(tmp_path) == ["latest", "step-5"]


def test_the_config_refuses_numbers_without_meaning():
    assert CheckpointConfig().folder(Path("runs/x")) == Path("runs/x/checkpoints")
    assert CheckpointConfig(dir="s3://b/run").folder(Path("runs/x")) == "s3://b/run"
    assert CheckpointConfig(dir="/data/x").folder(Path("runs/x")) == Path("/data/x")
    for field, value in (("keep", 0), ("every", -1), ("keep_every", -1)):
        with pytest.raises(InputError, match=rf"checkpoint\.{field} must be"):
            CheckpointConfig(**{field: value})


def test_settle_waits_until_everything_is_copied(tmp_path, monkeypatch):
    go_on, copied = threading.Event(), saving.np.copyto

    def slow(target, source):
        assert go_on.wait(20)
        copied(target, source)

    monkeypatch.setattr(saving.np, "copyto", slow)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    tensor = torch.ones(10)
    checkpoints.save(1, [whole("model/w", tensor)], {})
    settling = threading.Thread(target=checkpoints.settle)
    settling.start()
    settling.join(0.05)
    assert settling.is_alive()
    go_on.set()
    settling.join(20)
    tensor.zero_()
    checkpoints.wait()
    assert open_checkpoint(latest(tmp_path)).read("model/w").sum() == 10
