"""`longctx study`: what its words ask for."""

import shlex
from collections.abc import Sequence

from longctx.errors import InputError
from longctx.study.design import load_study
from longctx.study.run import run_study
from longctx.study.slurm import cells_in_queue, collect_study, submit_study

MODES, DRY_RUN = ("--submit", "--collect"), "--dry-run"


def study_command(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Does what FILE [--submit [--dry-run]|--collect] [--study.key value ...] says: the signal that
    ended it early or "", and the cells that failed."""
    modes, dry_run = [word for word in argv if word in MODES], DRY_RUN in argv
    argv = [word for word in argv if word not in (*MODES, DRY_RUN)]
    if len(modes) > 1:
        raise InputError(f"choose one of {' and '.join(MODES)}")
    if dry_run and modes != ["--submit"]:
        raise InputError(f"{DRY_RUN} goes with --submit; longctx plan tells of a run")
    study = load_study(argv[0], argv[1:])
    if modes == ["--submit"]:
        submit_study(study, argv, dry_run)
        return "", []
    if modes:
        return "", collect_study(study, argv)
    folder = study.config.path
    if queued := cells_in_queue(folder):
        raise InputError(
            f"{folder}: {len(queued)} cells are in SLURM's queue, so that none is trained here: "
            "wait for them (--collect tells how far they are), or cancel them"
        )
    return run_study(study, shlex.join(["longctx", "study", *argv]))
