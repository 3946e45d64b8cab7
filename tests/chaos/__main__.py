"""Kills trainings at random moments, resumes them, and checks that nothing was lost.

python -m tests.chaos --kills 200 --real 30 --out docs/results/chaos.md
"""

import argparse
import importlib
import itertools
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from longctx.cli import main as longctx
from tests.chaos.attempts import Attempt, forked
from tests.chaos.case import Case, Variant, run_case
from tests.chaos.report import report
from tests.chaos.run_files import Reference, read_reference

VARIANTS = (
    "1",
    "2 --parallel.sp 2",
    "2 --checkpoint.asynchronous false",
    "2 --parallel.sp 2 --parallel.engine none",
    "4 --parallel.sp 2",
    "4 --parallel.replicas 2",
    "4 --parallel.sp 4 --parallel.engine none --checkpoint.asynchronous false",
)
KILLS_OF_A_RUN = 6
SECONDS_TO_START = {"fork": 1.0, "torchrun": 8.0, "local": 12.0}


def write_corpus(folder: Path) -> Path:
    """Short texts."""
    folder.mkdir()
    for i in range(12):
        text = " ".join(f"{i} times {n} is {i * n};" for n in range(40))
        (folder / f"{i}.txt").write_text(text)
    return folder


def import_everything(folder: Path, corpus: Path) -> None:
    """Imports what a training imports, so that forked ones start at once."""
    words = Variant(1, ("--train.steps", "1")).words(folder / "first", corpus)
    names = folder / "modules.txt"

    def work() -> int:
        code = longctx(["train", *words])
        names.write_text("\n".join(sorted(sys.modules)))
        return code

    if forked(work, folder / "first.txt"):
        sys.exit((folder / "first.txt").read_text())
    for name in names.read_text().split():
        if name.split(".")[0] in ("longctx", "matplotlib", "PIL", "numpy", "torch", "rich"):
            importlib.import_module(name)


def reference_of(variant: Variant, folder: Path, corpus: Path) -> Reference:
    """What an uninterrupted run of the variant gives."""
    run = folder / f"reference-{variant.name.replace(' ', '_')}"
    console = folder / f"{run.name}.txt"
    attempt = Attempt("fork", variant.ranks, variant.words(run, corpus), console)
    while attempt.poll() is None:
        time.sleep(0.02)
    if attempt.code:
        sys.exit(f"{variant.name}: exit code {attempt.code}\n{console.read_text()}")
    return read_reference(run)


def plan_cases(variants: Sequence[Variant], kills: int, real: int, seed: int) -> Iterator[Case]:
    """Runs of all variants in turn; a third of the real starts are those of launch/local.sh."""
    several = [variant for variant in variants if variant.ranks > 1]
    shares = {"torchrun": real - real // 3, "local": real // 3, "fork": kills - real}
    numbers = itertools.count(seed * 10_000)
    for starter, share in shares.items():
        turns = itertools.cycle(variants if starter == "fork" else several)
        while share > 0:
            most = min(share, KILLS_OF_A_RUN)
            startup = SECONDS_TO_START[starter]
            yield Case(next(turns), starter, next(numbers), most, startup=startup)
            share -= most


def kill_loop(options: argparse.Namespace, folder: Path) -> list[Case]:
    """The cases of a loop, each of which was killed and resumed until it was finished."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    corpus = write_corpus(folder / "corpus")
    import_everything(folder, corpus)
    variants = [Variant.parse(text) for text in options.variant or VARIANTS]
    references = {v: reference_of(v, folder, corpus) for v in variants}
    done, missing, seed = [], options.kills, options.seed
    real = options.real
    while missing > 0:
        cases = plan_cases(variants, missing, min(real, missing), seed)
        run = partial(_run, folder=folder, corpus=corpus, references=references)
        with multiprocessing.get_context("fork").Pool(options.workers) as pool:
            for case in pool.imap_unordered(run, list(cases)):
                done.append(case)
                _tell(case)
        missing = options.kills - sum(len(case.kills) for case in done)
        real, seed = 0, seed + 1
        if any(case.problems for case in done):
            break
    return done


def _run(case: Case, folder: Path, corpus: Path, references: dict[Variant, Reference]) -> Case:
    return run_case(case, folder, corpus, references[case.variant])


def _tell(case: Case) -> None:
    kills = " ".join(f"{k.kind}@{k.moment}{'!' if k.saving else ''}:{k.lost}" for k in case.kills)
    verdict = "; ".join(case.problems) or "ok"
    print(f"{case.variant.name}, {case.starter}, seed {case.seed}: {kills}: {verdict}", flush=True)


def main() -> int:
    """Runs a loop, writes its table, and fails if anything was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--real", type=int, default=30, help="kills of really started runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--variant", action="append", help="RANKS [--table.key value ...]")
    parser.add_argument("--out", type=Path, help="file for the table")
    parser.add_argument("--folder", type=Path, help="where runs lie; failed ones stay")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        cases = kill_loop(options, folder)
    command = f"python -m tests.chaos {shlex.join(sys.argv[1:])}"
    text = report(cases, command, time.monotonic() - started)
    if options.out:
        options.out.write_text(text)
    print(text)
    return int(any(case.problems for case in cases))


if __name__ == "__main__":
    sys.exit(main())
