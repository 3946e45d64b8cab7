"""What a run may speak to: SLURM and W&B. Nothing is sent."""

import shutil
import subprocess

from longctx.doctor.findings import Finding
from longctx.doctor.versions import installed
from longctx.parallel.surroundings import has_wandb_key, slurm_job, wandb_mode

SLURM_COMMANDS = ("sbatch", "srun", "scontrol", "sinfo", "scancel")
QUERY_SECONDS = 5


def slurm() -> list[Finding]:
    """Whether jobs can be submitted, and whether this is one."""
    missing = [name for name in SLURM_COMMANDS if not shutil.which(name)]
    job = slurm_job()
    if job:
        found = f"SLURM job {job.number} in partition {job.partition}, {job.nodes} nodes"
        if "scontrol" in missing:
            return [Finding("warning", found, "scontrol is missing: a stopped job is not requeued")]
        return [Finding("ok", found, "a stopped run goes back to the queue")]
    if missing == list(SLURM_COMMANDS):
        return [Finding("note", "no SLURM", "longctx launch slurm only with --dry-run")]
    if missing:
        meaning = "longctx launch slurm needs all of its commands"
        return [Finding("warning", f"SLURM without {', '.join(missing)}", meaning)]
    partitions = _partitions()
    if not partitions:
        return [
            Finding("note", "SLURM does not answer", "longctx launch slurm only with --dry-run")
        ]
    found = f"SLURM with partitions {', '.join(partitions)}"
    return [Finding("ok", found, "longctx launch slurm can submit")]


def _partitions() -> list[str]:
    """Those that the controller names; none if it does not answer."""
    try:
        done = subprocess.run(
            ["sinfo", "--noheader", "--format=%R"],
            capture_output=True,
            text=True,
            timeout=QUERY_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return sorted(set(done.stdout.split())) if done.returncode == 0 else []


def wandb(asked: str) -> list[Finding]:
    """Whether what `log.wandb` asks for can be had."""
    if asked == "disabled":
        return [Finding("ok", "log.wandb = 'disabled'", "nothing leaves this machine")]
    if not installed("wandb"):
        return [Finding("problem", f"log.wandb = {asked!r}", "wandb is not installed")]
    told = wandb_mode()
    if asked == "offline" or told in ("offline", "disabled", "dryrun"):
        found = f"log.wandb = {asked!r}" + (f", WANDB_MODE = {told!r}" if told else "")
        return [Finding("ok", found, "files for wandb sync; no key needed")]
    if not has_wandb_key():
        meaning = "no API key: writes files for wandb sync; run wandb login"
        return [Finding("warning", "log.wandb = 'online'", meaning)]
    return [Finding("ok", "log.wandb = 'online'", "an API key is there")]
