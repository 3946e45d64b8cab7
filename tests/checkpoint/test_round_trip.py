"""What is written by any number of processes can be read in any other way."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader

from longctx.checkpoint import Box, CheckpointConfig, Checkpoints, latest, open_checkpoint, whole
from longctx.errors import OutsideError
from tests.checkpoint.crews import bytes_under, save, split, state_of, succeed, tensors_of, together

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

WORLDS = [1, 2, 4]


@pytest.fixture(params=[(world, dim) for world in WORLDS for dim in (0, 1)], ids=str)
def saved(request, tmp_path):
    world, dim = request.param
    save(tmp_path, 5, world, dim)
    return latest(tmp_path)


def test_whole_tensors_come_back_bit_for_bit(saved):
    checkpoint = open_checkpoint(saved)
    wanted = tensors_of(5)
    assert checkpoint.names == wanted.keys()
    assert checkpoint.state == {**state_of(5), "step": 5}
    for name, tensor in wanted.items():
        found = checkpoint.read(name)
        assert (found.dtype, checkpoint.dtype(name)) == (tensor.dtype, tensor.dtype)
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert torch.equal(found, tensor), name


@pytest.mark.parametrize("readers", [1, 2, 3, 4])
def test_any_other_split_is_read(saved, readers):
    wanted = tensors_of(5)

    def read(crew):
        checkpoint = open_checkpoint(saved, crew)
        for dim in (0, 1, 2):
            for box in split(wanted, crew.rank, readers, dim):
                found = checkpoint.read(box.name, box.offsets, box.tensor.shape)
                assert torch.equal(found, box.tensor), (box.name, box.offsets)

    succeed(readers, read)


def test_a_block_inside_is_read(saved):
    checkpoint = open_checkpoint(saved)
    wanted = tensors_of(5)["model/cube"][1:2, 2:5, 1:3]
    assert torch.equal(checkpoint.read("model/cube", (1, 2, 1), (1, 3, 2)), wanted)
    with pytest.raises(ValueError, match="model/cube: no block"):
        checkpoint.read("model/cube", (1, 2, 1), (1, 3, 3))


def test_what_was_read_shares_no_memory_with_the_file(saved):
    checkpoint = open_checkpoint(saved)
    checkpoint.read("model/matrix").zero_()
    assert torch.equal(checkpoint.read("model/matrix"), tensors_of(5)["model/matrix"])


@pytest.mark.parametrize("world", WORLDS)
def test_torch_reads_it_without_longctx(tmp_path, world):
    save(tmp_path, 5, world)
    wanted = {name: tensor for name, tensor in tensors_of(5).items() if tensor.dtype != torch.bool}
    into = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    dcp.load(into, storage_reader=HuggingFaceStorageReader(str(latest(tmp_path))), no_dist=True)
    for name, tensor in wanted.items():
        assert torch.equal(into[name], tensor), name


def test_the_same_contents_are_the_same_bytes(tmp_path):
    save(tmp_path / "a", 5, 2)
    save(tmp_path / "b", 5, 2)
    assert bytes_under(tmp_path / "a") == bytes_under(tmp_path / "b")


def test_only_files_that_hold_a_part_of_a_block_are_opened(tmp_path, monkeypatch):
    save(tmp_path, 5, 4)
    checkpoint = open_checkpoint(latest(tmp_path))
    opened = []
    original = checkpoint._part
    monkeypatch.setattr(checkpoint, "_part", lambda *a: [opened.append(a[0]), original(*a)][1])
    checkpoint.read("model/matrix", (0, 0), (2, 5))
    assert opened == ["shard-00001-of-00004.safetensors"]


GRID = torch.arange(24.0).reshape(4, 6)


def blocks(*cuts):
    """Boxes of GRID that start and stop at (rows, columns)."""
    return [Box("w", (4, 6), (r0, c0), GRID[r0:r1, c0:c1]) for r0, r1, c0, c1 in cuts]


def save_blocks(folder, boxes):
    def work(crew):
        Checkpoints(folder, CheckpointConfig(), crew).save(1, [boxes[crew.rank]], {}, wait=True)

    return together(len(boxes), work)


def test_blocks_of_two_dimensions_make_a_whole(tmp_path):
    cuts = [(0, 3, 0, 2), (3, 4, 0, 2), (0, 1, 2, 6), (1, 4, 2, 6)]
    assert save_blocks(tmp_path, blocks(*cuts)) == [None] * 4
    checkpoint = open_checkpoint(latest(tmp_path))
    assert torch.equal(checkpoint.read("w"), GRID)
    assert torch.equal(checkpoint.read("w", (0, 1), (4, 3)), GRID[:, 1:4])


@pytest.mark.parametrize(
    ("cuts", "problem"),
    [
        ([(0, 3, 0, 6), (3, 4, 0, 5)], "only 23 of 24 elements"),
        ([(0, 3, 0, 6), (2, 4, 0, 6)], r"two files hold the elements at \(2, 0\)"),
        ([(0, 4, 0, 3), (1, 4, 2, 6)], r"two files hold the elements at \(1, 2\)"),
    ],
)
def test_boxes_with_gaps_or_overlaps_are_not_published(tmp_path, cuts, problem):
    save(tmp_path, 0)
    before = bytes_under(tmp_path)
    results = save_blocks(tmp_path, blocks(*cuts))
    assert len({str(result) for result in results}) == 1
    assert isinstance(results[0], OutsideError)
    with pytest.raises(OutsideError, match=rf"step-1: cannot write .*: w \[4, 6\]: {problem}"):
        raise results[0]
    assert bytes_under(tmp_path) == before


def test_processes_must_agree_about_a_tensor(tmp_path):
    upper, lower = blocks((0, 2, 0, 6), (2, 4, 0, 6))
    lower = Box("w", (4, 6), (2, 0), lower.tensor.double())
    (error, _) = save_blocks(tmp_path, [upper, lower])
    assert "w is F32 [4, 6] in shard-00001" in str(error)
    assert "but F64 [4, 6] in shard-00002" in str(error)


def test_a_process_may_hold_several_blocks_of_a_tensor(tmp_path):
    rows = [[0, 2], [1, 3]]

    def work(crew):
        boxes = [box for r in rows[crew.rank] for box in blocks((r, r + 1, 0, 6))]
        boxes += [whole("v", torch.ones(2))] * (crew.rank == 0)
        Checkpoints(tmp_path, CheckpointConfig(), crew).save(1, boxes, {}, wait=True)

    succeed(2, work)
    checkpoint = open_checkpoint(latest(tmp_path))
    assert torch.equal(checkpoint.read("w"), GRID)
    assert torch.equal(checkpoint.read("w", (1, 0), (2, 6)), GRID[1:3])
    assert len(list(latest(tmp_path).glob("shard-*-of-00004.safetensors"))) == 4
    into = {"w": torch.zeros(4, 6), "v": torch.zeros(2)}
    dcp.load(into, storage_reader=HuggingFaceStorageReader(str(latest(tmp_path))), no_dist=True)
    assert torch.equal(into["w"], GRID)


@pytest.mark.parametrize(
    ("box", "problem"),
    [
        (Box("w", (4, 6), (2, 0), GRID), r"w: no block \(4, 6\) at \(2, 0\)"),
        (Box("w", (24,), (0, 0), GRID), "w: no block"),
        (whole("w", GRID.to(torch.complex64)), r"w: safetensors holds no torch\.complex64"),
    ],
)
def test_a_box_must_lie_in_its_tensor_and_have_a_type_of_safetensors(tmp_path, box, problem):
    with pytest.raises(OutsideError, match=problem):
        Checkpoints(tmp_path, CheckpointConfig()).save(1, [box], {}, wait=True)
    assert latest(tmp_path) is None
