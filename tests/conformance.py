"""The full conformance matrix and its tables.

`python -m tests.conformance` runs every case on simulated ranks and writes
docs/results/conformance.md. `--table` writes the README's table of support, from declarations.
"""

import argparse
import multiprocessing
import platform
import re
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from longctx.sequence.placement import PLACEMENTS
from tests.sequence.conform import Result, run
from tests.sequence.matrix import (
    LENGTHS,
    STATED_LENGTH,
    Case,
    Setting,
    all_cases,
    all_settings,
    expected,
    family,
    settings_of,
    subjects,
    transport_of,
)
from tests.tolerances import LARGEST_ERROR

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "docs" / "results" / "conformance.md"
README = ROOT / "README.md"
MARKED = re.compile(r"(?<=<!-- conformance -->\n).*?(?=<!-- /conformance -->)", re.DOTALL)

Row = tuple[str, str, str]
"""Family, placement, transport."""


def row_of(subject: str, setting: Setting) -> Row:
    """Where a case is counted."""
    return family(subject), setting.placement, transport_of(subject, setting)


def refusals() -> dict[Row, list[str]]:
    """Every reason by row; rows that only other numbers of ranks can use are not refused."""
    found: dict[Row, Counter[str]] = {}
    for subject, layers in subjects().items():
        for setting in all_settings():
            reason = setting.refusal(layers)
            counts = found.setdefault(row_of(subject, setting), Counter())
            if reason and "does not divide" not in reason:
                counts[reason] += 1
    return {row: list(counts) for row, counts in found.items()}


def supported() -> dict[Row, tuple[str, Setting]]:
    """Of each row that has any, the first subject and its setting of most ranks."""
    found: dict[Row, tuple[str, Setting]] = {}
    for subject in subjects():
        for setting in sorted(settings_of(subject), key=lambda setting: -setting.ranks):
            found.setdefault(row_of(subject, setting), (subject, setting))
    return found


def received(subject: str, setting: Setting) -> str:
    """Largest number of bytes that a rank receives, forward and backward, in one row of tokens."""
    ledgers = expected(subject, setting, STATED_LENGTH, 1)
    most = [
        max(
            sum(traffic.received for label, traffic in ledger.items() if label.backward == backward)
            for ledger in ledgers
        )
        for backward in (False, True)
    ]
    return f"{most[0]:,} + {most[1]:,}"


def support_table() -> str:
    """Family x transport x placement, exact or refused because, with the reasons below."""
    can, reasons = supported(), refusals()
    notes: list[str] = []
    lines = [f"| layer | transport | {' | '.join(PLACEMENTS)} |", f"|---|---|{'---|' * len(PLACEMENTS)}"]
    for name, transport in dict.fromkeys((row[0], row[2]) for row in reasons):
        cells = []
        for placement in PLACEMENTS:
            row = (name, placement, transport)
            cell = "exact" if row in can else "refused"
            for reason in reasons[row][:1]:
                if reason not in notes:
                    notes.append(reason)
                cell += f" [{notes.index(reason) + 1}]" if cell == "refused" else f", or refused"
            cells.append(cell)
        lines.append(f"| {name} | {transport} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"[{i}] {note}." for i, note in enumerate(notes, 1)), ""])
