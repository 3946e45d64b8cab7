"""A plan as a picture: memory and time of the best ways, and what more processes change."""

import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

from longctx.errors import OutsideError
from longctx.plan.clusters import GIB
from longctx.plan.longest import longest_by_processes
from longctx.plan.prediction import Prediction
from longctx.plan.reasons import ALIKE, choice_of
from longctx.plan.search import Candidate, room_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_BARS = 7
MOST_OVER = 2.5
"""Times of the memory that there is, as far as bars go."""
COLOURS = (
    *("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5"),
    *("#9c6b4e", "#2f3e46", "#c9b458", "#7f1d4f"),
)
GREY = "#b5b5b5"


def draw(plan: Prediction, path: str) -> None:
    """Writes the picture; a warning on stderr instead without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        sys.stderr.write(f"warning: no {path}, because matplotlib is not installed\n")
        return
    shown = bars(plan)
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    memory, seconds, lengths = figure.subplots(1, 3, width_ratios=(4, 4, 2.4))
    _stack(memory, [_memory(each) for each in shown.values()], list(shown))
    limit = room_of(plan.cluster).device / GIB
    memory.axvline(limit, color="#b00020", linewidth=1.2)
    memory.set_xlim(right=min(memory.get_xlim()[1], MOST_OVER * limit))
    memory.set(title="memory of a process", xlabel=f"GiB; the line is what there is, {limit:.0f}")
    _stack(seconds, [_time(each) for each in shown.values()], [])
    seconds.set(title="time of a step", xlabel="seconds")
    if plan.longest:
        _lengths(lengths, plan)
    train = plan.settings.train
    figure.suptitle(
        f"{plan.settings.run.name}: {train.batch_size} x {train.seq_len:,} tokens a step on "
        f"{plan.processes} processes of {plan.cluster.name}, predicted"
    )
    try:
        Path(path).expanduser().parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(Path(path).expanduser(), dpi=110)
    except OSError as error:
        raise OutsideError(f"--picture {path}: cannot be written ({error.strerror})") from error


def bars(plan: Prediction) -> dict[str, Candidate]:
    """The ways that are drawn, by a name of two lines: as it is, the best, and runners-up."""
    ways: dict[str, Candidate] = {}
    if plan.asked:
        ways[f"as it is\n{_name(plan.asked)}"] = plan.asked
    if plan.best:
        ways[f"best\n{_name(plan.best)}"] = plan.best
    telling = [runner for runner in plan.runners if runner.why != ALIKE] or plan.runners
    for runner in telling[: MOST_BARS - len(ways)]:
        differs = ", ".join(f"{name} {value}" for name, value in runner.differs.items())
        ways.setdefault(f"but\n{shorten(differs, 36)}", runner.candidate)
    return ways


def _name(candidate: Candidate) -> str:
    choice = choice_of(candidate.work)
    return "{dp} x {sp} x {tp}, {checkpointing}".format_map(choice)


def _memory(candidate: Candidate) -> dict[str, float]:
    return {name: size / GIB for name, size in candidate.memory.parts.items() if size}


def _time(candidate: Candidate) -> dict[str, float]:
    time = candidate.time
    waiting = {f"waiting: {verb}": seconds for verb, seconds in time.exposed.items()}
    rest = {"making exchanges": time.calling, "update": time.optimizer, "fixed": time.fixed}
    return time.compute | waiting | rest


def _stack(axes: "Axes", stacks: Sequence[dict[str, float]], names: Sequence[str]) -> None:
    """Horizontal bars, the first on top; parts of under a hundredth of any bar are joined."""
    places = range(len(stacks) - 1, -1, -1)
    sums = [sum(stack.values()) for stack in stacks]
    parts = list(dict.fromkeys(part for stack in stacks for part in stack))
    large = [p for p in parts if any(s.get(p, 0) > 0.01 * t for s, t in zip(stacks, sums))]
    rest = [sum(v for p, v in stack.items() if p not in large) for stack in stacks]
    before = [0.0] * len(stacks)
    colours = dict(zip(large, (c for _ in range(4) for c in COLOURS)))
    rows = [(part, [s.get(part, 0.0) for s in stacks]) for part in large]
    for part, widths in [*rows, *([("other", rest)] if any(rest) else [])]:
        axes.barh(places, widths, left=before, label=part, color=colours.get(part, GREY))
        before = [a + b for a, b in zip(before, widths)]
    axes.set_yticks(list(places), names or [""] * len(stacks), fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)


def _lengths(axes: "Axes", plan: Prediction) -> None:
    """The longest sequence that fits on more and fewer processes, each of which takes a part."""
    ways = {found.where: found.work for found in plan.longest if found.work}
    for (name, work), colour in zip(ways.items(), COLOURS):
        lengths = longest_by_processes(work, plan.cluster)
        shown = list(lengths.items())
        axes.plot(*zip(*shown), marker="o", markersize=3, label=name, color=colour)
    axes.axhline(plan.settings.train.seq_len, color=GREY, linewidth=1, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value / 2**20:g}")
    axes.set(title="longest that fits", xlabel="processes", ylabel="1,048,576 tokens")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
