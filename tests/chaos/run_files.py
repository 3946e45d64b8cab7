"""What a run directory must hold, however often its run was killed."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

LEFTOVERS = (".partial-*", ".replaced-*", ".removed-*")
Row = tuple[str, str]


@dataclass(frozen=True)
class Reference:
    """The uninterrupted run: loss and gradient norm of each step, and the validation loss."""

    rows: dict[int, Row]
    val_loss: str


def read_rows(run: Path) -> tuple[dict[int, Row], list[str]]:
    """Loss and gradient norm of each step, as hexadecimal digits; and what is wrong with them.

    A killed run may leave one torn line at the end.
    """
    file = run / "metrics.jsonl"
    lines = file.read_text().split("\n") if file.exists() else [""]
    rows: dict[int, Row] = {}
    for line in lines[:-1]:
        row = json.loads(line)
        if row["step"] != len(rows) + 1:
            return rows, [f"metrics.jsonl has step {row['step']} after step {len(rows)}"]
        rows[row["step"]] = (row["loss"].hex(), row["grad_norm"].hex())
    return rows, []


def read_reference(run: Path) -> Reference:
    """What other runs must be equal to."""
    summary = json.loads((run / "summary.json").read_text())
    return Reference(read_rows(run)[0], summary["val_loss"].hex())


def newest_checkpoint(run: Path) -> int:
    """The highest step with a checkpoint, 0 without any."""
    found = [re.fullmatch(r"step-(\d+)", path.name) for path in run.glob("checkpoints/*")]
    return max((int(match[1]) for match in found if match), default=0)


def resumes(run: Path) -> list[int]:
    """The steps at which this run says that it was resumed."""
    file = run / "log.txt"
    text = file.read_text() if file.exists() else ""
    return [int(step) for step in re.findall(r"resumed at step (\d+)", text)]


def differences(rows: dict[int, Row], reference: Reference) -> list[str]:
    """The first step that differs from the uninterrupted run."""
    for step, row in rows.items():
        if row != reference.rows.get(step):
            return [f"step {step}: {row} instead of {reference.rows.get(step)}"]
    return []


def problems_at_the_end(run: Path, reference: Reference) -> list[str]:
    """What is wrong with a run that says that it is finished."""
    rows, found = read_rows(run)
    found += differences(rows, reference)
    if len(rows) != len(reference.rows):
        found.append(f"{len(rows)} steps instead of {len(reference.rows)}")
    if newest_checkpoint(run) != len(reference.rows):
        found.append(f"the newest checkpoint is of step {newest_checkpoint(run)}")
    summary = run / "summary.json"
    if not summary.exists():
        return [*found, "no summary.json"]
    val_loss = json.loads(summary.read_text())["val_loss"].hex()
    if val_loss != reference.val_loss:
        found.append(f"validation loss {val_loss} instead of {reference.val_loss}")
    left = [path.name for pattern in LEFTOVERS for path in run.rglob(pattern)]
    return found + ([f"left behind: {', '.join(sorted(left))}"] if left else [])
