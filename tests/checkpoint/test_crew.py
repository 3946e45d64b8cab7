"""Real processes that save and open checkpoints while they also train."""

import pytest
import torch
import torch.distributed as dist

from longctx.checkpoint import CheckpointConfig, Checkpoints, latest, open_checkpoint
from longctx.errors import InputError, OutsideError
from longctx.parallel.crew import GlooCrew
from tests.checkpoint.crews import split, state_of, tensors_of
from tests.dist import fork_ranks, run_gloo

pytestmark = pytest.mark.alone


def gather_messages(rank: int) -> list[list[bytes]]:
    crew = GlooCrew(30)
    assert (crew.rank, crew.size) == (rank, 3)
    mine = [b"", bytes(range(rank)), b"x" * 10 ** (2 * rank), b"" if rank else b"only the first"]
    return [crew.gather(data) for data in mine]


def test_every_process_gets_all_messages_in_order():
    wanted = [
        [b"", b"", b""],
        [b"", b"\0", b"\0\1"],
        [b"x", b"x" * 100, b"x" * 10_000],
        [b"only the first", b"", b""],
    ]
    assert run_gloo(3, gather_messages) == [wanted] * 3


def save_while_training(rank: int, folder, damaged: str) -> str:
    crew = GlooCrew(30)
    checkpoints = Checkpoints(folder, CheckpointConfig(), crew)
    for step in range(1, 5):
        tensors = tensors_of(step)
        checkpoints.save(step, split(tensors, rank, 4), state_of(step))
        checkpoints.settle()
        for tensor in tensors.values():
            tensor.zero_()
        for _ in range(20):
            dist.all_reduce(torch.ones(10))
    checkpoints.wait()
    checkpoint = open_checkpoint(latest(folder), crew)
    for dim in (0, 1):
        for box in split(tensors_of(4), (rank + 1) % 4, 4, dim):
            assert torch.equal(checkpoint.read(box.name, box.offsets, box.tensor.shape), box.tensor)
    dist.barrier()
    if rank == 3:
        file = folder / "step-4" / damaged
        content = bytearray(file.read_bytes())
        content[-2] ^= 4
        file.write_bytes(content)
    dist.barrier()
    try:
        open_checkpoint(latest(folder), crew)
    except InputError as error:
        return str(error)
    return ""


def test_four_processes_save_in_the_background_and_read_each_other(tmp_path):
    damaged = "shard-00003-of-00004.safetensors"
    texts = run_gloo(4, save_while_training, tmp_path, damaged)
    assert len(set(texts)) == 1
    assert texts[0].startswith(f"{tmp_path}/step-4/{damaged}: damaged")
    assert texts[0].endswith("to go on from step-3")


def lose_a_process(rank: int, folder, told) -> None:
    crew = GlooCrew(30)
    checkpoints = Checkpoints(folder, CheckpointConfig(), crew)
    checkpoints.save(1, split(tensors_of(1), rank, 3), state_of(1), wait=True)
    if rank == 2:
        raise SystemExit("lost")
    checkpoints.save(2, split(tensors_of(2), rank, 3), state_of(2))
    try:
        checkpoints.wait()
    except OutsideError as error:
        (told / str(rank)).write_text(str(error))


def test_a_lost_process_is_an_error_and_publishes_nothing(tmp_path):
    folder = tmp_path / "checkpoints"
    fork_ranks(3, lose_a_process, (folder, tmp_path), patience=10)
    for rank in range(2):
        text = (tmp_path / str(rank)).read_text()
        assert "a process was lost while all spoke about a checkpoint" in text
    assert open_checkpoint(latest(folder)).state["step"] == 1
    assert not (folder / "step-2").exists()
