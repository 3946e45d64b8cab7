"""A W&B run that mirrors `metrics.jsonl`, with tables of what has a picture of its own."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from longctx.train.evaluate import bin_start
from longctx.train.mirror import FLUSH_SECONDS, flat
from longctx.train.redaction import redact
from longctx.train.router_health import health_table

if TYPE_CHECKING:
    from longctx.train.metrics import LogConfig

ID_FILE = "longctx-run-id"
START_SECONDS = 30.0
"""How long a server may take to answer at the start, by W&B's own clock."""
LATE = "; `wandb sync` sends what is in wandb/"


class WandbRun:
    """Sends rows under the run's own step, which W&B's count of calls does not follow on a resume.

    Where a server is asked for and none answers, the rows go to files for `wandb sync`.
    """

    def __init__(self, run_dir: Path, config: "LogConfig", run_name: str, resolved: dict) -> None:
        import wandb

        self._wandb = wandb
        sys.argv = redact(sys.argv)  # W&B records it
        options = {
            "project": config.project,
            "entity": config.entity or None,
            "group": config.group or None,
            "tags": config.tags,
            "job_type": config.job_type or None,
            "name": run_name,
            "config": resolved,
        }
        options = redact(options) | {"dir": run_dir, "id": _run_id(run_dir)}
        self.trouble = ""
        if config.wandb == "online":
            try:
                self._run = _online(wandb, options)
                self.place = self._run.url
            except Exception as error:
                wandb.teardown()  # else its service says that the run exists
                self.trouble = f"writes files for `wandb sync`, as no server took the run: {error}"
        if config.wandb == "offline" or self.trouble:
            self._run = wandb.init(**options, mode="offline", settings=_settings(wandb))
            self.place = self._run.settings.sync_dir
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, row: dict) -> None:
        """Numbers, and at evaluations the tables."""
        self._run.log(flat(row) | (self._tables(row) if "val_loss" in row else {}))

    def finish(self, failed: bool) -> None:
        """Sends what is left."""
        self._run.finish(exit_code=int(failed))

    def _tables(self, row: dict) -> dict[str, Any]:
        tables = {"loss_by_position": position_table(row), "router_health": health_table(row)}
        return {
            name: self._wandb.Table(columns=table[0], data=table[1:])
            for name, table in tables.items()
            if len(table) > 1
        }


def position_table(row: dict) -> list[list[Any]]:
    """Held-out loss by position: a line of names, and one for each bin that has labels."""
    bins = zip(row.get("val_loss_by_position", ()), row.get("val_labels_by_position", ()))
    lines = [[bin_start(n), loss, labels] for n, (loss, labels) in enumerate(bins) if labels]
    return [["from_position", "loss", "labels"], *lines]


def _online(wandb: Any, options: dict[str, Any]) -> Any:
    wandb.setup(wandb.Settings(silent=True))
    if not wandb.login(prompt=False, verify=False):
        raise PermissionError("there is no API key: run `wandb login` or set WANDB_API_KEY")
    return wandb.init(**options, mode="online", resume="allow", settings=_settings(wandb))


def _settings(wandb: Any) -> Any:
    """Leaves console and standard output alone, and loses little when killed."""
    settings: dict[str, Any] = {"console": "off", "silent": True, "init_timeout": START_SECONDS}
    if "x_transaction_log_flush_interval" in wandb.Settings.model_fields:
        settings["x_transaction_log_flush_interval"] = float(FLUSH_SECONDS)
    return wandb.Settings(**settings)


def _run_id(run_dir: Path) -> str:
    """The same whenever this run directory is trained on."""
    path = run_dir / "wandb" / ID_FILE
    if path.exists() and (known := path.read_text().strip()):
        return known
    fresh = uuid4().hex[:16]
    path.parent.mkdir(exist_ok=True)
    path.write_text(fresh + "\n")
    return fresh
