"""Times longctx on this CPU: the training step, every mixer, and peers.

`python kernels/bench/cpu.py` writes docs/results/cpu-bench.md. Nothing is timed unless all
correctness checks are green. The exit code is 1 if a check is red, a target is missed or the
machine was too busy to tell.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import checks
from delta_peer import compare_delta_peer
from layers import time_mixers
from peers import compare_peer
from report import DISTURBED, Section, machine
from routed_heads import compare_routed
from sizes import FULL, QUICK, Sizes
from training import time_training, tiny

from longctx.train.hardware import keep_freed_memory

COMPARISONS = (
    ("Routed heads", compare_routed),
    ("Peer", compare_peer),
    ("Peer", compare_delta_peer),
)
REPORT = Path(__file__).parents[2] / "docs" / "results" / "cpu-bench.md"


class RedError(Exception):
    """Something that was to be timed does not compute what its reference does."""


def main(argv: list[str] | None = None) -> int:
    """Runs everything; 0 if all is correct and every target is met."""
    arguments = _parser().parse_args(argv)
    sizes = QUICK if arguments.quick else FULL
    is_kept = not arguments.plain_malloc and keep_freed_memory()
    try:
        sections = list(_sections(sizes))
    except RedError as error:
        print(f"not timed: {error}", file=sys.stderr)
        return 1
    text = _report(sections, sys.argv[1:] if argv is None else argv, is_kept)
    print(text)
    is_disturbed = sizes.is_judged and any(section.is_disturbed for section in sections)
    out = arguments.out or (None if arguments.quick or is_disturbed else REPORT)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
        _say(f"Written to {out}")
    if is_disturbed:
        _say(f"{DISTURBED} {REPORT.name} was left alone.")
    return int(is_disturbed or any(section.is_failed for section in sections))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes; targets do not apply")
    parser.add_argument(
        "--plain-malloc", action="store_true", help="time with the allocator's own settings"
    )
    parser.add_argument(
        "--out", type=Path, help=f"report to write (default {REPORT.name}; none if quick)"
    )
    return parser


def _sections(sizes: Sizes) -> Iterator[Section]:
    settings = tiny(sizes)
    _say("Checking against the references, then timing: several minutes on an idle machine")
    yield _check(settings)
    _say("Training step")
    yield time_training(settings, sizes)
    _say("Mixers")
    yield time_mixers(sizes)
    for name, compare in COMPARISONS:
        _say(name)
        section, red = compare(sizes)
        if red:
            raise RedError(red)
        yield section


def _check(settings) -> Section:
    done = []
    for check in checks.run_checks(settings.model):
        if not check.is_green:
            allowed = f"(allowed {checks.TOLERANCE:.0e})"
            raise RedError(
                f"{check.name} differs from its reference by {check.error:.1e} {allowed}"
            )
        done.append(check)
    worst = max(check.error for check in done)
    text = (
        f"Before timing, {len(done)} comparisons with the references in fp64, outputs and all "
        f"gradients: largest difference {worst:.1e} (allowed {checks.TOLERANCE:.0e})."
    )
    return Section("Correctness", [text])


def _report(sections: list[Section], argv: list[str], is_kept: bool) -> str:
    command = shlex.join(["python", "kernels/bench/cpu.py", *argv])
    memory = (
        "glibc keeps freed memory (mallopt), as in `longctx train`, for us and for the peer; "
        "`--plain-malloc` times with the allocator's own settings."
        if is_kept
        else "The allocator has its own settings; page faults of large tensors are timed."
    )
    paragraphs = [
        "# CPU benchmark",
        f"Command: `{command}` (`make bench` runs it without options).",
        f"Machine: {machine()}",
        f"Memory: {memory}",
    ]
    return "\n\n".join([*paragraphs, *map(str, sections)]) + "\n"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
