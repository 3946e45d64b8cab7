import copy
import errno
import json
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from longctx.errors import InputError, OutsideError
from longctx.train import checkpoint


class TiedModel(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, width)
        self.middle = nn.Linear(width, width)
        self.head = nn.Linear(width, 16, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.full((), 0.5))
        self.register_buffer("view_of_larger", torch.arange(10.0)[2:4])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.middle(self.embedding(tokens)))) * self.scale


def build(seed: int, reverse_groups: bool = False, width: int = 8):
    torch.manual_seed(seed)
    model = TiedModel(width)
    matrices = {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1}
    vectors = {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}
    groups = [vectors, matrices] if reverse_groups else [matrices, vectors]
    return model, torch.optim.AdamW(groups, lr=0.01)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        tokens = torch.randint(16, (4, 6))
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def bytes_under(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def saved(tmp_path):
    """A run directory with the checkpoints of steps 3 and 12, and what they were made from."""
    model, optimizer = build(0)
    train(model, optimizer, 1)
    checkpoint.save(tmp_path, 3, model, optimizer, {"tokens": 72})
    train(model, optimizer, 2)
    checkpoint.save(tmp_path, 12, model, optimizer, {"tokens": 288, "identity": {"seed": 0}})
    return tmp_path, model, optimizer


def test_resumed_training_is_bit_identical(saved):
    run, model, optimizer = saved
    weights = copy.deepcopy(model.state_dict())
    straight = train(model, optimizer, 4)

    other, other_optimizer = build(1, reverse_groups=True)
    train(other, other_optimizer, 1)
    path = checkpoint.latest(run)
    checkpoint.load_model(path, other)
    checkpoint.load_optimizer(path, other, other_optimizer)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert other.head.weight is other.embedding.weight
    checkpoint.load_random(path)
    assert train(other, other_optimizer, 4) == straight
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_saving_what_was_loaded_gives_the_same_bytes(saved, tmp_path):
    run, _, _ = saved
    path = checkpoint.latest(run)
    model, optimizer = build(1)
    checkpoint.load_model(path, model)
    checkpoint.load_optimizer(path, model, optimizer)
    checkpoint.load_random(path)
    state = checkpoint.load_state(path)
    again = checkpoint.save(tmp_path / "again", 12, model, optimizer, state)
    assert bytes_under(again) == bytes_under(path)


def test_state_holds_what_the_caller_gave(saved):
    run, _, _ = saved
    state = checkpoint.load_state(run / "checkpoints/step-12")
    assert (state["step"], state["tokens"], state["identity"]) == (12, 288, {"seed": 0})
    assert set(state["files"]) == {
        "model.safetensors",
        "optimizer.safetensors",
        "random.safetensors",
    }


def test_an_optimizer_that_never_stepped_round_trips(tmp_path):
    model, optimizer = build(0)
    path = checkpoint.save(tmp_path, 0, model, optimizer, {})
    train(model, optimizer, 1)
    checkpoint.load_optimizer(path, model, optimizer)
    assert not optimizer.state


def test_latest_and_resolve_ignore_unfinished_saves(saved):
    run, _, _ = saved
    (run / "checkpoints/.partial-step-99").mkdir()
    assert checkpoint.latest(run) == run / "checkpoints/step-12"
    assert checkpoint.resolve(run) == run / "checkpoints/step-12"
    assert checkpoint.resolve(run / "checkpoints/step-3") == run / "checkpoints/step-3"


def test_resolve_refuses_a_folder_without_checkpoints(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    with pytest.raises(InputError, match="no checkpoint here"):
        checkpoint.resolve(tmp_path)


def test_prune_keeps_the_newest_and_clears_leftovers(saved):
    run, _, _ = saved
    (run / "checkpoints/.partial-step-99").mkdir()
    checkpoint.prune(run, 1)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-12"]


def test_saving_a_step_again_replaces_it(saved):
    run, model, optimizer = saved
    path = checkpoint.save(run, 12, model, optimizer, {"tokens": 1})
    assert checkpoint.load_state(path)["tokens"] == 1
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-12", "step-3"]


def test_everything_is_on_disk_before_the_directory_gets_its_name(tmp_path, monkeypatch):
    events = []
    rename = Path.rename
    monkeypatch.setattr(checkpoint, "sync_path", lambda path: events.append(path.name))
    monkeypatch.setattr(
        Path, "rename", lambda path, to: [events.append(f"to {to.name}"), rename(path, to)]
    )
    checkpoint.save(tmp_path, 5, *build(0), {})
    files = ["model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"]
    assert events == [*files, ".partial-step-5", "to step-5", "checkpoints"]


@pytest.mark.parametrize("step", [12, 13])
def test_a_full_disk_leaves_older_checkpoints_intact(saved, monkeypatch, step):
    run, model, optimizer = saved
    before = bytes_under(run)
    write = checkpoint.save_file

    def disk_fills_up(tensors, file):
        if file.name == checkpoint.OPTIMIZER_FILE:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, file)

    monkeypatch.setattr(checkpoint, "save_file", disk_fills_up)
    with pytest.raises(OutsideError, match=rf"step-{step}: .*the disk is full"):
        checkpoint.save(run, step, model, optimizer, {})
    assert bytes_under(run) == before
    assert not list(run.glob("checkpoints/.*"))


def test_a_write_error_of_the_system_is_reported(tmp_path):
    model, optimizer = build(0, width=64)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OutsideError, match=r"step-1: .*File too large"):
            checkpoint.save(tmp_path, 1, model, optimizer, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_failed_rename_puts_the_earlier_save_back(saved, monkeypatch):
    run, model, optimizer = saved
    before = bytes_under(run)
    rename = Path.rename

    def refuse_partial(path, target):
        if path.name.startswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_partial)
    with pytest.raises(OutsideError, match="Input/output error"):
        checkpoint.save(run, 12, model, optimizer, {})
    assert bytes_under(run) == before


@pytest.mark.parametrize("name", ["model", "optimizer", "random"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "unreadable"])
def test_a_damaged_file_is_named(saved, name, damage):
    run, model, optimizer = saved
    path = run / "checkpoints/step-12"
    file = path / f"{name}.safetensors"
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-7] if damage == "truncated" else b"\xff" * len(content))
    load = {
        "model": lambda: checkpoint.load_model(path, model),
        "optimizer": lambda: checkpoint.load_optimizer(path, model, optimizer),
        "random": lambda: checkpoint.load_random(path),
    }[name]
    with pytest.raises(InputError, match=rf"{name}\.safetensors: .*remove .*step-12 .*step-3$"):
        load()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}'])
def test_a_damaged_state_file_is_named(saved, content):
    path = saved[0] / "checkpoints/step-3"
    (path / "state.json").write_text(content)
    with pytest.raises(InputError, match=r"state\.json: .*remove .*step-3$"):
        checkpoint.load_state(path)


def test_an_unknown_format_is_refused(saved):
    file = saved[0] / "checkpoints/step-3/state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    with pytest.raises(InputError, match="format 99"):
        checkpoint.load_state(file.parent)


def test_another_model_is_refused_by_the_first_name(saved):
    path = checkpoint.latest(saved[0])
    model, optimizer = build(0, width=4)
    with pytest.raises(InputError, match=r"embedding\.weight has shape \[16, 8\] .* \[16, 4\]"):
        checkpoint.load_model(path, model)
    model, optimizer = build(0)
    model.extra = nn.Linear(1, 1)
    with pytest.raises(InputError, match=r"lacks extra\.weight"):
        checkpoint.load_model(path, model)
    del model.extra, model.middle
    with pytest.raises(InputError, match=r"has middle\.bias, which the model lacks"):
        checkpoint.load_model(path, model)
    with pytest.raises(InputError, match=r"optimizer has no parameter middle\.bias"):
        checkpoint.load_optimizer(path, model, optimizer)


def test_config_refuses_numbers_without_meaning():
    assert checkpoint.CheckpointConfig() == checkpoint.CheckpointConfig(every=0, keep=2)
    with pytest.raises(InputError, match=r"checkpoint\.keep"):
        checkpoint.CheckpointConfig(keep=0)
    with pytest.raises(InputError, match=r"checkpoint\.every"):
        checkpoint.CheckpointConfig(every=-1)
