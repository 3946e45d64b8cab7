"""A rank that dies or hangs in an exchange ends the others, with a message that says where."""

import os
import re
import signal
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest

from longctx.sequence.ledger import Label, Ledger
from longctx.sequence.sharded import Transports
from tests.dist import KILLED, Outcome, fork_ranks
from tests.sequence.cases import LAYER, Setting, run_shard
from tests.sequence.links import gloo_links
from tests.sequence.mixer_cases import MIXER_CASES

pytestmark = pytest.mark.alone

RANKS = 3
FAULTY = 1
TIMEOUT = 2.0
"""Seconds that a rank waits for another."""
MARGIN = 6.0
"""Seconds to fork, connect, compute and end, on a busy machine."""
STEPS = 3
"""A rank that only sends may notice in a later step."""


class Fault(NamedTuple):
    """A mixer, how it exchanges, and the exchange in which the faulty rank fails."""

    mixer: str
    transports: Transports
    verb: str
    backward: bool = False

    def __str__(self) -> str:
        direction = "backward" if self.backward else "forward"
        transport = getattr(self.transports, self.verb, "")
        return "-".join(filter(None, (self.verb, str(transport), direction)))


class FaultyLedger(Ledger):
    """Fails as an exchange begins, when others may be in it already."""

    def __init__(self, fault: Fault, fail: Callable[[], None]):
        super().__init__()
        self._where, self._fail = Label(LAYER, fault.verb, fault.backward), fail

    def record(self, label: Label, received: int) -> None:
        if label == self._where:
            self._fail()
        super().record(label, received)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(600)


def train(rank: int, fault: Fault, fail: Callable[[], None]) -> None:
    ledger = FaultyLedger(fault, fail) if rank == FAULTY else Ledger()
    setting = Setting(RANKS, "contiguous", fault.transports)
    for _ in range(STEPS):
        links = gloo_links(fault.transports.heads, ledger, timeout_seconds=TIMEOUT)
        run_shard(MIXER_CASES[fault.mixer], setting, rank, links)


def assert_ended(outcomes: list[Outcome], fault: Fault) -> None:
    """Survivors say who, which layer and which verb; nobody runs any more."""
    for rank, outcome in enumerate(outcomes):
        with pytest.raises(ProcessLookupError):
            os.kill(outcome.pid, 0)
        if rank != FAULTY:
            message = rf"OutsideError: rank {rank}: {fault.verb} of layer {LAYER} \(\w+\) failed; "
            assert re.search(message + "a rank is gone or slower", outcome.error), outcome.error


DEADLY = [
    Fault("linear-lightning", Transports("allgather"), "prefix"),
    Fault("linear-lightning", Transports("scan"), "prefix", backward=True),
    Fault("linear-lightning", Transports("serial"), "prefix"),
    Fault("softmax-full", Transports(stream="ring"), "stream"),
    Fault("softmax-full", Transports(stream="allgather"), "stream", backward=True),
    Fault("softmax-window", Transports(), "halo"),
    Fault("moh-linear", Transports(), "reduce", backward=True),
]


@pytest.mark.parametrize("fault", DEADLY, ids=str)
def test_a_killed_rank_ends_the_others_at_once(fault: Fault):
    start = time.monotonic()
    outcomes = fork_ranks(RANKS, train, (fault, die), patience=MARGIN)
    assert time.monotonic() - start < MARGIN
    assert f"exit code -{signal.SIGKILL.value}" in outcomes[FAULTY].error
    assert_ended(outcomes, fault)


HUNG = [
    Fault("linear-lightning", Transports("scan"), "prefix"),
    Fault("softmax-full", Transports(stream="ring"), "stream", backward=True),
    Fault("softmax-full", Transports(stream="allgather"), "stream"),
]


@pytest.mark.parametrize("fault", HUNG, ids=str)
def test_a_rank_that_hangs_ends_the_others_within_the_timeout(fault: Fault):
    start = time.monotonic()
    outcomes = fork_ranks(RANKS, train, (fault, hang), patience=MARGIN, doomed=[FAULTY])
    assert TIMEOUT <= time.monotonic() - start < TIMEOUT + MARGIN
    assert KILLED in outcomes[FAULTY].error
    assert_ended(outcomes, fault)
