"""Puts a page together and writes it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path

import longctx
from longctx.errors import InputError, OutsideError
from longctx.files import write_whole
from longctx.report.panels import (
    derive,
    loss_figure,
    metric_figures,
    other_figures,
    position_figure,
    router_figures,
)
from longctx.report.reading import Run, read_runs
from longctx.report.tables import cards, differences, environments, runs_table, warnings

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
"""Keeps a browser from asking anybody for anything."""
MOST_CARDS = 6


@dataclass(frozen=True)
class ReportConfig:
    """The options of `longctx report`."""

    output: str = "report.html"
    """The page that is written; one that exists is replaced."""


def write_report(paths: Sequence[str], config: ReportConfig) -> str:
    """Writes a page about the runs in these folders; a line on what was written."""
    if not paths:
        raise InputError("longctx report needs the folders of runs, such as runs/tiny")
    runs = read_runs(paths)
    page, output = render(runs).encode(), Path(config.output)
    try:
        write_whole(output, page, synced=False)
    except OSError as error:
        raise OutsideError(f"{output}: cannot write: {error.strerror}") from error
    count = f"{len(runs)} run" + ("s" if len(runs) > 1 else "")
    return f"{output}: {count}, {len(page) / 1e6:.2f} MB"


def render(runs: Sequence[Run]) -> str:
    """The page about these runs."""
    for run in runs:
        derive(run)
    curves = [position_figure(runs), *metric_figures(runs)]
    sections = {
        "Runs": (cards(runs) if len(runs) <= MOST_CARDS else "") + card(runs_table(runs)),
        "Curves": grid([loss_figure(runs), *curves]),
        "Routers": grid(router_figures(runs)),
        "Other metrics": grid(other_figures(runs)),
        "Config" if len(runs) == 1 else "Differences of config": card(differences(runs)),
        "Environment": card(environments(runs)),
        "Warnings": card(warnings(runs)),
    }
    names = ", ".join(run.name for run in runs)
    return assemble(names if len(names) < 80 else f"{len(runs)} runs", "report", sections)


def assemble(title: str, kind: str, sections: Mapping[str, str]) -> str:
    """A page of sections, of which the empty ones are left out."""
    shown = {title: body for title, body in sections.items() if body}
    links = "".join(f'<a href="#{_id(title)}">{title}</a>' for title in shown)
    body = "".join(
        f'<section id="{_id(title)}"><h2>{title}</h2>{body}</section>'
        for title, body in shown.items()
    )
    title = escape(title)
    here = files(__package__)
    style, script = ((here / name).read_text() for name in ("page.css", "page.js"))
    made = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{style}</style></head><body>"
        f'<header><h1>{title}</h1><p class="made">longctx {longctx.__version__} {kind}, {made}</p>'
        f'<nav>{links}<button id="theme" type="button" hidden>light / dark</button></nav></header>'
        f'<main>{body}</main><div id="tip" hidden></div><script>{script}</script></body></html>\n'
    )


def _id(title: str) -> str:
    return title.lower().replace(" ", "-")


def grid(figures: Sequence[str]) -> str:
    """Figures side by side."""
    drawn = "".join(figures)
    return f'<div class="grid">{drawn}</div>' if drawn else ""


def card(content: str) -> str:
    """A box around something."""
    return f'<div class="card">{content}</div>' if content else ""
