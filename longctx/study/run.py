"""Trains the cells of a study, each in processes of its own, so that none can take others along."""

import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from longctx.errors import OutsideError
from longctx.launch.slurm import launch_file
from longctx.orphans import signal_when_parent_dies
from longctx.parallel.surroundings import VISIBLE_GPUS, visible_gpus
from longctx.report.reading import as_number
from longctx.study.design import Cell, Study
from longctx.study.gpus import Gpus
from longctx.study.locks import locked
from longctx.study.outcomes import ATTEMPTS, CONSOLE_FILE, Outcomes
from longctx.study.report import write_report
from longctx.study.results import CSV_FILE, PAGE, write_results
from longctx.train.run_directory import CONFIG_FILE, write_config
from longctx.train.signals import StopRequest

ENVIRONMENT = ("env", "OMP_NUM_THREADS=1")
TRAIN = (sys.executable, "-m", "longctx", "train")
POLL_SECONDS = 0.1


@dataclass
class Job:
    """A cell under way."""

    cell: Cell
    process: subprocess.Popen
    gpus: tuple[str, ...] = ()


class Runner:
    """Trains the cells that are not finished, and tells of each as it ends."""

    def __init__(self, study: Study, outcomes: Outcomes, lock: int):
        self._study, self._outcomes, self._lock = study, outcomes, lock
        self._running: list[Job] = []
        self._gpus = Gpus(visible_gpus())
        self._waiting = deque(
            cell for cell in study.cells if outcomes.status(cell) in ("not run", "interrupted")
        )
        self._to_train, self._trained, self._started = len(self._waiting), 0, time.monotonic()

    def run(self) -> str:
        """Trains until all is done or a signal comes; the name of that signal, or ""."""
        self._write()
        with StopRequest() as stop:
            while self._running or (self._waiting and not stop.requested):
                while self._waiting and not stop.requested and self._has_room(self._waiting[0]):
                    self._start(self._waiting.popleft())
                time.sleep(POLL_SECONDS)
                self._collect(stop)
        return stop.requested

    def _has_room(self, cell: Cell) -> bool:
        """Whether this many more processes may run; a cell that is too large runs alone."""
        busy = sum(job.cell.processes for job in self._running)
        return not busy or busy + cell.processes <= self._study.config.workers

    def _start(self, cell: Cell) -> None:
        write_config(cell.settings)
        folder, gpus = cell.settings.run.path, self._gpus.take(cell.processes)
        own = [f"{VISIBLE_GPUS}={','.join(gpus)}"] if gpus else []
        try:
            with (folder / CONSOLE_FILE).open("ab") as console:
                process = subprocess.Popen(
                    [*ENVIRONMENT, *own, *_command(cell)],
                    stdout=console,
                    stderr=subprocess.STDOUT,
                    pass_fds=[self._lock],
                    preexec_fn=partial(signal_when_parent_dies, signal.SIGTERM),
                )
        except OSError as error:
            raise OutsideError(f"{folder}: cannot start a cell: {error.strerror}") from error
        self._running.append(Job(cell, process, gpus))
        self._write()

    def _collect(self, stop: StopRequest) -> None:
        """Takes note of cells that ended; passes a signal on to the others."""
        for job in list(self._running):
            if job.process.poll() is not None:
                self._running.remove(job)
                self._gpus.give_back(job.gpus)
                self._note(job, bool(stop.requested))
            elif stop.requested:
                job.process.send_signal(signal.SIGTERM)

    def _note(self, job: Job, stopped: bool) -> None:
        cell, outcomes = job.cell, self._outcomes
        outcomes.look(cell)
        if summary := outcomes.summary(cell):
            self._trained += 1
            said = _figures(summary)
            if job.process.returncode:
                said += f" (it came to its end, and then {_reason(job)})"
        elif stopped:
            said = "interrupted; the same command goes on with it"
        else:
            reason = _reason(job)
            outcomes.note_failure(cell, reason)
            again = outcomes.status(cell) != "failed"
            said = f"{'tried again after it' if again else 'it'} failed ({reason})"
            if again:
                self._waiting.append(cell)
            else:
                self._to_train -= 1
        over = sum(outcomes.status(cell) in ("done", "failed") for cell in self._study.cells)
        print(f"[{over}/{len(self._study.cells)}] {cell.name}: {said}{self._left()}", flush=True)
        self._write()

    def _left(self) -> str:
        """How long the rest takes, if its cells are like those that were trained."""
        rest = self._to_train - self._trained
        if not (rest and self._trained):
            return ""
        seconds = (time.monotonic() - self._started) / self._trained * rest
        return f"; about {_duration(seconds)} left"

    def _write(self) -> None:
        running = {job.cell.name for job in self._running}
        write_results(self._outcomes.results(running), self._study.config.path)


def run_study(study: Study, command: str) -> tuple[str, list[str]]:
    """Trains what is not finished: the signal that ended it early or "", and cells that failed."""
    folder = study.config.path
    with locked(folder) as lock:
        outcomes = Outcomes(study, command)
        forgive_if_asked(study, outcomes)
        print(f"{len(study.cells)} cells{said_before(outcomes)}", flush=True)
        stopped_by = Runner(study, outcomes, lock).run()
        write_report(outcomes.results(), folder)
    print(f"results in {folder}/{PAGE} and {folder}/{CSV_FILE}", flush=True)
    return stopped_by, [cell.name for cell in outcomes.with_status("failed")]


def forgive_if_asked(study: Study, outcomes: Outcomes) -> None:
    """Gives cells that failed for good new attempts, with study.retry_failed."""
    for cell in outcomes.with_status("failed") if study.config.retry_failed else ():
        outcomes.forgive(cell)


def said_before(outcomes: Outcomes) -> str:
    """How many cells are finished, and how many failed for good, to go behind their number."""
    done, failed = (len(outcomes.with_status(status)) for status in ("done", "failed"))
    said = f", {done} of them finished before"
    if failed:
        said += f", {failed} failed {ATTEMPTS} times (--study.retry_failed true tries them again)"
    return said


def _command(cell: Cell) -> list[str]:
    """What trains a cell whose config is written; one process, or launch/local.sh for several."""
    config = str(cell.settings.run.path / CONFIG_FILE)
    if cell.processes == 1:
        return [*TRAIN, config]
    script = ["bash", str(launch_file("local.sh")), "-n", str(cell.processes), config]
    folder = str(Path(sys.executable).parent)
    return ["bash", "-c", 'PATH=$0:$PATH exec "$@"', folder, *script]


def _figures(summary: Mapping[str, Any]) -> str:
    """What a cell came to, as far as its summary tells numbers."""
    shown = (("accuracy", "val_accuracy", 3), ("loss", "val_loss", 4))
    told = [(name, as_number(summary.get(key)), digits) for name, key, digits in shown]
    return ", ".join(f"{n} {x:.{d}f}" for n, x, d in told if x is not None) or "no figures"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _reason(job: Job) -> str:
    """How a process ended, and the last line that it said."""
    code = job.process.returncode
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    console = job.cell.settings.run.path / CONSOLE_FILE
    try:
        lines = [line.strip() for line in console.read_text(errors="replace").splitlines()]
    except OSError as error:
        return f"{how}; {console}: {error.strerror}"
    last = next((line for line in reversed(lines) if line), "it said nothing")
    return f"{how}: {last}; all it said: {console}"
