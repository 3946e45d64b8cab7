"""`memory.checkpointing = "auto"`: the fastest policy that fits, the same in every process."""

from dataclasses import replace

import pytest
import torch

from longctx.cli import main
from longctx.config import apply_overrides, decode, load_table
from longctx.errors import InputError
from longctx.model.decoder import Decoder
from longctx.plan import automatic
from longctx.plan.automatic import room_here, settle_within
from longctx.plan.clusters import GIB, load_cluster
from longctx.plan.prediction import predict
from longctx.plan.search import Room, largest_memory
from longctx.plan.workload import workload
from longctx.train.settings import Settings, load_settings
from longctx.train.trainer import train
from tests.train.processes import exit_codes, start_work

LONG = {"train.seq_len": 65536, "train.batch_size": 1}
TINY = {"train.seq_len": 64, "train.batch_size": 2, "data.tokenizer": "bytes"}
VOCABULARY = 512


def auto(preset="340m-linear", sizes=LONG, **more) -> Settings:
    """A config that leaves it open."""
    fields = sizes | {"memory.checkpointing": "auto", "train.device": "cpu"}
    fields |= {name.replace("__", "."): value for name, value in more.items()}
    argv = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    return apply_overrides(load_settings(preset), argv, "test")


def device_bytes(settings: Settings) -> int:
    return largest_memory(workload(settings, 1, VOCABULARY, "bf16"), True).device


def settled(settings: Settings, room: Room):
    return settle_within(settings, 1, VOCABULARY, "bf16", room).memory


def test_the_fastest_that_fits_is_taken():
    left_open = auto()
    found = []
    for policy in ("none", "keep", "full"):
        whole = replace(left_open, memory=replace(left_open.memory, checkpointing=policy))
        memory = settled(left_open, Room(device_bytes(whole) + 1.0, 1e15))
        found.append(memory.checkpointing)
        assert memory.activations == "device"
    assert found == ["none", "keep", "keep"]  # tiles of a keeping layer take less than full
    assert str(settled(left_open, Room(1.0, 1e15))) == (
        "checkpointing full, mlp_tokens 4096, activations cpu"
    )
    assert settled(left_open, Room(1.0, 1.0, is_apart=False)).activations == "device"


def test_what_else_is_set_stays():
    small = Room(1.0, 1e15)
    memory = settled(auto(memory__mlp_tokens=512, memory__loss_tokens=64), small)
    assert (memory.mlp_tokens, memory.loss_tokens) == (512, 64)
    for room, policy in ((Room(1e15, 1e15), "keep"), (small, "full")):
        memory = settled(auto(memory__activations="cpu"), room)
        assert (memory.checkpointing, memory.activations) == (policy, "cpu")
    layers = replace(auto().memory, layers={"L": "full"})
    assert settled(replace(auto(), memory=layers), small).layers == {"L": "full"}
    chosen = replace(auto(), memory=replace(auto().memory, checkpointing="none"))
    assert settle_within(chosen, 1, VOCABULARY, "bf16", small) is chosen


@pytest.fixture
def of_size(monkeypatch):
    """Makes this machine have so many bytes of memory."""

    def make(size: float) -> None:
        monkeypatch.setattr(automatic, "total_memory", lambda: size)

    return make


def test_processes_share_the_memory_of_their_machine(of_size):
    of_size(100 * GIB)
    room = room_here(torch.device("cpu"), here=4)
    assert room == Room(pytest.approx(0.9 * 25 * GIB), 0.0, is_apart=False)


@pytest.fixture
def argv(tmp_path):
    """A small run that leaves it open, as options."""
    (tmp_path / "text.txt").write_text("some words " * 400)
    own = {"data.path": tmp_path / "text.txt", "run.dir": tmp_path / "run"}
    own |= TINY | {"memory.checkpointing": "auto", "train.device": "cpu", "train.steps": 2}
    return ["tiny", *(word for name, value in own.items() for word in (f"--{name}", str(value)))]


def test_check_chooses_by_this_machine(of_size, capsys, argv):
    for size, policy in ((64 * GIB, "none"), (1000, "full")):
        of_size(size)
        assert main(["check", *argv]) == 0
        assert f", checkpointing {policy}; " in capsys.readouterr().out


def test_a_plan_takes_what_the_cluster_has():
    cluster, sizes = load_cluster("8xh100"), {"train.seq_len": 262144, "train.batch_size": 1}
    for memory_gib, policy in ((79.0, "none"), (20.0, "keep")):
        small = replace(cluster, memory_gib=memory_gib)
        plan = predict(auto("340m", sizes, parallel__sp=8), small, 8, VOCABULARY, 0, False)
        assert plan.asked is not None
        assert plan.asked.fits
        assert plan.asked.work.settings.memory.checkpointing == policy
    sizes = {"train.seq_len": 65536, "train.batch_size": 2}
    plan = predict(auto("340m", sizes), cluster, 4, VOCABULARY, 0, True)
    assert plan.asked is None
    assert plan.best is not None
    assert plan.best.overrides["memory.checkpointing"] == "none"


def test_a_library_refuses_what_nobody_has_chosen(argv):
    settings = apply_overrides(load_settings("tiny"), argv[1:], "test")
    with pytest.raises(InputError, match=r"memory\.checkpointing = 'auto': only longctx train"):
        Decoder(settings.model, VOCABULARY, settings.memory)
    with pytest.raises(InputError, match="set 'none', 'keep' or 'full'"):
        train(settings)


@pytest.mark.cluster
def test_a_run_says_what_was_chosen(of_size, tmp_path, capsys, argv):
    of_size(1000)
    assert main(["train", *argv, "--eval.sequences", "1"]) == 0
    assert "on cpu, checkpointing full; MFU against" in capsys.readouterr().out
    file = tmp_path / "run" / "config.toml"
    written = decode(Settings, load_table(file), file=str(file))
    assert written.memory.checkpointing == "full"


@pytest.mark.cluster
def test_processes_that_choose_differently_end_with_one_line(of_size, capfd, argv):
    def work(rank: int) -> int:
        of_size((64 * GIB, 1000)[rank])
        return main(["train", *argv, "--parallel.sp", "2"])

    assert exit_codes(start_work(2, work), seconds=50) == [2, 2]
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "longctx:" in line]
    assert "(checkpointing full; checkpointing none), as on machines of different size" in line
