"""The command line: one function a subcommand, and one place where errors become exit codes."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import longctx
from longctx.errors import InputError, OutsideError
from longctx.orphans import die_with_parent

if TYPE_CHECKING:
    from longctx.train.settings import Settings
    from longctx.train.signals import StopRequest

STOPPED = 75
"""Exit code of a run that a signal stopped after it saved: run the same command again."""


def train(argv: list[str]) -> int:
    """CONFIG [--table.key value ...]: train, or resume, the run that a config file describes"""
    from longctx.train.signals import StopRequest

    with StopRequest() as stop:  # before what is slow to import
        from longctx.config import apply_overrides, to_toml
        from longctx.train.settings import load_settings

        name, options = _first_argument(argv, "train", "a config file or preset", default="tiny")
        only_print = "--print-config" in options
        options = [word for word in options if word != "--print-config"]
        settings = apply_overrides(load_settings(name), options, "longctx train")
        if only_print:
            sys.stdout.write(to_toml(settings))
            return 0
        return _train(settings, stop)


def _train(settings: "Settings", stop: "StopRequest") -> int:
    from longctx.checkpoint import latest
    from longctx.parallel.mesh import has_joined, is_first_here, processes_here, world_size
    from longctx.parallel.stopping import tell_launcher
    from longctx.plan.automatic import settle_memory
    from longctx.train.mirror import is_stuck
    from longctx.train.trainer import train as run

    try:
        code, settings = 0, settle_memory(settings, world_size(), processes_here())
        if run(settings, stop) and not tell_launcher(str(latest(settings.checkpoints))):
            code = STOPPED
    except InputError as error:
        if not has_joined():
            raise
        if is_first_here():
            _complain(error)
        code = 2
    except OutsideError as error:
        _complain(error)
        code = 1
    except BaseException:
        if is_stuck():
            traceback.print_exc()
            _leave(1)
        raise
    if world_size() > 1 or is_stuck():
        _leave(code)
    return code


def _complain(error: Exception) -> None:
    """Says what is wrong, without the password of a URL."""
    from longctx.train.redaction import redact

    sys.stderr.write(f"longctx: {redact(str(error))}\n")


def _leave(code: int) -> NoReturn:
    """Ends a process whose other threads, gloo's or W&B's, abort or block an ordinary way out."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def check(argv: list[str]) -> int:
    """CONFIG [PROCESSES] [--table.key value ...]: say whether train could start, and how"""
    from longctx.config import apply_overrides
    from longctx.plan.automatic import settle_memory
    from longctx.train.prepare import prepare
    from longctx.train.settings import load_settings

    name, options = _first_argument(argv, "check", "a config file or preset", default="tiny")
    processes = 1
    if options and options[0].isdigit():
        processes, options = int(options[0]), options[1:]
    if processes < 1:
        raise InputError("longctx check: PROCESSES must be at least 1")
    settings = apply_overrides(load_settings(name), options, "longctx check")
    settings = settle_memory(settings, processes, here=processes)
    prepared = prepare(settings, processes)
    start = prepared.resumed or prepared.initial or "the beginning"
    kept = f"{processes} processes: {prepared.split}, {settings.memory}"
    sys.stdout.write(f"{kept}; starts from {start}\n")
    return 0


def plan(argv: list[str]) -> int:
    """CONFIG [--cluster NAME] [--processes N] [--table.key value ...]: what will a run take?"""
    from longctx.plan.command import run

    return run(argv)


def doctor(argv: list[str]) -> int:
    """[CONFIG] [--measure] [--json] [--output FILE]: what has this machine, and what can it do?"""
    from longctx.doctor.command import run
    from longctx.parallel.mesh import world_size

    code = run(argv)
    if world_size() > 1:
        _leave(code)
    return code


def generate(argv: list[str]) -> int:
    """RUN|CHECKPOINT [--prompt TEXT ...]: sample text from a trained model"""
    from longctx.config import apply_overrides
    from longctx.eval.generate import GenerateConfig
    from longctx.eval.generate import generate as sample

    path, options = _first_argument(argv, "generate", "a run or checkpoint", default="")
    config = apply_overrides(GenerateConfig(), options, "longctx generate")
    text = sample(path, config)
    sys.stdout.write(text + "\n")
    if config.output:
        try:
            Path(config.output).write_text(text + "\n")
        except OSError as error:
            raise OutsideError(f"{config.output}: cannot write: {error.strerror}") from error
    return 0


def study(argv: list[str]) -> int:
    """FILE [--submit [--dry-run]|--collect] [--study.workers N ...]: train what is left"""
    from longctx.config import apply_overrides
    from longctx.parallel.mesh import world_size
    from longctx.study.command import study_command
    from longctx.study.design import Options

    name, options = _first_argument(argv, "study", "a study file", default="")
    if not name:
        apply_overrides(Options(), options, "longctx study")
    if world_size() > 1:
        raise InputError("longctx study starts processes itself: run it without a launcher")
    stopped_by, failed = study_command([name, *options])
    if failed:
        sys.stderr.write(f"longctx: cells that failed: {', '.join(failed)}\n")
    return STOPPED if stopped_by else int(bool(failed))


def launch(argv: list[str]) -> int:
    """slurm CONFIG... [--nodes N ...] [--dry-run] [-- --table.key value ...]: submit jobs"""
    from longctx.launch.slurm import launch_slurm

    scheduler, rest = _first_argument(argv, "launch", "a scheduler: slurm", default="slurm")
    if scheduler != "slurm":
        raise InputError(f"longctx launch {scheduler}: knows only slurm")
    return launch_slurm(rest)


def data(argv: list[str]) -> int:
    """tokenize|inspect|stats|train-tokenizer [PATH] [--option value ...]: text to tokens"""
    from longctx.data.commands import run

    return run(argv)


def report(argv: list[str]) -> int:
    """RUN... [--output report.html]: one page of HTML about runs, to open in a browser"""
    from longctx.config import apply_overrides
    from longctx.report import ReportConfig, write_report

    count = next((n for n, word in enumerate(argv) if word.startswith("-")), len(argv))
    config = apply_overrides(ReportConfig(), argv[count:], "longctx report")
    sys.stdout.write(write_report(argv[:count], config) + "\n")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "check": check,
    "plan": plan,
    "doctor": doctor,
    "generate": generate,
    "study": study,
    "report": report,
    "data": data,
    "launch": launch,
}


def _first_argument(
    argv: list[str], command: str, wanted: str, default: str
) -> tuple[str, list[str]]:
    """The positional argument and the options; `--help` may stand without the argument."""
    if argv and not argv[0].startswith("-"):
        return argv[0], argv[1:]
    if "--help" in argv or "-h" in argv:
        return default, argv
    raise InputError(f"longctx {command} needs {wanted}; try: longctx {command} --help")


def _usage() -> str:
    lines = [f"longctx {longctx.__version__}", "", "usage: longctx COMMAND ...", ""]
    lines += [f"  {name:10} {command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "longctx COMMAND --help lists the options of a command", ""])


def main(argv: list[str] | None = None) -> int:
    """Runs a command; 0 is success, 2 a mistake in the input, 1 a failure outside."""
    die_with_parent()
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("--help", "-h", "help"):
        sys.stdout.write(_usage())
        return 0
    if argv[0] == "--version":
        sys.stdout.write(longctx.__version__ + "\n")
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise InputError(f"{argv[0]!r} is no command; commands: {', '.join(COMMANDS)}")
        return COMMANDS[argv[0]](argv[1:])
    except InputError as error:
        from longctx.parallel.mesh import is_first_here

        if is_first_here():
            _complain(error)
        return 2
    except OutsideError as error:
        _complain(error)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
