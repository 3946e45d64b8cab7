import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import pytest
import torch

from longctx.data import Batch, Prefetch
from longctx.errors import InputError

pytestmark = pytest.mark.alone
SEGMENTS = ((0, 2), (6, 8))


class Reader:
    """Batches that hold their ids; may fail, wait or take long."""

    def __init__(self, seconds: float = 0.0, bad: int = -1) -> None:
        self.seconds, self.bad = seconds, bad
        self.read_ids: list[int] = []
        self.threads: set[str] = set()

    def read(self, ids: Sequence[int], segments: Sequence[tuple[int, int]]) -> Batch:
        assert segments == SEGMENTS
        time.sleep(self.seconds)
        self.threads.add(threading.current_thread().name)
        self.read_ids += ids
        if self.bad in ids:
            raise InputError(f"sequence {self.bad} is bad")
        tokens = torch.tensor(ids)[:, None].expand(-1, 4)
        return Batch(tokens, tokens, ((0,),) * len(ids), tuple(ids))


def prefetch(reader: Reader, ahead: int, count: int = 20) -> Prefetch:
    return Prefetch(reader, ([n, n + 1] for n in range(0, 2 * count, 2)), SEGMENTS, ahead)


def eventually(condition) -> bool:
    ends = time.monotonic() + 5
    while not condition() and time.monotonic() < ends:
        time.sleep(0.002)
    return condition()


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_batches_come_in_the_order_of_the_schedule_until_its_end(ahead):
    reader = Reader()
    batches = prefetch(reader, ahead)
    assert [batch.sequence_ids for batch in batches] == [(n, n + 1) for n in range(0, 40, 2)]
    assert reader.read_ids == list(range(40))
    assert reader.threads == {"read ahead" if ahead else "MainThread"}
    with pytest.raises(StopIteration):
        batches.next()


@pytest.mark.parametrize("ahead", [1, 3])
def test_it_reads_so_many_ahead_and_no_more(ahead):
    reader = Reader()
    batches = prefetch(reader, ahead)
    for taken in range(5):
        assert eventually(lambda taken=taken: len(reader.read_ids) == 2 * (taken + ahead))
        time.sleep(0.02)
        assert len(reader.read_ids) == 2 * (taken + ahead)
        batches.next()
    batches.close()


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_error_comes_after_the_batches_before_it_and_again(ahead):
    batches = prefetch(Reader(bad=5), ahead)
    assert [batches.next().sequence_ids[0] for _ in range(2)] == [0, 2]
    with pytest.raises(InputError, match="sequence 5 is bad"):
        batches.next()
    if ahead:
        with pytest.raises(InputError, match="sequence 5 is bad"):
            batches.next()
        assert eventually(lambda: not batches._thread.is_alive())


def test_waiting_is_counted_and_reading_ahead_avoids_it():
    waits = []
    for ahead in (0, 2):
        batches = prefetch(Reader(seconds=0.02), ahead)
        batches.next()
        batches.take_waited()
        for _ in range(5):
            time.sleep(0.04)
            batches.next()
        waits.append(batches.take_waited())
        assert batches.take_waited() == 0
        batches.close()
    assert waits[0] >= 5 * 0.02
    assert waits[1] < waits[0] / 4


def test_closing_ends_the_thread_whether_it_waits_or_reads():
    for seconds in (0.0, 0.05):
        batches = prefetch(Reader(seconds), ahead=2)
        time.sleep(0.02)
        batches.close()
        assert not batches._thread.is_alive()
        with pytest.raises(ValueError, match="closed"):
            batches.next()


def test_closing_wakes_who_waits_for_a_batch():
    batches = prefetch(Reader(seconds=0.5), ahead=1)
    threading.Timer(0.05, batches.close).start()
    started = time.monotonic()
    with pytest.raises(ValueError, match="closed"):
        batches.next()
    assert time.monotonic() - started < 0.3


@pytest.mark.cluster
def test_a_process_that_fails_ends_at_once_without_closing():
    script = (
        "import itertools, time\n"
        "from longctx.data import Prefetch\n"
        "class Slow:\n"
        "    def read(self, ids, segments):\n"
        "        time.sleep(0.01 if ids[0] < 3 else 600)\n"
        "batches = Prefetch(Slow(), ([n] for n in itertools.count()), (), 2)\n"
        "batches.next()\n"
        "1 / 0\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=100)
    assert done.returncode == 1
    assert done.stderr.count(b"Traceback") == 1


def test_the_thread_sleeps_while_it_is_ahead():
    batches = prefetch(Reader(), ahead=2)
    assert eventually(lambda: len(batches._ready) == 2)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.02
    batches.close()
