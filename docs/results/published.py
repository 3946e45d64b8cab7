"""Writes the tables of published.md and its picture: published, predicted, error, held out or not.

Half of the cells of a table, those whose row and column add up to an even number, fit at most two
constants; errors that count are those of the other half.
"""

import math
import statistics
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path

import numpy as np
import published_ladder
import published_models as models
from published_models import GIB, K

from longctx.plan.clusters import LinkConfig
from longctx.plan.events import Jitter, Program, simulate
from longctx.plan.programs import (
    Crew,
    Scheme,
    Sharded,
    Work,
    gather,
    local,
    ring,
    scan,
    serial,
    step,
)

HERE = Path(__file__).parent
DATA = tomllib.loads((HERE / "published.toml").read_text())


@dataclass(frozen=True)
class Cell:
    """One published number and how the model gets it from the constants."""

    labels: tuple[str, ...]
    published: float
    predict: Callable[..., float]
    fitted: bool


@dataclass(frozen=True)
class Table:
    """Cells that share at most two constants, with values to start a fit from."""

    title: str
    heads: tuple[str, ...]
    cells: tuple[Cell, ...]
    start: dict[str, float] = field(default_factory=dict)
    form: str = "{:,.0f}"

    @cached_property
    def constants(self) -> tuple[float, ...]:
        """The fitted ones, rounded as they are shown."""
        return fit([cell for cell in self.cells if cell.fitted], tuple(self.start.values()))

    @cached_property
    def values(self) -> dict[Cell, float]:
        """What the constants predict."""
        return {cell: cell.predict(*self.constants) for cell in self.cells}

    def predicted(self, cell: Cell) -> float:
        """With the constants."""
        return self.values[cell]

    def error(self, cell: Cell) -> float:
        """Relative; positive if too much is predicted."""
        return self.predicted(cell) / cell.published - 1

    def text(self) -> str:
        """The constants, every cell, and what the errors come to."""
        named = zip(self.start, self.constants)
        fitted = ", ".join(f"{name} {value:.4g}" for name, value in named)
        lines = [f"Fitted: {fitted or 'nothing'}.", ""]
        lines.append(f"| {' | '.join(self.heads)} | published | predicted | error | |")
        lines.append("|---" * len(self.heads) + "|---:|---:|---:|---|")
        for cell in self.cells:
            numbers = (self.form.format(n) for n in (cell.published, self.predicted(cell)))
            half = "fitted" if cell.fitted else "held out"
            shown = (*cell.labels, *numbers, f"{self.error(cell):+.1%}", half)
            lines.append(f"| {' | '.join(shown)} |")
        return "\n".join([*lines, "", self.summary()])

    def summary(self) -> str:
        """Median and worst error of the cells that no constant was fitted to."""
        sizes = sorted(abs(self.error(cell)) for cell in self.cells if not cell.fitted)
        return (
            f"Held out: {len(sizes)} cells, median error {statistics.median(sizes):.1%}, "
            f"worst {sizes[-1]:.1%}."
        )


def fit(cells: Sequence[Cell], start: tuple[float, ...]) -> tuple[float, ...]:
    """Constants with the least squares of log(predicted / published), by Gauss-Newton steps."""
    if not start:
        return ()

    def misses(logs: np.ndarray) -> np.ndarray:
        constants = np.exp(logs)
        return np.array([math.log(cell.predict(*constants) / cell.published) for cell in cells])

    logs = np.log(np.array(start))
    now = misses(logs)
    for _ in range(20):
        shifts = 0.01 * np.eye(len(logs))
        slopes = np.stack([(misses(logs + shift) - now) / 0.01 for shift in shifts], axis=1)
        change = np.linalg.lstsq(slopes, -now, rcond=None)[0]
        change /= max(1.0, np.abs(change).max())
        trials = (logs + 0.5**halvings * change for halvings in range(7))
        trial = next((t for t in trials if (misses(t) ** 2).sum() < (now**2).sum()), None)
        if trial is None or np.abs(trial - logs).max() < 1e-4:
            break
        logs, now = trial, misses(trial)
    return tuple(float(f"{value:.4g}") for value in np.exp(logs))


# The tables


@cache
def lasp2() -> Table:
    data = DATA["lasp2"]
    cells = []
    for i, length in enumerate(data["lengths_k"]):
        for j, gpus in enumerate(data["gpus"]):
            speed, tokens = data["tokens_per_second"][i][j], length * K

            def predict(fixed, rate, tokens=tokens, gpus=gpus):
                return tokens / models.lasp2_seconds(tokens, gpus, fixed, rate)

            if speed:
                labels = (f"{length}K", str(gpus))
                cells.append(Cell(labels, speed, predict, (i + j) % 2 == 0))
    start = {"fixed seconds": 1.5, "FLOP/s of a GPU": 1e14}
    return Table("LASP-2, tokens/s", ("tokens", "GPUs"), tuple(cells), start)


def without_fixed() -> str:
    """Held-out errors of what the fixed cost leaves, where that is a tenth of the step or more."""
    table, found = lasp2(), []
    fixed = table.constants[0]
    for cell in table.cells:
        tokens = int(cell.labels[0][:-1]) * K
        published, value = tokens / cell.published - fixed, tokens / table.predicted(cell) - fixed
        if not cell.fitted and published > 0.1 * tokens / cell.published:
            found.append(abs(value / published - 1))
    return (
        f"Of the time beyond the fixed seconds, where that is a tenth of the step or more "
        f"({len(found)} held-out cells): median error {statistics.median(found):.1%}, "
        f"worst {max(found):.1%}."
    )


@cache
def memory() -> Table:
    data = DATA["lasp2"]
    cells = [
        Cell((f"{size}K",), gb, partial(lambda n: models.lasp2_memory(n) / 1e9, size * K), False)
        for size, gb in zip(data["tokens_per_gpu_k"], data["memory_gb"])
    ]
    return Table("LASP-2, memory", ("tokens a GPU",), tuple(cells), form="{:.1f}")


def out_of_memory() -> str:
    """How often the memory model says rightly whether a cell fits."""
    data, limit, right, cells = DATA["lasp2"], models.cluster("dgx-a100").memory_gib * GIB, 0, 0
    for length, speeds in zip(data["lengths_k"], data["tokens_per_second"]):
        for gpus, speed in zip(data["gpus"], speeds):
            right += (models.lasp2_memory(length * K / gpus) < limit) == (speed > 0)
            cells += 1
    return f"Out of memory or not: right in {right} of {cells} cells."


@cache
def gains() -> Table:
    data, base = DATA["gains"], lasp2().constants

    def gain(seconds: float, tokens: int) -> float:
        return 100 * (seconds / models.lasp2_seconds(tokens, 64, *base) - 1)

    def lasp1(tokens: int, in_step: bool) -> float:
        return gain(models.lasp1_seconds(tokens, 64, base, in_step), tokens)

    def attention(tokens: int, at_peak: bool) -> float:
        return gain(models.ring_seconds(tokens, 64, base, at_peak), tokens)

    by_lasp1, by_ring = "over_lasp1_percent", "over_ring_percent"
    ways = [
        ("LASP-1, ranks wait only for their neighbours", by_lasp1, lasp1, False),
        ("LASP-1, all ranks in step after each layer", by_lasp1, lasp1, True),
        ("Ring, all queries times all keys", by_ring, attention, False),
        (
            "Ring, at least: causal half, peak rate, free links",
            "over_ring_percent",
            attention,
            True,
        ),
    ]
    cells = [
        Cell((f"{length}K", name), percent, partial(way, length * K, choice), False)
        for name, key, way, choice in ways
        for length, percent in zip(data["lengths_k"], data[key])
    ]
    heads = ("tokens", "gain of LASP-2 in % over")
    return Table("LASP-2 over LASP-1 and Ring", heads, tuple(cells), form="{:.1f}")


@cache
def collectives() -> Table:
    data, cells = DATA["zeco"], []
    for i, gpus in enumerate(data["collective_gpus"]):
        for j, way in enumerate(("all-gather", "all-scan")):
            published = data[way.replace("-", "_") + "_ms"][i]

            def predict(latency, bandwidth, way=way, gpus=gpus):
                return 1e3 * models.collective_seconds(way, gpus, latency, bandwidth)

            cells.append(Cell((str(gpus), way), published, predict, (i + j) % 2 == 0))
    start = {"latency": 1e-5, "bandwidth": 5e10}
    heads = ("GPUs", "collective")
    return Table("ZeCO, collectives, ms", heads, tuple(cells), start, "{:.3f}")


METHODS = ("LASP-1", "LASP-2", "ZeCO", "no SP")


def _of_methods(rows: list[int], numbers: list[list[float]], predict) -> tuple[Cell, ...]:
    link = LinkConfig(*collectives().constants)
    return tuple(
        Cell((str(gpus), method), number, partial(predict, method, gpus, link), (i + j) % 2 == 0)
        for i, (gpus, line) in enumerate(zip(rows, numbers))
        for j, (method, number) in enumerate(zip(METHODS, line))
        if number > 0
    )


@cache
def operators() -> Table:
    def milliseconds(*given) -> float:
        return 1e3 * models.operator_seconds(*given)

    data = DATA["zeco"]
    cells = _of_methods(data["operator_gpus"], data["operator_ms"], milliseconds)
    start = {"FLOP/s of a GPU": 2e13, "seconds LASP-1 and 2 add": 4e-3}
    return Table("ZeCO, operator, ms", ("GPUs", "method"), cells, start, "{:.2f}")


@cache
def speeds() -> Table:
    data = DATA["zeco"]
    numbers = data["tokens_per_second_per_gpu"]
    cells = _of_methods(data["model_gpus"], numbers, models.model_speed)
    start = {"FLOP/s of a GPU": 4e14, "seconds LASP-1 and 2 add": 1e-3}
    return Table("ZeCO, tokens/s a GPU", ("GPUs", "method"), cells, start)


@cache
def lengths() -> Table:
    cells = []
    for i, (*case, published) in enumerate(DATA["alst"]["cells"]):

        def predict(reserved, working, case=tuple(case)):
            return models.alst_longest(case, reserved, working)[0] / 1e3

        labels = (case[0], str(case[2]), case[1][2:].upper(), case[3] or "nothing")
        cells.append(Cell(labels, published, predict, i % 2 == 0))
    start = {"bytes never usable": 4e9, "times the working set": 1.0}
    heads = ("model", "GPUs", "of", "with")
    return Table("ALST, longest sequence, K", heads, tuple(cells), start)


def ladder() -> str:
    """The full ladder of the 8B model, for longctx."""
    rows = [row for row in DATA["alst"]["cells"] if row[:2] == ["8b", "8xh100"]]
    return published_ladder.table({row[2]: row[4] for row in rows if "mlp offload" in row[3]})


# What formulas cannot say


def delays() -> str:
    """Steps of 16 layers on 64 ranks, when computations and messages take now more, now less."""
    place = models.cluster("8xh100")
    crew = Crew(tuple(range(64)), place.processes_per_node)
    state = Work(4e-3, 1e-3, 1e-4, 3e-3, size=4.0 * models.GLA_1B.state)
    keys = 2 * 2.0 * 16 * K * 1024
    block = 1.2 * keys / place.links["fabric"].bandwidth
    blocks = replace(state, beside=64 * block, size=keys)
    sharded = Sharded(2.0 * (models.GLA_1B.qkv + models.GLA_1B.rest), 0.0)
    ways: dict[str, tuple[Scheme, Work, Sharded | None]] = {
        "none": (local, state, None),
        "none, weights sharded": (local, state, sharded),
        "serial (LASP-1)": (serial, state, None),
        "serial, weights sharded": (serial, state, sharded),
        "all-gather (LASP-2)": (gather, state, None),
        "scan, 8 blocks (ZeCO)": (partial(scan, blocks=8), state, None),
        "scan, weights sharded": (partial(scan, blocks=8), state, sharded),
        "ring of keys and values": (ring, blocks, None),
    }
    cases = (Jitter(), Jitter(0.1), Jitter(exchange=0.5), Jitter(slow={20: 1.2}))
    lines = [
        "| exchange | steady | computing ±10 % | messages ±50 % | rank 20 slower by 20 % |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, (scheme, work, weights) in ways.items():
        program = Program()
        step(program, crew, [(work, work)] * 16, scheme, weights)
        times = [simulate(program, place.links, case).seconds for case in cases]
        shown = [f"{times[0]:.3f} s", *(f"{t / times[0] - 1:+.1%}" for t in times[1:])]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


# The page


def summary() -> str:
    """A line a table; of ways that exclude one another, a line each."""
    parts = [(table.title, table, table.cells) for table in (lasp2(), memory())]
    for way in dict.fromkeys(cell.labels[1] for cell in gains().cells):
        cells = tuple(cell for cell in gains().cells if cell.labels[1] == way)
        parts.append((f"LASP-2's gain over {way}", gains(), cells))
    later = (collectives(), operators(), speeds(), lengths())
    parts += [(table.title, table, table.cells) for table in later]
    lines = [
        "| table | constants | held-out cells | median error | worst |",
        "|---|---:|---:|---:|---:|",
    ]
    for title, table, cells in parts:
        held = [cell for cell in cells if not cell.fitted]
        sizes = sorted(abs(table.error(cell)) for cell in held)
        figures = f"{len(sizes)} | {statistics.median(sizes):.1%} | {sizes[-1]:.1%}"
        lines.append(f"| {title} | {len(table.start)} | {figures} |")
    return "\n".join(lines)


SECTIONS: dict[str, Callable[[], str]] = {
    "summary": summary,
    "lasp2": lambda: f"{lasp2().text()} {without_fixed()}",
    "memory": lambda: f"{memory().text()} {out_of_memory()}",
    "gains": lambda: gains().text().rpartition("\n\n")[0],
    "collectives": lambda: collectives().text(),
    "operators": lambda: operators().text(),
    "speeds": lambda: speeds().text(),
    "lengths": lambda: lengths().text(),
    "ladder": ladder,
    "delays": delays,
}


def block(page: str, name: str) -> tuple[int, int]:
    """Where a section of the page starts and ends."""
    opening, closing = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
    start = page.index(opening) + len(opening)
    return start, page.index(closing, start - 1)


def picture(path: Path) -> None:
    """Predicted over published, each cell of each table."""
    from matplotlib.figure import Figure

    tables = (lasp2(), gains(), collectives(), operators(), speeds(), lengths())
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    for axes, table in zip(figure.subplots(2, 3).flat, tables):
        for fitted, face, name in ((True, "none", "fitted"), (False, "tab:blue", "held out")):
            cells = [cell for cell in table.cells if cell.fitted == fitted]
            x, y = [c.published for c in cells], [max(table.predicted(c), 0.1) for c in cells]
            if cells:
                axes.scatter(x, y, s=22, facecolor=face, edgecolor="tab:blue", label=name)
        ends = [min(c.published for c in table.cells), max(c.published for c in table.cells)]
        axes.plot(ends, ends, color="gray", linewidth=0.8)
        axes.set(xscale="log", yscale="log", title=table.title, xlabel="published")
    figure.axes[0].set_ylabel("predicted")
    figure.axes[3].set_ylabel("predicted")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=80)


def main(names: Sequence[str]) -> None:
    """Writes these sections, or all and the picture."""
    path = HERE / "published.md"
    page = path.read_text()
    for name in names or SECTIONS:
        start, end = block(page, name)
        page = page[:start] + SECTIONS[name]() + page[end:]
        sys.stderr.write(f"{name}\n")
    path.write_text(page)
    if not names:
        picture(HERE / "published.png")


if __name__ == "__main__":
    main(sys.argv[1:])
