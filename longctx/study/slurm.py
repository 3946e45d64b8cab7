"""Trains the cells of a study as jobs of SLURM: an array for each number of processes."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from longctx.errors import InputError, OutsideError
from longctx.files import write_whole
from longctx.launch.slurm import SlurmConfig, fill_in, set_options, submit
from longctx.study.design import Cell, Study
from longctx.study.locks import locked
from longctx.study.outcomes import FAILURES_FILE, Outcomes
from longctx.study.report import write_report
from longctx.study.results import JOBS_FILE, PAGE, write_results
from longctx.study.run import forgive_if_asked, said_before
from longctx.train.run_directory import CONFIG_FILE, write_config

QUEUE_SECONDS = 60
COLLECT = "#!/usr/bin/env bash\n#SBATCH --ntasks=1\nexec {command}\n"


def submit_study(study: Study, argv: Sequence[str], dry_run: bool = False) -> None:
    """Submits what is neither finished nor in the queue, and a job that gathers the results; or
    prints the scripts of the cells, and writes nothing."""
    if dry_run:
        groups = _groups(study, Outcomes(study, ""), cells_in_queue(study.config.path))
        sys.stdout.write("\n".join(_script(study, cells) for cells in groups.values()))
        if not groups:
            sys.stderr.write("every cell is finished, in the queue, or failed for good\n")
        return
    folder = study.config.path
    with locked(folder):
        outcomes = Outcomes(study, _line(argv, "--submit"))
        forgive_if_asked(study, outcomes)
        queued = cells_in_queue(folder)
        print(f"{len(study.cells)} cells{said_before(outcomes)}, {len(queued)} in the queue")
        groups = _groups(study, outcomes, queued)
        scripts = {count: _script(study, cells) for count, cells in groups.items()}
        jobs = []
        for count, cells in groups.items():
            for cell in cells:
                write_config(cell.settings)
            jobs.append(submit(scripts[count]))
            _record(folder, jobs[-1], cells)
            print(f"job {jobs[-1]}: {len(cells)} cells of {count} processes", flush=True)
            queued |= {cell.name for cell in cells}
        if jobs:
            _submit_collecting(study, argv, jobs)
        write_results(outcomes.results(queued), folder)


def collect_study(study: Study, argv: Sequence[str]) -> list[str]:
    """Writes the results that are there, also while jobs run; the cells that failed."""
    folder = study.config.path
    with locked(folder):
        outcomes, queued = Outcomes(study, _line(argv, "--collect")), cells_in_queue(folder)
        results = outcomes.results(queued)
        write_results(results, folder)
        write_report(results, folder)
    statuses = [row.status for row in results.rows]
    counts = ", ".join(f"{statuses.count(s)} {s}" for s in dict.fromkeys(statuses))
    print(f"{len(study.cells)} cells: {counts}; results in {folder}/{PAGE}", flush=True)
    return [row.name for row in results.rows if row.status == "failed"]


def cells_in_queue(folder: Path) -> set[str]:
    """Cells that wait or are trained in jobs of SLURM."""
    arrays = _jobs(folder)
    if not arrays:
        return set()
    words = ["squeue", "--noheader", "--array", "--format=%F_%K", "--user", str(os.getuid())]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=QUEUE_SECONDS)
    except FileNotFoundError:
        sys.stderr.write(
            f"warning: {folder / JOBS_FILE} names jobs of SLURM, but squeue is not here: they are "
            "taken as ended\n"
        )
        return set()
    except subprocess.TimeoutExpired:
        raise OutsideError(f"squeue did not answer within {QUEUE_SECONDS} s") from None
    if done.returncode:
        raise OutsideError(" ".join(done.stderr.split()) or f"squeue ended with {done.returncode}")
    there = set(done.stdout.split())
    return {
        cell
        for job, cells in arrays.items()
        for index, cell in enumerate(cells)
        if f"{job}_{index}" in there
    }


def _groups(study: Study, outcomes: Outcomes, queued: set[str]) -> dict[int, list[Cell]]:
    """Cells to submit by how many processes they need."""
    groups: dict[int, list[Cell]] = {}
    for cell in study.cells:
        if cell.name not in queued and outcomes.status(cell) in ("not run", "interrupted"):
            groups.setdefault(cell.processes, []).append(cell)
    return groups


def _script(study: Study, cells: Sequence[Cell]) -> str:
    """The script of an array of cells that need the same number of processes."""
    slurm, folder = study.config.slurm, study.config.path
    config = _shape(slurm, cells[0])
    config = replace(config, array=slurm.array or len(cells))
    if slurm.output == SlurmConfig.output:
        config = replace(config, output=f"{_no_pattern(folder)}/slurm-%A_%a.out")
    return fill_in(
        config,
        [str(cell.settings.run.path / CONFIG_FILE) for cell in cells],
        (),
        slurm.job_name or study.config.name,
        [str(cell.settings.run.path / FAILURES_FILE) for cell in cells],
    )


def _shape(slurm: SlurmConfig, cell: Cell) -> SlurmConfig:
    """Nodes and GPUs for the processes of a cell, within those of `[study.slurm]`."""
    wanted, here = cell.processes, slurm.processes
    nodes = max(1, wanted // here)
    if nodes > slurm.nodes or (wanted > here and wanted % here):
        raise InputError(
            f"cell {cell.name} needs {wanted} processes (parallel.dp x sp x tp), but study.slurm "
            f"has {slurm.nodes} nodes of {here}: change study.slurm.nodes or parallel, which takes "
            f"up to {here}, or a multiple of it"
        )
    each = min(wanted, here)
    gpus = min(each, slurm.gpus_per_node) if not slurm.processes_per_node else slurm.gpus_per_node
    return replace(slurm, nodes=nodes, gpus_per_node=gpus, processes_per_node=each)


def _submit_collecting(study: Study, argv: Sequence[str], jobs: Sequence[str]) -> None:
    """Submits a small job that waits for others and then gathers the results."""
    slurm, folder = study.config.slurm, study.config.path
    words = [sys.executable, "-m", *shlex.split(_line(argv, "--collect"))]
    options = {
        "job-name": f"{slurm.job_name or study.config.name}-results",
        "dependency": f"afterany:{':'.join(jobs)}",
        "time": "30",
        "output": f"{_no_pattern(folder)}/slurm-%j.out",
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
    }
    try:
        job = submit(set_options(COLLECT.format(command=shlex.join(words)), options))
    except OutsideError as error:
        sys.stderr.write(f"warning: no job gathers the results ({error}): {words[-1]} does\n")
    else:
        print(f"job {job}: gathers the results", flush=True)


def _line(argv: Sequence[str], mode: str) -> str:
    return shlex.join(["longctx", "study", *argv, mode])


def _no_pattern(folder: Path) -> str:
    """A folder in which SLURM finds no pattern such as %j."""
    return str(folder).replace("%", "%%")


def _jobs(folder: Path) -> dict[str, list[str]]:
    """Names of cells by the number of the array that trains them."""
    try:
        jobs = json.loads((folder / JOBS_FILE).read_text())
        return {job: [str(cell) for cell in cells] for job, cells in jobs.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise OutsideError(f"{folder / JOBS_FILE}: cannot read: {error}") from error


def _record(folder: Path, job: str, cells: Sequence[Cell]) -> None:
    """Writes down, before anything else, which cells a job trains."""
    jobs = _jobs(folder) | {job: [cell.name for cell in cells]}
    try:
        write_whole(folder / JOBS_FILE, json.dumps(jobs, indent=1).encode())
    except OSError as error:
        raise OutsideError(
            f"{folder / JOBS_FILE}: cannot write: {error.strerror}; job {job} is in the queue "
            "already: cancel it"
        ) from error
