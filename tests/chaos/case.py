"""One run that is killed and resumed until it is finished or was killed often enough."""

import random
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from longctx.cli import main
from tests.chaos.attempts import Attempt, forked
from tests.chaos.run_files import (
    Reference,
    differences,
    newest_checkpoint,
    problems_at_the_end,
    read_rows,
    resumes,
)

STEPS, EVERY = 30, 3
MOST_STEPS = 12
"""How far an attempt may get before it is killed."""
SECONDS_TO_END = 240.0
SECONDS_UNTIL_NONE_IS_LEFT = 5.0
KINDS = ("rank", "launcher", "all")
OPTIONS = {
    "train.steps": STEPS,
    "train.seq_len": 64,
    "train.batch_size": 4,
    "model.width": 32,
    "optim.warmup_steps": 2,
    "eval.every": 10,
    "eval.sequences": 2,
    "checkpoint.every": EVERY,
    "parallel.timeout_seconds": 20,
}


@dataclass(frozen=True)
class Variant:
    """What is trained: a number of processes, and options of `longctx train`."""

    ranks: int
    options: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Variant":
        """From `RANKS [--table.key value ...]`."""
        ranks, *options = text.split()
        return cls(int(ranks), tuple(options))

    @property
    def name(self) -> str:
        """The text that it was parsed from."""
        return " ".join([str(self.ranks), *self.options])

    def words(self, run: Path, corpus: Path) -> list[str]:
        """The arguments of `longctx train`."""
        options = OPTIONS | {"run.dir": run, "data.path": corpus}
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        return ["tiny", *words, *self.options]


@dataclass
class Kill:
    """One kill and what came of it."""

    kind: str
    moment: str
    lost: int
    """Steps on the disk that the resumed run computes again."""
    seconds_to_end: float
    saving: bool = False
    """Whether it left a checkpoint half written."""


@dataclass
class Case:
    """A run of a variant, its kills, and what was wrong."""

    variant: Variant
    starter: str
    seed: int
    most_kills: int
    kills: list[Kill] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    attempts: int = 0
    startup: float = 1.0
    """Seconds until the first row, as far as known."""


@dataclass
class Plan:
    """When to kill: some time after the start, when there is a run directory, after a row of
    metrics, or after a save began."""

    moment: str
    step: int
    delay: float


def run_case(case: Case, folder: Path, corpus: Path, reference: Reference) -> Case:
    """Kills and resumes until the run is finished; fills in what happened."""
    rng = random.Random(case.seed)
    run, console = folder / f"run-{case.seed}", folder / f"console-{case.seed}.txt"
    words = case.variant.words(run, corpus)
    while not case.problems:
        before, resumed, halves = newest_checkpoint(run), len(resumes(run)), _half_written(run)
        attempt = Attempt(case.starter, case.variant.ranks, words, console)
        case.attempts += 1
        more = len(case.kills) < case.most_kills
        plan = _plan(rng, run, case) if more else None
        reached = _wait(attempt, plan, run, case)
        if attempt.code is None and not reached:
            case.problems.append(f"still running after {SECONDS_TO_END} s")
        _end(attempt, rng.choice(KINDS), reached and plan, run, case)
        if reached:
            case.kills[-1].saving = bool(_half_written(run) - halves)
        said = resumes(run)[resumed:]
        if said and said != [before]:
            case.problems.append(f"resumed at step {said}, not at {before}")
        if not reached:
            break
        case.problems += _check(case, run, words, reference, console)
    if not case.problems:
        case.problems += problems_at_the_end(run, reference)
    if not case.problems:
        shutil.rmtree(run)
    return case


def _plan(rng: random.Random, run: Path, case: Case) -> Plan | None:
    """A third of all kills wait for a save, one in seven comes at any time of the start."""
    last = len(read_rows(run)[0])
    if not run.exists() and rng.random() < 0.5:
        return Plan("birth", 0, rng.choice((0, rng.uniform(0, 0.01))))
    moment = rng.choices(("start", "step", "save"), (1, 3.7, 2.3))[0]
    if last >= STEPS:
        return Plan("start", 0, rng.uniform(0, case.startup + 1)) if rng.random() < 0.5 else None
    if moment == "start":
        return Plan(moment, 0, rng.uniform(0, case.startup))
    step = min(STEPS, last + rng.randint(1, MOST_STEPS))
    if moment == "save":
        return Plan(moment, step - 1, rng.choice((0, rng.uniform(0, 0.02))))
    return Plan(moment, step, rng.uniform(0, 0.06 if step < STEPS else 0.5))


def _wait(attempt: Attempt, plan: Plan | None, run: Path, case: Case) -> bool:
    """Waits until the moment of the plan; False if the training ended before it."""
    started = time.monotonic()
    rows_before = _size(run)
    due = started + plan.delay if plan and plan.moment == "start" else None
    seen_first = False
    while time.monotonic() < started + SECONDS_TO_END:
        if attempt.poll() is not None:
            return False
        if due is not None and time.monotonic() >= due:
            return True
        if due is None and not seen_first and _size(run) > rows_before:
            seen_first = True
            attempt.find_trainers()
            case.startup = time.monotonic() - started
        if due is None and plan and _has_come(plan, run):
            due = time.monotonic() + plan.delay
            continue
        time.sleep(0.02 if plan is None else 0.001)
    return False


def _size(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").stat().st_size
    except OSError:
        return 0


def _has_come(plan: Plan, run: Path) -> bool:
    if plan.moment == "birth":
        return run.exists()
    if plan.moment == "save":
        return any(_partial_step(path) > plan.step for path in _entries(run / "checkpoints"))
    return _size(run) > 0 and len(read_rows(run)[0]) >= plan.step


def _entries(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:
        return []


def _half_written(run: Path) -> set[tuple[str, int]]:
    """Checkpoints that are not complete, by name and inode."""
    found = (run / "checkpoints").glob(".partial-step-*")
    return {(path.name, path.stat().st_ino) for path in found}


def _partial_step(name: str) -> int:
    match = re.fullmatch(r"\.partial-step-(\d+)", name)
    return int(match[1]) if match else 0


def _end(attempt: Attempt, kind: str, plan: Plan | None, run: Path, case: Case) -> None:
    """Kills if a plan says so, and waits until no process is left."""
    started = time.monotonic()
    if plan:
        kind = attempt.kill(kind, random.Random(case.seed + case.attempts))
    patience = OPTIONS["parallel.timeout_seconds"] + 30
    while attempt.poll() is None and time.monotonic() < started + patience:
        time.sleep(0.01)
    if attempt.code is None:
        case.problems.append(f"the launcher still runs {patience} s after a kill of {kind}")
    ended = time.monotonic()
    while left := attempt.members():
        if time.monotonic() > ended + SECONDS_UNTIL_NONE_IS_LEFT:
            case.problems.append(f"{len(left)} processes left {kind=}: {left}")
            attempt.kill("all", random.Random(0))
            break
        time.sleep(0.02)
    if not plan:
        if attempt.code != 0:
            case.problems.append(f"attempt {case.attempts} ended with exit code {attempt.code}")
        return
    lost = len(read_rows(run)[0]) - newest_checkpoint(run)
    seconds = time.monotonic() - started
    case.kills.append(Kill(kind, plan.moment, max(0, lost), seconds))


def _check(
    case: Case, run: Path, words: list[str], reference: Reference, console: Path
) -> list[str]:
    """What is wrong with a run directory after a kill."""
    rows, found = read_rows(run)
    found += differences(rows, reference)
    in_flight = 1 if "--checkpoint.asynchronous false" in case.variant.name else 2
    if case.kills[-1].lost > EVERY * in_flight:
        found.append(f"{case.kills[-1].lost} steps since the last checkpoint")
    telling = console.with_suffix(".check")
    telling.unlink(missing_ok=True)
    config, *options = words
    code = forked(lambda: main(["check", config, str(case.variant.ranks), *options]), telling)
    said = telling.read_text().strip()
    step = newest_checkpoint(run)
    where = f"step-{step}" if step else "the beginning"
    if code or not said.endswith(where):
        found.append(f"longctx check, exit code {code}: {said or 'nothing'} (not {where})")
    return found
