"""The Markdown report."""

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

DISTURBED = "Disturbed: other programs held the cores during most samples; run this again."


@dataclass(frozen=True)
class Section:
    """Paragraphs under a title, and the lines that judge its numbers."""

    title: str
    paragraphs: list[str]
    verdicts: list[str] = field(default_factory=list)

    @property
    def is_failed(self) -> bool:
        """Whether a target was missed."""
        return any(line.startswith("FAIL") for line in self.verdicts)

    @property
    def is_disturbed(self) -> bool:
        """Whether its numbers say little."""
        return DISTURBED in self.paragraphs

    def __str__(self) -> str:
        verdicts = ["\n".join(f"- {line}" for line in self.verdicts)] if self.verdicts else []
        return "\n\n".join([f"## {self.title}", *self.paragraphs, *verdicts])


def verdict(text: str, is_met: bool, is_judged: bool) -> str:
    """PASS or FAIL before the text; nothing is judged in a quick run."""
    if not is_judged:
        return f"not judged (quick): {text}"
    return f"{'PASS' if is_met else 'FAIL'}: {text}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: names to the left, numbers to the right."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def machine() -> str:
    """Where the numbers come from."""
    return (
        f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; "
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {version('transformers') or 'not installed'}."
    )


def version(package: str) -> str:
    """Version of an installed package, or ""."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown CPU"
