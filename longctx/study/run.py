"""Trains the cells of a study, each in a process of its own, so that none can take others along."""

import signal
import subprocess
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from longctx.errors import OutsideError
from longctx.orphans import signal_when_parent_dies
from longctx.study.design import Cell, Study
from longctx.study.report import Result, write_results
from longctx.train.run_directory import CONFIG_FILE, finished, write_config
from longctx.train.signals import StopRequest

TRAIN = ("env", "OMP_NUM_THREADS=1", sys.executable, "-m", "longctx", "train")
ATTEMPTS = 2
POLL_SECONDS = 0.1
CONSOLE_FILE = "console.txt"


@dataclass
class Job:
    """A cell under way."""

    cell: Cell
    process: subprocess.Popen


@dataclass
class Runner:
    """Which cells wait, run, are done or failed; done ones have a summary."""

    study: Study
    waiting: deque[Cell] = field(default_factory=deque)
    running: list[Job] = field(default_factory=list)
    attempts: Counter[str] = field(default_factory=Counter)
    results: dict[str, Result] = field(default_factory=dict)

    def run(self) -> str:
        """Trains what is not finished; the signal that ended this early, or ""."""
        for cell in self.study.cells:
            summary = finished(cell.settings)
            self.results[cell.name] = Result("done" if summary else "not run", summary or {})
            if summary is None:
                self.waiting.append(cell)
        done = len(self.study.cells) - len(self.waiting)
        print(f"{len(self.study.cells)} cells, {done} of them finished before", flush=True)
        with StopRequest() as stop:
            while self.running or (self.waiting and not stop.requested):
                free = self.study.config.workers - len(self.running)
                for _ in range(0 if stop.requested else min(free, len(self.waiting))):
                    self._start(self.waiting.popleft())
                time.sleep(POLL_SECONDS)
                self._collect(stop)
        write_results(self.study, self.results)
        return stop.requested

    @property
    def failed(self) -> list[str]:
        """Cells that failed in every attempt."""
        return [name for name, result in self.results.items() if result.status == "failed"]

    def _start(self, cell: Cell) -> None:
        write_config(cell.settings)
        folder = cell.settings.run.path
        self.attempts[cell.name] += 1
        try:
            with (folder / CONSOLE_FILE).open("ab") as console:
                process = subprocess.Popen(
                    [*TRAIN, str(folder / CONFIG_FILE)],
                    stdout=console,
                    stderr=subprocess.STDOUT,
                    preexec_fn=partial(signal_when_parent_dies, signal.SIGTERM),
                )
        except OSError as error:
            raise OutsideError(f"{folder}: cannot start a cell: {error.strerror}") from error
        self.running.append(Job(cell, process))

    def _collect(self, stop: StopRequest) -> None:
        """Takes note of cells that ended; passes a signal on to the others."""
        for job in list(self.running):
            if job.process.poll() is not None:
                self.running.remove(job)
                self._note(job, bool(stop.requested))
            elif stop.requested:
                job.process.send_signal(signal.SIGTERM)

    def _note(self, job: Job, stopped: bool) -> None:
        cell, code = job.cell, job.process.returncode
        name, summary = cell.name, finished(cell.settings)
        if code == 0 and summary:
            self.results[name] = Result("done", summary)
            said = f"accuracy {summary['val_accuracy']:.3f}, loss {summary['val_loss']:.4f}"
        elif stopped:
            self.results[name] = Result("interrupted", {})
            said = "interrupted; the same command goes on with it"
        else:
            again = self.attempts[name] < ATTEMPTS
            self.results[name] = Result("not run" if again else "failed", {})
            said = f"{'tried again after it' if again else 'it'} failed ({_reason(job)})"
            if again:
                self.waiting.append(cell)
        over = sum(result.status in ("done", "failed") for result in self.results.values())
        print(f"[{over}/{len(self.results)}] {name}: {said}", flush=True)
        write_results(self.study, self.results, draw=False)


def _reason(job: Job) -> str:
    """How a process ended, and the last line that it said."""
    code = job.process.returncode
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    console = job.cell.settings.run.path / CONSOLE_FILE
    lines = console.read_text(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    return f"{how}: {last}; all it said: {console}"


def run_study(study: Study) -> tuple[str, list[str]]:
    """The signal that ended it early or "", and the cells that failed."""
    runner = Runner(study)
    stopped_by = runner.run()
    folder: Path = study.config.path
    print(f"results in {folder}/study.csv and {folder}/study.png", flush=True)
    return stopped_by, runner.failed
