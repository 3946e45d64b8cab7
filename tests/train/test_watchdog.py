"""A run that hangs ends, and says which rank the others wait for."""

import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from longctx.sequence.c10d import ProcessGroup
from longctx.sequence.ledger import Label, Ledger
from longctx.train import watchdog
from longctx.train.culprits import Note, ranks, verdict
from longctx.train.guard import FaultsConfig
from longctx.train.signals import StopRequest
from longctx.train.watchdog import FEWEST, Watchdog
from tests.dist import KILLED, fork_ranks

pytestmark = pytest.mark.alone

QUICK = FaultsConfig(hang_factor=3, hang_seconds=0.5)
LABEL = Label(2, "gradients")


def alone() -> SimpleNamespace:
    return SimpleNamespace(rank=0, size=1, ledger=Ledger())


def watched(folder: Path, config: FaultsConfig, stop: StopRequest | None = None):
    """A watchdog of one process, and the codes that it ended with."""
    codes: list[int] = []
    return Watchdog(config, folder, alone(), stop or StopRequest(), codes.append), codes


def beats(dog: Watchdog, seconds: float = 0.0, number: int = FEWEST, phase: str = "step") -> None:
    """Things that begin and end, and then another one that begins."""
    for step in range(number + 1):
        dog.beat(step, phase)
        time.sleep(seconds if step < number else 0)


def test_a_step_that_hangs_ends_the_run_with_its_stack(tmp_path, capfd):
    dog, codes = watched(tmp_path, QUICK)
    with dog:
        beats(dog)
        time.sleep(0.9)
    assert codes == [1]
    told = capfd.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith(f"longctx: step {FEWEST} hangs: ")
    assert "rank 0 is in no exchange but at step 5, test_a_step_that_hangs" in told
    assert told.removeprefix("longctx: ").strip() in (tmp_path / "log.txt").read_text()
    dumped = (tmp_path / "hang" / "rank-0.txt").read_text()
    assert "in test_a_step_that_hangs" in dumped
    assert "Last exchanges:" in dumped


def test_a_step_may_take_its_multiple_of_the_median(tmp_path):
    dog, codes = watched(tmp_path, FaultsConfig(hang_factor=20, hang_seconds=0.01))
    with dog:
        beats(dog, 0.02)
        time.sleep(0.2)
        assert codes == []
        deadline = time.monotonic() + 10
        while not codes and time.monotonic() < deadline:
            time.sleep(0.02)
    assert codes == [1]


def test_first_steps_and_other_phases_may_be_slow(tmp_path):
    dog, codes = watched(tmp_path, QUICK)
    with dog:
        beats(dog, number=FEWEST - 2)
        time.sleep(0.9)
        beats(dog)
        dog.beat(6, "evaluation")
        time.sleep(0.9)
        dog.beat(7)
    assert codes == []


def test_a_checkpoint_may_wait_for_its_disk(tmp_path):
    dog, codes = watched(tmp_path, QUICK)
    with dog:
        beats(dog, phase="checkpoint")
        time.sleep(0.9)
    assert codes == []


def test_a_phase_is_measured_against_itself(tmp_path, capfd):
    dog, codes = watched(tmp_path, QUICK)
    with dog:
        beats(dog, phase="evaluation")
        time.sleep(0.9)
    assert codes == [1]
    assert "step 5 (evaluation) hangs" in capfd.readouterr().err


def test_nothing_is_watched_when_it_is_off(tmp_path):
    dog, codes = watched(tmp_path, FaultsConfig(hang_factor=0, hang_seconds=0.01))
    with dog:
        assert not dog._thread.is_alive()
    assert codes == []


def test_a_run_that_does_not_end_in_its_grace_time_is_ended(tmp_path, capfd):
    with StopRequest() as stop:
        dog, codes = watched(tmp_path, FaultsConfig(grace_seconds=0.3), stop)
        with dog:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.2)
            assert codes == []
            time.sleep(0.3)
    assert codes == [1]
    assert "SIGUSR1 came and the run did not end in faults.grace_seconds" in capfd.readouterr().err


def test_a_disk_that_hangs_does_not_keep_a_run_alive(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(watchdog, "REPORT_SECONDS", 0.2)
    monkeypatch.setattr(Watchdog, "_dump", lambda *_: time.sleep(0.9))
    dog, codes = watched(tmp_path, QUICK)
    with dog:
        beats(dog)
        time.sleep(1.0)
        assert codes == [1]
    assert "rank 0: step 5 hangs" in capfd.readouterr().err


class FrozenBoard:
    """The notes of a process that holds the store and does not run."""

    def __init__(self, _topic: str) -> None:
        pass

    def post(self, _rank: int, _note: str) -> None:
        pass

    def read(self, _rank: int) -> str | None:
        time.sleep(30)


def test_a_frozen_holder_of_the_store_is_named(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(watchdog, "Board", FrozenBoard)
    mesh, codes = SimpleNamespace(rank=2, size=4, ledger=Ledger()), []
    mesh.ledger.waiting = LABEL
    with Watchdog(QUICK, tmp_path, mesh, StopRequest(), codes.append) as dog:
        beats(dog)
        time.sleep(2.2)
    assert codes == [1]
    assert "rank 0 does not answer; rank 2 waits in gradients" in capfd.readouterr().err


def test_the_verdict_names_who_is_waited_for():
    waiting, busy = Note(7, "metrics", "a (a.py:1)"), Note(7, "", "load (b.py:2)")
    notes = {0: waiting, 1: waiting, 3: busy}
    assert verdict(notes, {0, 1, 2, 3}) == (
        "rank 2 does not answer; rank 3 is in no exchange but at step 7, load (b.py:2); "
        "ranks 0-1 wait in metrics of step 7"
    )
    others = {0: waiting, 1: Note(6, "metrics", "a"), 2: waiting}
    assert verdict(others, {0, 1, 2}) == (
        "rank 1 waits in metrics of step 6; ranks 0, 2 wait in metrics of step 7"
    )
    assert ranks([4]) == "rank 4"
    assert ranks([5, 0, 1, 2, 7]) == "ranks 0-2, 5, 7"


def _steps(rank: int, folder: Path, faulty: int, fail, exchange) -> None:
    sys.stderr = (folder / f"stderr-{rank}").open("w")
    ledger = Ledger()
    mesh = SimpleNamespace(rank=rank, size=3, ledger=ledger)
    group = ProcessGroup(dist.group.WORLD, ledger)
    with Watchdog(FaultsConfig(hang_factor=3, hang_seconds=1), folder, mesh, StopRequest()) as dog:
        for step in range(1, 12):
            dog.beat(step)
            if step == 9 and rank == faulty:
                fail()
            exchange(group)


def _sum(group: ProcessGroup) -> None:
    group.all_reduce(torch.ones(3), LABEL)


def _gather(group: ProcessGroup) -> None:
    group.all_gather(torch.ones(3), LABEL).wait()


def _foreign(_group: ProcessGroup) -> None:
    dist.barrier()


def _sleep() -> None:
    time.sleep(30)


def _freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize(
    ("exchange", "waits"),
    [(_sum, str(LABEL)), (_gather, str(LABEL)), (_foreign, "barrier of torch.distributed")],
)
def test_a_rank_that_sleeps_is_named_by_the_others(tmp_path, exchange, waits):
    started = time.monotonic()
    outcomes = fork_ranks(3, _steps, (tmp_path, 1, _sleep, exchange), timeout=20)
    assert time.monotonic() - started < 8
    assert all("exit code 1" in outcome.error for outcome in outcomes)
    told = (tmp_path / "stderr-0").read_text()
    assert told.startswith("longctx: step 9 hangs: ")
    assert "rank 1 is in no exchange but at step 9, _sleep (" in told
    assert f"ranks 0, 2 wait in {waits} of step 9; stacks in " in told
    assert [(tmp_path / f"stderr-{rank}").read_text() for rank in (1, 2)] == ["", ""]
    assert "rank 1 is in no exchange" in (tmp_path / "log.txt").read_text()
    for rank in range(3):
        assert "_steps" in (tmp_path / "hang" / f"rank-{rank}.txt").read_text()


def test_a_rank_that_is_frozen_is_named_by_the_others(tmp_path):
    outcomes = fork_ranks(3, _steps, (tmp_path, 2, _freeze, _sum), timeout=20, doomed=[2])
    assert [KILLED in outcome.error for outcome in outcomes] == [False, False, True]
    told = (tmp_path / "stderr-0").read_text()
    assert f"rank 2 does not answer; ranks 0-1 wait in {LABEL} of step 9" in told
