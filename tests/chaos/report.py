"""The table of a kill loop."""

import platform
import statistics
from collections.abc import Sequence
from itertools import groupby

import torch

from tests.chaos.case import EVERY, STEPS, Case, Kill

HEAD = (
    "options of `longctx train`, started by",
    "runs",
    "kills",
    "of a rank",
    "of the launcher",
    "of all",
    "at the start",
    "mid-save",
    "steps computed again, mean",
    "most",
    "seconds until none was left, most",
    "failures",
)


def report(cases: Sequence[Case], command: str, seconds: float) -> str:
    """The results as Markdown."""
    cases = sorted(cases, key=_group)
    kills = [kill for case in cases for kill in case.kills]
    failed = [case for case in cases if case.problems]
    rows = [_row(*key, list(group)) for key, group in groupby(cases, _group)]
    total = ["all", *_figures(cases)]
    lines = [
        "# Runs that are killed and resumed",
        "",
        f"    {command}",
        "",
        f"{len(kills)} kills (SIGKILL) of {len(cases)} runs, {len(failed)} failures, in "
        f"{seconds / 60:.0f} minutes on {platform.machine()}, torch {torch.__version__}, gloo.",
        f"A run is {STEPS} steps with a checkpoint every {EVERY}; it is killed at seeded random",
        "moments (after a random step, in a save, at any time of the start) and resumed with the",
        "same command until it is finished. Each kill is followed by checks:",
        "",
        "- no process is left 5 seconds after the launcher ended;",
        "- `metrics.jsonl` holds each step once, in order, with the loss and gradient norm of the",
        "  uninterrupted run, bit for bit, also those computed again;",
        "- `longctx check` names the newest checkpoint, and the run is resumed from it;",
        f"- no more steps are computed again than {EVERY}, or {2 * EVERY} with a save under way.",
        "",
        "A finished run must have the uninterrupted run's validation loss, bit for bit, and",
        "nothing half written in its directory. Mid-save kills left a half-written checkpoint.",
        "`fork` starts ranks from a process that has imported everything; `torchrun` and `local`",
        "(`launch/local.sh`) are real starts.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|---|" + "---:|" * (len(HEAD) - 1),
        *("| " + " | ".join(row) + " |" for row in [*rows, total]),
    ]
    for case in failed:
        lines += ["", f"{case.variant.name}, {case.starter}, seed {case.seed}:", ""]
        lines += [f"    {problem}" for problem in case.problems]
    return "\n".join(lines) + "\n"


def _group(case: Case) -> tuple[str, str]:
    return case.variant.name, case.starter


def _row(name: str, starter: str, cases: list[Case]) -> list[str]:
    return [f"{name}, {starter}", *_figures(cases)]


def _figures(cases: Sequence[Case]) -> list[str]:
    kills = [kill for case in cases for kill in case.kills]
    lost = [kill.lost for kill in kills] or [0]
    counts = (
        len(cases),
        len(kills),
        *(_count(kills, kind=kind) for kind in ("rank", "launcher", "all")),
        _count(kills, moment="start") + _count(kills, moment="birth"),
        _count(kills, saving=True),
    )
    return [
        *map(str, counts),
        f"{statistics.mean(lost):.1f}",
        str(max(lost)),
        f"{max((kill.seconds_to_end for kill in kills), default=0):.1f}",
        str(sum(bool(case.problems) for case in cases)),
    ]


def _count(kills: Sequence[Kill], **wanted: object) -> int:
    return sum(all(getattr(kill, k) == v for k, v in wanted.items()) for kill in kills)
