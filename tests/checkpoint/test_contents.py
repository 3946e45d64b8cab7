"""Models and random state in checkpoints."""

import pytest
import torch
from torch import nn

from longctx.checkpoint import (
    Box,
    CheckpointConfig,
    Checkpoints,
    latest,
    load_model,
    load_random,
    model_tensors,
    open_checkpoint,
    random_boxes,
    whole,
)
from longctx.errors import InputError
from tests.checkpoint.crews import split, succeed


class TiedModel(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, width)
        self.middle = nn.Linear(width, width)
        self.head = nn.Linear(width, 16, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.full((), 0.5))
        self.register_buffer("view_of_larger", torch.arange(10.0)[2:4])


def save(folder, boxes):
    Checkpoints(folder, CheckpointConfig()).save(1, boxes, {}, wait=True)
    return open_checkpoint(latest(folder))


@pytest.mark.parametrize("world", [1, 3])
def test_a_model_written_by_any_number_of_processes_is_loaded(tmp_path, world):
    model, other = TiedModel(), TiedModel().bfloat16()
    tensors = {f"model/{name}": tensor for name, tensor in model_tensors(model).items()}
    assert "model/head.weight" not in tensors

    def work(crew):
        boxes = split(tensors, crew.rank, world)
        Checkpoints(tmp_path, CheckpointConfig(), crew).save(1, boxes, {}, wait=True)

    succeed(world, work)
    load_model(open_checkpoint(latest(tmp_path)), other)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor.bfloat16()), name
    assert other.head.weight is other.embedding.weight


def boxes_of(model):
    return [whole(f"model/{name}", tensor) for name, tensor in model_tensors(model).items()]


def test_another_model_is_refused_by_the_first_name(tmp_path):
    checkpoint = save(tmp_path, boxes_of(TiedModel()))
    with pytest.raises(InputError, match=r"embedding\.weight has shape \[16, 8\] .* \[16, 4\]"):
        load_model(checkpoint, TiedModel(4))
    model = TiedModel()
    model.extra = nn.Linear(1, 1)
    with pytest.raises(InputError, match=r"step-1: lacks extra\.weight; .* another model"):
        load_model(checkpoint, model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    del model.extra, model.middle
    with pytest.raises(InputError, match=r"has middle\.bias, which the model lacks"):
        load_model(checkpoint, model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_each_process_gets_its_random_state_back(tmp_path):
    torch.manual_seed(3)
    boxes = random_boxes(0)
    wanted = torch.rand(3)
    torch.manual_seed(4)
    boxes += random_boxes(1)
    checkpoint = save(tmp_path, boxes)
    torch.manual_seed(5)
    assert load_random(checkpoint, 0)
    assert torch.equal(torch.rand(3), wanted)
    assert load_random(checkpoint, 1)
    assert not torch.equal(torch.rand(3), wanted)
    assert not load_random(checkpoint, 2)


def test_a_random_state_that_is_none_is_refused(tmp_path):
    checkpoint = save(tmp_path, [whole("random/0/cpu", torch.zeros(3, dtype=torch.uint8))])
    with pytest.raises(InputError, match="random/0/cpu is no random state"):
        load_random(checkpoint, 0)


def test_a_box_of_a_model_is_the_whole_of_a_tensor():
    boxes = {box.name: box for box in boxes_of(TiedModel())}
    assert isinstance(boxes["model/middle.weight"], Box)
    assert boxes["model/middle.weight"].shape == (8, 8)
    assert boxes["model/scale"].offsets == ()
