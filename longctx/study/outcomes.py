"""What became of the cells, as their run directories tell it, wherever they were trained."""

from collections.abc import Collection, Sequence
from typing import Any

from longctx.errors import OutsideError
from longctx.report.reading import as_number
from longctx.study.axes import kind_of
from longctx.study.design import Cell, Study
from longctx.study.results import Results, Row
from longctx.train.run_directory import finished, write_config

ATTEMPTS = 2
"""How often a cell may fail."""
FAILURES_FILE = "failures.txt"
"""In a run directory: a line for each attempt that failed."""
CONSOLE_FILE = "console.txt"
"""In a run directory: all that its processes said, if `longctx study` started them itself."""
BEGUN = (CONSOLE_FILE, "metrics.jsonl")


class Outcomes:
    """What became of each cell; InputError if another run is in the place of one."""

    def __init__(self, study: Study, command: str):
        self._study, self._command = study, command
        self._summaries: dict[str, dict[str, Any]] = {}
        self._failures: dict[str, list[str]] = {}
        for cell in study.cells:
            self.look(cell)

    def look(self, cell: Cell) -> None:
        """Reads the run directory of a cell again."""
        self._summaries[cell.name] = finished(cell.settings) or {}
        file = cell.settings.run.path / FAILURES_FILE
        try:
            lines = file.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            lines = self._failures.get(cell.name, [])
        except OSError as error:
            raise OutsideError(f"{file}: cannot read: {error.strerror}") from error
        self._failures[cell.name] = lines

    def note_failure(self, cell: Cell, reason: str) -> None:
        """Counts an attempt that failed, so that also a later command knows of it; in a new run
        directory if somebody has taken that of the cell away."""
        file = cell.settings.run.path / FAILURES_FILE
        if not file.parent.exists():
            write_config(cell.settings)
        lines = [*([] if file.exists() else self._failures[cell.name]), " ".join(reason.split())]
        try:
            with file.open("a") as failures:
                failures.writelines(f"{line}\n" for line in lines)
        except OSError as error:
            raise OutsideError(f"{file}: cannot write: {error.strerror}") from error
        self.look(cell)

    def forgive(self, cell: Cell) -> None:
        """Forgets that attempts failed."""
        (cell.settings.run.path / FAILURES_FILE).unlink(missing_ok=True)
        self._failures[cell.name] = []
        self.look(cell)

    def status(self, cell: Cell) -> str:
        """done, failed, interrupted or not run."""
        if self._summaries[cell.name]:
            return "done"
        if len(self._failures[cell.name]) >= ATTEMPTS:
            return "failed"
        begun = (cell.settings.run.path / name for name in BEGUN)
        return "interrupted" if any(file.exists() for file in begun) else "not run"

    def summary(self, cell: Cell) -> dict[str, Any]:
        """The summary of a cell that is done."""
        return self._summaries[cell.name]

    def with_status(self, status: str) -> list[Cell]:
        """Cells of this status, in the order of the study."""
        return [cell for cell in self._study.cells if self.status(cell) == status]

    def results(self, running: Collection[str] = ()) -> Results:
        """All of it; these cells are being trained."""
        config = self._study.config
        statuses = {cell.name: self.status(cell) for cell in self._study.cells}
        for name in running:
            if statuses.get(name) != "done":
                statuses[name] = "running"
        best = self._best(statuses)
        return Results(
            name=config.name,
            command=self._command,
            axes=self._study.axes,
            rows=tuple(
                self._row(cell, statuses[cell.name], cell.name in best)
                for cell in self._study.cells
            ),
            over=config.best.over,
            by=config.best.by,
            plot=config.plot,
            group=config.group,
        )

    def _row(self, cell: Cell, status: str, is_best: bool) -> Row:
        failures = self._failures[cell.name]
        return Row(
            name=cell.name,
            values=cell.values,
            status=status,
            attempts=len(failures) + (status == "done"),
            error=failures[-1] if failures else "",
            is_best=is_best,
            processes=cell.processes,
            config=cell.config,
            summary=self._summaries[cell.name],
            run_dir=cell.settings.run.path,
        )

    def _best(self, statuses: dict[str, str]) -> set[str]:
        """Names of the best cells, where every cell that could be better is over. What is swept is
        judged by the mean over seeds, first of all by how many of them it brought to an end."""
        sweep = self._study.config.best
        if not sweep.over:
            return set()
        groups: dict[str, dict[str, list[Cell]]] = {}
        for cell in self._study.cells:
            rest = {axis: v for axis, v in cell.values.items() if axis not in sweep.over}
            apart = repr({axis: v for axis, v in rest.items() if kind_of(axis) != "seed"})
            swept = repr([cell.values[axis] for axis in sweep.over])
            groups.setdefault(apart, {}).setdefault(swept, []).append(cell)
        best = set()
        for choices in groups.values():
            cells = [cell for each in choices.values() for cell in each]
            if all(statuses[cell.name] in ("done", "failed") for cell in cells):
                best |= set(max(map(self._figures, choices.values()), key=self._rank))
        return best

    def _figures(self, cells: Sequence[Cell]) -> dict[str, float]:
        """By which each of these cells is better or worse, of those that have it."""
        name = self._study.config.best.by
        told = {cell.name: as_number(self._summaries[cell.name].get(name)) for cell in cells}
        return {cell: figure for cell, figure in told.items() if figure is not None}

    def _rank(self, figures: dict[str, float]) -> tuple[int, float]:
        """Larger for what is better."""
        mean = sum(figures.values()) / max(1, len(figures))
        return len(figures), -mean if self._study.config.best.by == "val_loss" else mean
