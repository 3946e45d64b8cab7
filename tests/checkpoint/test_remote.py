"""Checkpoints behind URLs, with fsspec's file systems of this machine."""

import uuid

import fsspec
import pytest
import torch

from longctx.checkpoint import (
    CheckpointConfig,
    Checkpoints,
    latest,
    open_checkpoint,
    read_state,
    resolve,
    saving,
    whole,
)
from longctx.errors import InputError, OutsideError
from tests.checkpoint.crews import save, split, succeed, tensors_of, together
from tests.checkpoint.test_saving import full_disk

READERS = {"memory": 1, "file": 3}
"""Threads must not read fsspec's memory at the same time: its files have one position."""
SHARD = "shard-00001-of-00002.safetensors"


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    """The URL of an empty folder."""
    where = {"memory": f"memory://{uuid.uuid4().hex}", "file": f"file://{tmp_path}/bucket"}
    return where[request.param] + "/run/checkpoints"


def files(url: str) -> list[str]:
    system, path = fsspec.core.url_to_fs(url)
    return sorted(found.removeprefix(path) for found in system.find(path))


def test_a_remote_checkpoint_is_read_by_any_number_of_processes(url):
    assert latest(url) is None
    save(url, 5, 2)
    save(url, 12, 2)
    assert latest(url) == f"{url}/step-12"
    run = url.removesuffix("/checkpoints")
    assert resolve(run) == resolve(url) == resolve(f"{url}/step-12/") == f"{url}/step-12"
    assert read_state(resolve(url))["tokens"] == 120

    readers = READERS[url.partition(":")[0]]

    def read(crew):
        checkpoint = open_checkpoint(latest(url), crew)
        for box in split(tensors_of(12), crew.rank, readers):
            assert torch.equal(checkpoint.read(box.name, box.offsets, box.tensor.shape), box.tensor)
        folder = checkpoint._brought.folder
        checkpoint.close()
        assert not folder.exists()

    succeed(readers, read)


def test_steps_are_pruned_and_unfinished_ones_swept(url):
    system, path = fsspec.core.url_to_fs(url)
    system.makedirs(f"{path}/step-90")
    system.pipe_file(f"{path}/step-90/{SHARD}", b"unfinished")
    assert latest(url) is None
    for step in (4, 5, 6, 7):
        save(url, step, keep=1, keep_every=4)
    assert {name.split("/")[1] for name in files(url)} == {"latest", "step-4", "step-7"}
    assert system.cat_file(f"{path}/latest") == b"step-7\n"


def test_a_failed_save_leaves_the_older_checkpoint(url, monkeypatch):
    save(url, 5, 2)
    before = files(url)
    monkeypatch.setattr(saving, "write_shard", full_disk)

    def work(crew):
        Checkpoints(url, CheckpointConfig(), crew).save(6, [], {}, wait=True)

    errors = together(2, work)
    assert [str(error) for error in errors] == [str(errors[0])] * 2
    assert f"{url}/step-6/{SHARD}: cannot write" in str(errors[0])
    assert files(url) == before


def test_the_manifest_is_written_last_and_removed_first(url, monkeypatch):
    save(url, 5)
    system, _ = fsspec.core.url_to_fs(url)
    events = []
    store = type(saving.open_store(url))
    create, remove = store.create, type(system).rm_file

    def note_create(self, step, name):
        events.append(name)
        return create(self, step, name)

    def note_remove(self, name):
        events.append(f"remove {name.rpartition('/')[2]}")
        return remove(self, name)

    monkeypatch.setattr(store, "create", note_create)
    monkeypatch.setattr(type(system), "rm_file", note_remove)
    save(url, 5)
    assert events[0] == "remove manifest.json"
    assert events[-3:] == ["shard-00001-of-00001.safetensors", "state.json", "manifest.json"]
    assert open_checkpoint(f"{url}/step-5").state["step"] == 5


def test_damage_is_named_and_the_older_checkpoint_offered(url):
    save(url, 5, 2)
    save(url, 12, 2)
    system, path = fsspec.core.url_to_fs(url)
    content = bytearray(system.cat_file(f"{path}/step-12/{SHARD}"))
    content[-1] ^= 1
    system.pipe_file(f"{path}/step-12/{SHARD}", bytes(content))
    readers = READERS[url.partition(":")[0]]
    errors = together(readers, lambda crew: open_checkpoint(f"{url}/step-12", crew))
    assert len({str(error) for error in errors}) == 1
    assert str(errors[0]).startswith(f"{url}/step-12/{SHARD}: damaged")
    assert str(errors[0]).endswith(f"remove {url}/step-12 to go on from step-5")
    system.pipe_file(f"{path}/step-12/.metadata", b"x")
    with pytest.raises(InputError, match=r"step-12/\.metadata: does not belong"):
        open_checkpoint(f"{url}/step-12")


def test_what_is_not_there_is_an_error_of_one_line(url):
    with pytest.raises(InputError, match="no checkpoint here"):
        resolve(url)
    with pytest.raises(InputError, match="no checkpoint here"):
        open_checkpoint(f"{url}/step-1")


def test_a_url_that_nothing_here_understands_is_refused():
    with pytest.raises(InputError, match="nonsense://x: no access to such URLs"):
        Checkpoints("nonsense://x", CheckpointConfig())


def test_errors_of_a_client_are_errors_of_the_outside(url, monkeypatch):
    system, _ = fsspec.core.url_to_fs(url)

    def lost(*_args, **_kwargs):
        raise RuntimeError("connection lost")

    monkeypatch.setattr(type(system), "isdir", lost)
    monkeypatch.setattr(type(system), "makedirs", lost)
    with pytest.raises(OutsideError, match="connection lost"):
        latest(url)
    with pytest.raises(OutsideError, match="cannot write the checkpoint: connection lost"):
        Checkpoints(url, CheckpointConfig()).save(1, [whole("w", torch.ones(1))], {}, wait=True)
