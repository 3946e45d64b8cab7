"""The full conformance matrix and its tables.

`python -m tests.conformance` runs every case on simulated ranks and writes
docs/results/conformance.md. `--table` writes the README's table of support, from declarations.
"""

import argparse
import itertools
import multiprocessing
import platform
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from longctx.sequence.placement import PLACEMENTS
from tests.sequence.conform import Result, run
from tests.sequence.matrix import (
    DECODER,
    LENGTHS,
    STATED_LENGTH,
    Case,
    Setting,
    all_cases,
    all_settings,
    expected,
    family,
    stand_ins,
    subjects,
    transport_of,
)
from tests.tolerances import LARGEST_ERROR

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "docs" / "results" / "conformance.md"
README = ROOT / "README.md"
MARKED = re.compile(r"(?<=<!-- conformance -->\n).*?(?=<!-- /conformance -->)", re.DOTALL)
HEAD = """\
# Conformance of every mixer to one process

Made by `make conformance` (`python -m tests.conformance`), which replaces this page.

{cases:,} cases on simulated ranks, largest error {worst:.1e}, allowed {allowed:.0e}, {seconds:.0f}
seconds; torch {torch}, Python {python}, {machine}, {workers} processes of one thread.

A case is a forward and a backward pass in fp64 on every rank. Output, gradient of the input, losses
and the sum over ranks of each parameter's gradient are compared with one process; the error is the
largest over max(1, largest value). The ledger of every rank equals its formula, call by call and
byte by byte. Cases are all of

- layers: every variant in `tests/mixers/examples.py` and `tests/sequence/matrix.py`; `{model}` is a
  decoder of a linear, a windowed and a routed layer with dropout and router noise, from tokens to
  the loss and the gradients of all parameters
- 1, 2, 3 and 4 ranks; Ulysses groups (`heads`) of 1, 2, 3 and 4
- {lengths} tokens; windows grow with the length, and all but `softmax-window-1` hide and show
  between 10 and 90 % of pairs
- documents: one; packed, with boundaries in, at and next to cuts; documents of one token on both
  sides of cuts; documents that do not reach some ranks

without those settings that place and send exactly as another does. Bytes are what the rank that
receives most receives, forward + backward, in one sequence of {stated} tokens in fp64, for the
first such layer at the largest number of ranks.

| layer | transport | placement | result | largest error | cases | bytes received |
|---|---|---|---|---|---|---|"""

Row = tuple[str, str, str]
"""Family, transport, placement."""


@dataclass
class Support:
    """What can be split in one way: cases that show it, and why some settings are refused."""

    shown_by: set[tuple[str, Setting]] = field(default_factory=set)
    stated: tuple[str, Setting] | None = None
    """Of most ranks, the first subject and setting."""
    reasons: list[str] = field(default_factory=list)


def support() -> dict[Row, Support]:
    """Every row of the tables, from what layers declare."""
    rows: dict[Row, Support] = {}
    for subject, layers in subjects().items():
        for setting in all_settings():
            key = family(subject), transport_of(subject, setting), setting.placement
            row, same = rows.setdefault(key, Support()), stand_ins(subject).get(setting)
            if same is None:
                reason = setting.refusal(layers)
                if "does not divide" not in reason and reason not in row.reasons:
                    row.reasons.append(reason)
                continue
            row.shown_by.add((subject, same))
            if row.stated is None or row.stated[1].ranks < setting.ranks:
                row.stated = subject, setting
    return rows


Cell = tuple[bool, frozenset[str]]
"""Whether anything is exact, and the fields because of which something is refused."""


def support_table() -> str:
    """Layers and transport by placement: exact, or refused because of the reasons below.

    Transports with the same cells share a row, and layers with the same transports.
    """
    rows = support()
    reasons = {_field(r): r for row in rows.values() for r in row.reasons}
    by_name: dict[str, dict[str, tuple[Cell, ...]]] = {}
    for name, transport in dict.fromkeys(row[:2] for row in rows if row[0] != DECODER):
        found = [rows.get((name, transport, placement), Support()) for placement in PLACEMENTS]
        cells = tuple((bool(row.shown_by), frozenset(map(_field, row.reasons))) for row in found)
        by_name.setdefault(name, {})[transport] = cells
    numbers = {field: str(number) for number, field in enumerate(reasons, 1)}
    lines = [
        f"| layer | transport | {' | '.join(PLACEMENTS)} |",
        "|---|---|" + "---|" * len(PLACEMENTS),
    ]
    for names, transports in _grouped(by_name):
        for words, cells in transports:
            shown = (_cell(cell, numbers) for cell in cells)
            lines.append(f"| {names} | {words} | {' | '.join(shown)} |")
    lines += ["", "A number stands for settings that are refused when the model is built:", ""]
    lines += [f"{number}. {reason}" for number, reason in enumerate(reasons.values(), 1)]
    return "\n".join([*lines, ""])


def _grouped(
    by_name: dict[str, dict[str, tuple[Cell, ...]]],
) -> Iterator[tuple[str, list[tuple[str, tuple[Cell, ...]]]]]:
    """Names that have the same transports, exact for the same placements; reasons of all."""
    groups: dict[Any, list[str]] = {}
    for name, transports in by_name.items():
        shape = tuple((t, tuple(exact for exact, _ in cells)) for t, cells in transports.items())
        groups.setdefault(shape, []).append(name)
    for names in groups.values():
        merged: dict[tuple[str, tuple[Cell, ...]], list[str]] = {}
        for transport in by_name[names[0]]:
            columns = zip(*(by_name[name][transport] for name in names))
            cells = tuple((c[0][0], frozenset().union(*(r for _, r in c))) for c in columns)
            verb, _, way = transport.partition(" ")
            merged.setdefault((verb, cells), []).append(way)
        own = [(_ways(verb, ways), c) for (verb, c), ways in merged.items()]
        yield ("; " if any("," in name for name in names) else ", ").join(names), own


def _ways(verb: str, ways: list[str]) -> str:
    """A verb and how it travels; written out where one of the ways adds nothing to it."""
    if "" in ways:
        return ", ".join(f"{verb} {way}".strip() for way in ways)
    return f"{verb} {', '.join(ways)}"


def _cell(cell: Cell, numbers: dict[str, str]) -> str:
    is_exact, fields = cell
    text = "exact" if is_exact else "refused"
    return f"{text} [{', '.join(sorted(numbers[f] for f in fields))}]" if fields else text


def _field(reason: str) -> str:
    """The field that a reason begins with: what kind of reason it is."""
    return reason.split(" = ")[0]


def received(stated: tuple[str, Setting]) -> str:
    """Most bytes that a rank receives, forward + backward, in one row of tokens."""
    forward, backward = (
        max(
            sum(traffic.received for label, traffic in ledger.items() if label.backward is way)
            for ledger in expected(*stated, STATED_LENGTH, ((0,),))
        )
        for way in (False, True)
    )
    subject, setting = stated
    return f"{forward:,} + {backward:,} ({subject}, {setting.ranks} ranks)"


def run_group(cases: list[Case]) -> dict[Case, Result]:
    """Cases that share their references."""
    return {case: run(case) for case in cases}


def run_all(workers: int) -> dict[Case, Result]:
    """Every case, by processes side by side."""
    cases = all_cases()
    grouped = itertools.groupby(cases, lambda case: (case.subject, case.length, case.layout))
    groups = sorted((list(group) for _, group in grouped), key=lambda group: -group[0].length)
    results: dict[Case, Result] = {}
    with multiprocessing.get_context("fork").Pool(workers, torch.set_num_threads, (1,)) as pool:
        for found in pool.imap_unordered(run_group, groups):
            results |= found
            print(f"\r{len(results)} of {len(cases)} cases", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return results


def failures(results: dict[Case, Result]) -> list[str]:
    """A line for each case that is not exact."""
    found = []
    for case, result in results.items():
        if not result.error <= LARGEST_ERROR["fp64"]:
            found.append(f"{case}: error {result.error:.1e} in {result.worst}")
        if result.mismatch:
            found.append(f"{case}: {result.mismatch}")
    return found


def report(results: dict[Case, Result], seconds: float, workers: int) -> str:
    """The committed page."""
    errors: dict[tuple[str, Setting], list[float]] = {}
    for case, result in results.items():
        errors.setdefault((case.subject, case.setting), []).append(result.error)
    head = HEAD.format(
        cases=len(results),
        worst=max(result.error for result in results.values()),
        allowed=LARGEST_ERROR["fp64"],
        seconds=seconds,
        torch=torch.__version__,
        python=platform.python_version(),
        machine=platform.machine(),
        workers=workers,
        model=DECODER,
        lengths=", ".join(map(str, LENGTHS)),
        stated=STATED_LENGTH,
    )
    lines = [head]
    for row, found in support().items():
        cells = [*row, f"refused: {'; '.join(found.reasons)}", "", "", ""]
        if found.stated:
            own = [error for shown in found.shown_by for error in errors[shown]]
            cells[3:] = "exact", f"{max(own):.1e}", str(len(own)), received(found.stated)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="write the README's table only")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    options = parser.parse_args()
    if options.table:
        README.write_text(MARKED.sub(lambda _: support_table(), README.read_text()))
        return
    torch.set_num_threads(1)
    start = time.perf_counter()
    results = run_all(options.workers)
    if wrong := failures(results):
        sys.exit("\n".join(wrong))
    page = report(results, time.perf_counter() - start, options.workers)
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(page)
    print(f"{len(results)} cases exact; wrote {REPORT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
