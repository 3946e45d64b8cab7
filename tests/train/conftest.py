"""A small corpus, and settings of a small run on it."""

import json

import pytest

from longctx.config import apply_overrides
from longctx.train.settings import Settings, load_settings

SMALL = {
    "train.seq_len": 48,
    "train.batch_size": 4,
    "train.steps": 6,
    "model.width": 32,
    "optim.warmup_steps": 2,
    "eval.every": 4,
    "eval.sequences": 3,
}


@pytest.fixture
def corpus(tmp_path):
    """A folder of short texts."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(12):
        text = " ".join(f"{i} times {n} is {i * n};" for n in range(40))
        (folder / f"{i}.txt").write_text(text)
    return folder


@pytest.fixture
def settings(tmp_path, corpus):
    """Makes settings of the tiny preset, smaller still; `table__field` names a change."""

    def make(name: str = "run", **changes) -> Settings:
        options = SMALL | {"run.dir": tmp_path / name, "data.path": corpus}
        options |= {key.replace("__", "."): value for key, value in changes.items()}
        argv = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        return apply_overrides(load_settings("tiny"), argv, "test")

    return make


@pytest.fixture
def rows():
    """Reads the metrics of a run."""

    def read(settings: Settings) -> list[dict]:
        text = (settings.run.path / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    return read
