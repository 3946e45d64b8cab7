"""W&B's own files, read by its own reader, and servers that do not answer."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

import pytest

from longctx.train import wandb_run
from longctx.train.mirror import FLUSH_SECONDS, flat
from longctx.train.trainer import train
from tests.train.processes import run_work

pytestmark = pytest.mark.cluster

PASSWORD = uuid4().hex
"""Which no changed source can have, of which a run keeps a copy."""
TINY = {"train.seq_len": 48, "train.batch_size": 2, "model.width": 32, "eval.sequences": 2}


@pytest.fixture(autouse=True)
def offline_wandb(monkeypatch, tmp_path):
    """Settings and caches of W&B stay in the folder of the test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def history(folder) -> list[dict]:
    """Rows of an offline run, without what W&B adds."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    records = [json.loads(line) for line in lines]
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    tables = ("loss_by_position.", "router_health.")
    return [
        {key: x for key, x in item.items() if not key.startswith(("_", *tables))} for item in items
    ]


def merged(run_dir) -> list[dict]:
    """Rows of all offline runs of a run directory: those of a later one win from its first on."""
    rows: dict[int, dict] = {}
    for folder in sorted((run_dir / "wandb").glob("offline-run-*")):
        own = history(folder)
        kept = {step: row for step, row in rows.items() if not own or step < own[0]["step"]}
        rows = kept | {row["step"]: row for row in own}
    return [rows[step] for step in sorted(rows)]


def recorded(run_dir) -> list[dict]:
    """Rows of `metrics.jsonl`, as mirrors get them."""
    return [flat(json.loads(line)) for line in (run_dir / "metrics.jsonl").open()]


def command(run_dir, corpus, **options) -> list[str]:
    """What trains a small model in a process of its own."""
    options = TINY | {"run.dir": run_dir, "data.path": corpus, "log.wandb": "offline"} | options
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return [
        sys.executable,
        "-m",
        "longctx",
        "train",
        "tiny",
        *words,
        "--log.tags",
        f"s3://me:{PASSWORD}@x",
    ]


def kill_with_children(process: subprocess.Popen) -> None:
    """Kills a process and W&B's, which would otherwise write what it was sent."""
    lists = Path(f"/proc/{process.pid}/task").glob("*/children")
    children = [int(pid) for path in lists for pid in path.read_text().split()]
    for pid in (process.pid, *children):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def test_offline_files_hold_the_rows_of_the_record_also_after_a_resume(tmp_path, corpus):
    run_dir = tmp_path / "run"
    options = {"train.steps": 9, "eval.every": 3, "checkpoint.every": 4}
    stopped = command(run_dir, corpus, **options, **{"train.stop_after": 6})
    subprocess.run(stopped, check=True, timeout=60)
    for checkpoint in (run_dir / "checkpoints").glob("step-*6"):
        checkpoint.rename(tmp_path / "lost")  # so that steps 5 and 6 are repeated
    subprocess.run(command(run_dir, corpus, **options), check=True, timeout=60)
    folders = sorted((run_dir / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert len({folder.name.split("-")[-1] for folder in folders}) == 1
    assert [row["step"] for row in history(folders[1])] == [5, 6, 7, 8, 9]
    assert merged(run_dir) == recorded(run_dir)
    assert [row["step"] for row in recorded(run_dir)] == [*range(1, 10)]
    tables = [json.loads(path.read_text()) for path in folders[1].rglob("loss_by_position_*.json")]
    last = json.loads((run_dir / "summary.json").read_text())["val_loss_by_position"]
    assert last in [[line[1] for line in table["data"]] for table in tables]
    told = [path for path in run_dir.rglob("*") if path.is_file() and path.name != "config.toml"]
    told = [path for path in told if "checkpoints" not in path.parts]
    assert len(told) > 10
    assert not [path for path in told if PASSWORD.encode() in path.read_bytes()]


def test_a_killed_run_loses_nothing_of_the_record_and_a_moment_of_wandb(tmp_path, corpus):
    run_dir = tmp_path / "run"
    # So few rows a second that they do not fill a block of the file, which W&B writes at once.
    options = {"train.steps": 10**6, "train.batch_size": 96, "eval.every": 0}
    process = subprocess.Popen(command(run_dir, corpus, **options))
    try:
        deadline = time.monotonic() + 60
        log = run_dir / "log.txt"
        while not (log.exists() and "W&B: " in log.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(1)
        before = recorded(run_dir)[-1]["step"]
        time.sleep(FLUSH_SECONDS + 1)
    finally:
        kill_with_children(process)
    rows, mirrored = recorded(run_dir), merged(run_dir)
    assert [row["step"] for row in rows] == [*range(1, len(rows) + 1)]
    assert rows[-1]["step"] > before
    assert len(mirrored) >= before
    assert mirrored == rows[: len(mirrored)]


@pytest.mark.parametrize("server", ["dead", "hung"])
def test_a_server_that_does_not_answer_changes_nothing(settings, rows, monkeypatch, server):
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        if server == "hung":
            listener.listen(64)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setattr(wandb_run, "START_SECONDS", 2.0)
        plain = settings("plain", train__steps=40)
        online = settings("online", train__steps=40, log__wandb="online")
        train(plain)
        run_work(1, lambda _rank: 75 if train(online) else 0)
    assert [row["loss"] for row in rows(online)] == [row["loss"] for row in rows(plain)]
    log = (online.run.path / "log.txt").read_text()
    assert log.count("warning") == 1
    assert "warning: W&B writes files for `wandb sync`, as no server took the run" in log
    assert merged(online.run.path) == recorded(online.run.path)
