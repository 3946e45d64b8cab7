"""What a check finds, and running checks so that none of them ends or holds up the command."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

Level = Literal["ok", "note", "warning", "problem"]
LEVELS: tuple[Level, ...] = ("ok", "note", "warning", "problem")
CHECK_SECONDS = 20.0


class Finding(NamedTuple):
    """One line: what is there, and what that allows or forbids."""

    level: Level
    """A note forbids something that many do without; a warning costs speed or safety; a problem
    keeps a run from working."""
    found: str
    meaning: str
    group: str = ""
    """What kind of thing it is about: the name of its checks."""

    def __str__(self) -> str:
        return f"{self.found}: {self.meaning}"


Check = Callable[[], list[Finding]]


def run_checks(
    groups: Mapping[str, Sequence[Check]], seconds: float = CHECK_SECONDS
) -> list[Finding]:
    """What all of them find, in order; one that fails or takes too long is a finding itself."""
    return [
        finding._replace(group=group)
        for group, checks in groups.items()
        for check in checks
        for finding in _run(check, seconds)
    ]


def _run(check: Check, seconds: float) -> list[Finding]:
    name = getattr(getattr(check, "func", check), "__name__", str(check))
    found: list[Finding] = []

    def work() -> None:
        try:
            found.extend(check())
        except Exception as error:
            reason = " ".join(str(error).split())
            found[:] = [
                Finding("warning", f"check {name}", f"failed ({type(error).__name__}: {reason})")
            ]

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return [Finding("warning", f"check {name}", f"no answer within {seconds:g} s")]
    return found


def as_text(findings: Sequence[Finding], title: str) -> str:
    """A page for a terminal: a line each, below the name of their group."""
    lines, group = [title], ""
    for finding in findings:
        if finding.group != group:
            group = finding.group
            lines += ["", group]
        lines.append(f"  {finding.level:8} {finding}")
    counts = {level: sum(f.level == level for f in findings) for level in LEVELS[1:]}
    told = ", ".join(f"{n} {level}{'s' * (n != 1)}" for level, n in counts.items() if n)
    return "\n".join([*lines, "", told or "all fine", ""])


def as_record(findings: Sequence[Finding]) -> dict[str, object]:
    """The same for programs."""
    worst = max((LEVELS.index(finding.level) for finding in findings), default=0)
    return {"worst": LEVELS[worst], "findings": [finding._asdict() for finding in findings]}


def exit_code(findings: Sequence[Finding]) -> int:
    """1 if anything keeps a run from working."""
    return int(any(finding.level == "problem" for finding in findings))
