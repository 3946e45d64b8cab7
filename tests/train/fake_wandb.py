"""A W&B package that keeps what it is told."""

import sys
import types
from typing import Any


class FakeRun:
    """A run of W&B, which may do something else in one of its calls."""

    url = "https://wandb.example/run"

    def __init__(self, **instead: Any) -> None:
        self.rows: list[dict] = []
        self.options: dict[str, Any] = {}
        self.metrics: list[tuple[str, str | None]] = []
        self.settings = types.SimpleNamespace(sync_dir="wandb/offline-run")
        self._instead = instead

    def log(self, row: dict) -> None:
        """Keeps a row."""
        self.rows.append(row)
        self._call("log")

    def finish(self, exit_code: int) -> None:
        """Keeps how it ended."""
        self.exit_code = exit_code
        self._call("finish")

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        """Keeps what is the step of what."""
        self.metrics.append((name, step_metric))

    def install(self, monkeypatch: Any, has_key: bool = True) -> "FakeRun":
        """Is what `import wandb` finds."""

        def init(**options: Any) -> FakeRun:
            self.options = options
            self._call("init")
            return self

        package = types.SimpleNamespace(
            init=init,
            setup=lambda settings: None,
            teardown=lambda: None,
            login=lambda prompt, verify: has_key,
            Settings=type("Settings", (dict,), {"model_fields": {}}),
            Table=lambda columns, data: [columns, *data],
        )
        monkeypatch.setitem(sys.modules, "wandb", package)
        return self

    def _call(self, name: str) -> None:
        if name in self._instead:
            self._instead[name]()
