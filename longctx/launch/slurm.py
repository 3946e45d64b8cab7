"""Fills in launch/slurm.sbatch and submits it: one job, a chain of jobs, or an array."""

import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from longctx.config import apply_overrides
from longctx.errors import InputError, OutsideError
from longctx.train.prepare import settle_mesh
from longctx.train.settings import Settings, load_settings

COMMAND = "longctx launch slurm"
SUBMIT_SECONDS = 300
TEMPLATE = "slurm.sbatch"


@dataclass(frozen=True)
class SlurmConfig:
    """Options of `longctx launch slurm`; an empty or zero one leaves it to the cluster."""

    nodes: int = 1
    """Nodes of a job."""
    gpus_per_node: int = 8
    """GPUs of each node; 0 asks for none and trains on CPUs."""
    processes_per_node: int = 0
    """Processes of each node; 0 means one for each GPU."""
    cpus_per_node: int = 0
    """Cores of each node; 0 takes whole nodes for the job alone."""
    time: str = "24:00:00"
    """Time limit, as days-hours:minutes:seconds; a job goes on in another one when it is up."""
    partition: str = ""
    """Partition to run in."""
    account: str = ""
    """Account that pays."""
    qos: str = ""
    """Quality of service."""
    job_name: str = ""
    """Name of the job; empty means run.name."""
    output: str = "%x-%j.out"
    """File of what it prints; %x is the name of the job and %j its number."""
    array: int = 0
    """With more than one CONFIG: train so many at a time, as an array; 0 makes them a chain."""
    env_file: str = ""
    """File of NAME=value lines for the environment of the job, such as secrets."""
    sbatch: tuple[str, ...] = ()
    """Other options of sbatch, such as constraint=h100 mail-type=END."""

    def __post_init__(self) -> None:
        for name in ("gpus_per_node", "processes_per_node", "cpus_per_node", "array"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name} = {getattr(self, name)}: must not be negative")
        if self.nodes < 1:
            raise InputError(f"--nodes = {self.nodes}: must be at least 1")
        if not self.processes:
            raise InputError("--gpus_per_node = 0: give --processes_per_node as well")
        if "/" in self.job_name:
            raise InputError(f"--job_name = {self.job_name!r}: must not hold a slash")
        if self.env_file and not Path(self.env_file).is_file():
            raise InputError(f"--env_file = '{self.env_file}': no such file")
        for option in self.sbatch:
            if not re.match(r"[a-z][a-z-]*(=|$)", option):
                raise InputError(f"--sbatch {option!r}: expected NAME=VALUE, such as nice=100")

    @property
    def processes(self) -> int:
        """Processes of each node."""
        return self.processes_per_node or self.gpus_per_node


def launch_slurm(argv: Sequence[str]) -> int:
    """Submits a job for each CONFIG, each after the one before it; prints the numbers of the jobs.

    `argv` is CONFIG... [--option value ...] [-- --table.key value ...]; with --dry-run, prints the
    scripts instead.
    """
    configs, options, overrides = _split(argv)
    dry_run = "--dry-run" in options
    config = apply_overrides(
        SlurmConfig(), [word for word in options if word != "--dry-run"], COMMAND
    )
    if not configs:
        raise InputError(f"{COMMAND} needs a config file or preset; try: {COMMAND} --help")
    settings = [_check(name, overrides, config) for name in configs]
    if twice := _twice([str(each.run.path) for each in settings]):
        raise InputError(f"two of these configs train into {twice}: give each its own run.dir")
    jobs = [tuple(configs)] if config.array else [(name,) for name in configs]
    scripts = [
        fill_in(config, job, overrides, config.job_name or each.run.name)
        for job, each in zip(jobs, settings)
    ]
    if dry_run:
        sys.stdout.write("\n".join(scripts))
    else:
        _submit_chain(scripts)
    return 0


def fill_in(
    config: SlurmConfig,
    names: Sequence[str],
    overrides: Sequence[str],
    job_name: str,
    failures: Sequence[str] = (),
) -> str:
    """The script of one job that trains these configs, of which an array has several.

    `failures` has a file for each config: there, a line says how an attempt failed, and after the
    first one the job goes back to the queue.
    """
    given = dict(_pair(option) for option in config.sbatch)
    own = {
        "job-name": job_name,
        "nodes": str(config.nodes),
        "gpus-per-node": str(config.gpus_per_node or ""),
        "cpus-per-task": str(config.cpus_per_node or ""),
        "time": config.time,
        "output": config.output,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "array": f"0-{len(names) - 1}%{config.array}" if config.array else "",
    }
    if both := sorted(given.keys() & own.keys()):
        raise InputError(f"--sbatch {both[0]}: is an option of {COMMAND} itself")
    shell = {
        "bin": _quote("bin", [str(Path(sys.executable).parent)]),
        "configs": f"({_quote('CONFIG', names)})",
        "options": f"({_quote('options', overrides)})",
        "failures": f"({_quote('study.dir', failures)})",
        "processes_per_node": str(config.processes),
        "env_file": _quote("--env_file", [config.env_file]) if config.env_file else "",
    }
    script = launch_file(TEMPLATE).read_text()
    for name, value in shell.items():
        script = _replace(script, rf"^{name}=.*$", f"{name}={value}")
    if config.cpus_per_node:
        script = _replace(script, r"^#SBATCH --exclusive\n", "")
    return set_options(script, own | given)


def set_options(script: str, wanted: Mapping[str, str | None]) -> str:
    """The script with these options of sbatch; "" removes one, None is one without a value."""
    for name, value in wanted.items():
        start = f"#SBATCH --{name}"
        # sbatch reads quotes as a shell does, but takes a backslash as an escape inside them too.
        quoted = _quote(start, [(value or "").replace("\\", "\\\\")])
        line = f"{start}\n" if value is None else f"{start}={quoted}\n" if value else ""
        if re.search(rf"^{start}=", script, re.MULTILINE):
            script = _replace(script, rf"^{start}=.*\n", line)
        else:
            last = script.rindex("\n#SBATCH ") + 1
            end = script.index("\n", last) + 1
            script = script[:end] + line + script[end:]
    return script


def _replace(script: str, pattern: str, line: str) -> str:
    replaced, count = re.subn(pattern, lambda _: line, script, flags=re.MULTILINE)
    assert count == 1, pattern
    return replaced


def _quote(name: str, words: Sequence[str]) -> str:
    """Words as a shell reads them back."""
    for word in words:
        if set(word) & set("\n\r\0"):
            raise InputError(f"{name}: {word!r} holds a line break")
    return shlex.join(words)


def _pair(option: str) -> tuple[str, str | None]:
    name, equals, value = option.partition("=")
    return name, value if equals else None


def _split(argv: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Configs, options of the launch, and what stands after `--`, for the trainings."""
    words, overrides = list(argv), []
    if "--" in words:
        cut = words.index("--")
        words, overrides = words[:cut], words[cut + 1 :]
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    options = [_with_underscores(word) for word in words[count:]]
    return words[:count], options, overrides


def _with_underscores(word: str) -> str:
    """An option as sbatch spells it, --gpus-per-node, as longctx does."""
    if not word.startswith("--") or word == "--dry-run":
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _check(name: str, overrides: Sequence[str], config: SlurmConfig) -> Settings:
    """The settings of a run, whose processes fit the nodes."""
    settings = apply_overrides(load_settings(name), overrides, "longctx train")
    processes = config.nodes * config.processes
    try:
        settle_mesh(settings, processes)
    except InputError as error:
        raise InputError(
            f"{name} on {config.nodes} x {config.processes} = {processes} processes: {error}"
        ) from None
    return settings


def _twice(words: Sequence[str]) -> str:
    return next((word for word in words if words.count(word) > 1), "")


def launch_file(name: str) -> Path:
    """A script inside the installed package, or in the launch folder of a source checkout."""
    package = Path(__file__).parent
    installed = package / "scripts" / name
    return installed if installed.exists() else package.parents[1] / "launch" / name


def _submit_chain(scripts: Sequence[str]) -> None:
    jobs: list[str] = []
    for script in scripts:
        after = [f"--dependency=afterok:{jobs[-1]}", "--kill-on-invalid-dep=yes"] if jobs else []
        try:
            jobs.append(submit(script, after))
        except OutsideError as error:
            sent = f"; in the queue already: {' '.join(jobs)}" if jobs else ""
            raise OutsideError(f"{error}{sent}") from error
        print(f"job {jobs[-1]}" + (f", after job {jobs[-2]}" if after else ""), flush=True)


def submit(script: str, options: Sequence[str] = ()) -> str:
    """Gives a script to sbatch; the number of its job."""
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", *options],
            input=script,
            capture_output=True,
            text=True,
            timeout=SUBMIT_SECONDS,
        )
    except FileNotFoundError:
        raise OutsideError(
            "sbatch is not here: run this where SLURM's commands are "
            "(longctx launch slurm --dry-run prints a script anywhere)"
        ) from None
    except subprocess.TimeoutExpired:
        raise OutsideError(f"sbatch did not answer within {SUBMIT_SECONDS} s") from None
    if done.returncode:
        raise OutsideError(" ".join(done.stderr.split()) or f"sbatch ended with {done.returncode}")
    return done.stdout.strip().partition(";")[0]
