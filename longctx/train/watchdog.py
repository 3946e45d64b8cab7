"""A thread that ends a run whose step hangs, after saying which rank waits where."""

import contextlib
import faulthandler
import json
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from longctx.parallel import Mesh
from longctx.parallel.flight import Board, recorded_exchanges
from longctx.train.culprits import Note, verdict
from longctx.train.guard import FaultsConfig
from longctx.train.metrics import LOG_FILE
from longctx.train.signals import StopRequest

FEWEST = 5
"""Steps that must have been timed before one can be too slow."""
REMEMBERED = 128
LINGER_SECONDS = 1.0
"""How long the first process stays after its report: it may hold what the others still read."""
REPORT_SECONDS = 30.0
"""A report that takes longer, on a disk that hangs for example, is given up."""
UNHURRIED = ("checkpoint", "last checkpoint", "profile")
"""Phases that wait for a disk; checkpoints have a limit of their own for it."""
WAITS = {
    "torch/distributed/": "torch.distributed",
    "deepspeed/comm/": "DeepSpeed",
    "longctx/train/sums.py": "figures, for the device",
    "longctx/train/replicas.py": "digests, for the device",
}
"""What a thread waits for whose code lies there, without an exchange of ours."""


@dataclass(frozen=True)
class Doing:
    """What a process does since when."""

    step: int
    phase: str
    since: float


class Watchdog:
    """While this context is open, ends all processes if a step, or anything else that `beat`
    announces, takes much longer than it used to.

    Each process has one. All write their stacks and exchanges to `hang/rank-R.txt` in the run
    directory; the first one that can says in a line which rank the others wait for.
    """

    def __init__(
        self,
        config: FaultsConfig,
        folder: Path,
        mesh: Mesh,
        stop: StopRequest,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._config, self._folder, self._mesh, self._stop = config, folder, mesh, stop
        self._end = end
        self._board = Board("hang") if mesh.size > 1 else None
        self._doing = Doing(0, "start", time.monotonic())
        self._times: dict[str, deque[float]] = {}
        self._closed = threading.Event()
        self._watched = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._watched = threading.get_ident()
        if self._config.hang_factor or self._config.grace_seconds:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def beat(self, step: int, phase: str = "step") -> None:
        """Says what begins now, and so that what was announced before is done."""
        done, now = self._doing, time.monotonic()
        self._times.setdefault(done.phase, deque(maxlen=REMEMBERED)).append(now - done.since)
        self._doing = Doing(step, phase, now)

    def _watch(self) -> None:
        limits = (self._config.hang_seconds, self._config.grace_seconds or 10.0)
        while not self._closed.wait(max(0.01, min(1.0, *(limit / 10 for limit in limits)))):
            late, slow = self._too_late(), self._too_slow()
            if late or slow:
                self._give_up_after(REPORT_SECONDS, late or slow)
                self._report(late or slow, ask_others=not late)
                return

    def _too_late(self) -> str:
        stop, grace = self._stop, self._config.grace_seconds
        if not grace or not stop.requested or time.monotonic() - stop.since < grace:
            return ""
        return f"{stop.requested} came and the run did not end in faults.grace_seconds = {grace:g}"

    def _too_slow(self) -> str:
        doing, config = self._doing, self._config
        times = list(self._times.get(doing.phase, ()))
        if not config.hang_factor or len(times) < FEWEST or doing.phase in UNHURRIED:
            return ""
        median, took = statistics.median(times), time.monotonic() - doing.since
        if took <= max(config.hang_seconds, config.hang_factor * median):
            return ""
        what = "" if doing.phase == "step" else f" ({doing.phase})"
        return f"step {doing.step}{what} hangs: {took:.1f} s, median {median:.3g} s"

    def _report(self, what: str, ask_others: bool) -> None:
        mesh, note = self._mesh, self._note()
        notes, asked = {mesh.rank: note}, {mesh.rank}
        self._dump(what)
        if self._board and ask_others:
            asked |= self._ask(self._board, notes)
        self._tell(f"{what}; {verdict(notes, asked)}", is_speaker=mesh.rank == min(notes))
        if mesh.size > 1 and mesh.rank == 0:
            time.sleep(LINGER_SECONDS)
        self._end(1)

    def _note(self) -> Note:
        """What this process does now; a wait is an exchange of ours or of an engine."""
        frames = sys._current_frames()
        ours, label = frames.get(self._watched), self._mesh.ledger.waiting
        waits = str(label) if label else _exchange_of(ours)
        return Note(self._doing.step, waits, _place(ours))

    def _ask(self, board: Board, notes: dict[int, Note]) -> set[int]:
        """Adds the notes of others, who find the step slow about now as well, and says whose it
        asked for: if nothing can be asked, the process that holds the store is to blame."""
        seconds, size = max(1.0, min(10.0, self._config.hang_seconds / 4)), self._mesh.size
        others, answered, given_up = set(range(size)), threading.Event(), threading.Event()

        def exchange_notes() -> None:
            with contextlib.suppress(RuntimeError):
                board.post(self._mesh.rank, json.dumps(asdict(notes[self._mesh.rank])))
                while others - notes.keys() and not given_up.wait(0.05):
                    for rank in others - notes.keys():
                        if text := board.read(rank):
                            notes[rank] = Note(**json.loads(text))
                    answered.set()

        thread = threading.Thread(target=exchange_notes, daemon=True)
        thread.start()
        thread.join(seconds)
        given_up.set()
        return others if answered.is_set() else {0}

    def _dump(self, what: str) -> None:
        folder = self._folder / "hang"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"rank-{self._mesh.rank}.txt").open("w") as file:
                file.write(f"{what}\n{self._note()}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write(f"\nLast exchanges:\n{recorded_exchanges()}\n")
                file.flush()
                os.fsync(file.fileno())

    def _tell(self, line: str, is_speaker: bool) -> None:
        line = f"{line}; stacks in {self._folder / 'hang'}"
        with contextlib.suppress(OSError, ValueError):
            if is_speaker:
                sys.stderr.write(f"longctx: {line}\n")
            sys.stderr.flush()
            sys.stdout.flush()
        with contextlib.suppress(OSError):
            if is_speaker:
                with (self._folder / LOG_FILE).open("a") as log:
                    log.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {line}\n")

    def _give_up_after(self, seconds: float, what: str) -> None:
        def give_up() -> None:
            os.write(2, f"longctx: rank {self._mesh.rank}: {what}\n".encode())
            self._end(1)

        timer = threading.Timer(seconds, give_up)
        timer.daemon = True
        timer.start()


def _place(frame: FrameType | None) -> str:
    if frame is None:
        return "no Python code"
    return f"{frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})"


def _exchange_of(frame: FrameType | None) -> str:
    """The function of an engine's exchange, or of the device, that a thread waits in, or empty."""
    for part, owner in WAITS.items() if frame else ():
        if part in frame.f_code.co_filename:
            return f"{frame.f_code.co_name} of {owner}"
    return ""
