"""The picture of a run: `loss.png`, drawn from `metrics.jsonl`."""

import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from longctx.errors import OutsideError
from longctx.train.metrics import METRICS_FILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE_FILE = "loss.png"
MAX_SMOOTHING_REACH = 50


def draw_loss(run_dir: Path, unigram_entropy: float | None) -> Path | None:
    """Draw training and validation loss over steps and tokens; returns the picture's path.

    The dashed line is `unigram_entropy`, the loss of a model that knows only token frequencies.
    Returns None, after a line on stderr, without matplotlib, and None for a run without steps.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        sys.stderr.write("warning: no loss.png, because matplotlib is not installed\n")
        return None
    rows = _read_rows(Path(run_dir) / METRICS_FILE)
    if not rows:
        return None
    figure = Figure(figsize=(10, 6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    _draw_training(axes, rows)
    _draw_validation(axes, rows)
    if unigram_entropy is not None:
        axes.axhline(
            unigram_entropy, color="0.35", linestyle="--", linewidth=1.2, label="unigram entropy"
        )
    _add_token_axis(axes, rows)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=Path(run_dir).resolve().name)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    path = Path(run_dir) / PICTURE_FILE
    try:
        figure.savefig(path)
    except OSError as error:
        raise OutsideError(f"{path}: cannot write: {error.strerror}") from error
    return path


def _read_rows(path: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        return []


def _draw_training(axes: "Axes", rows: list[dict]) -> None:
    points = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    if not points:
        return
    steps, losses = zip(*points, strict=True)
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=0.8, label="training")
    reach = min(MAX_SMOOTHING_REACH, len(losses) // 20)
    if reach > 0:
        label = f"training, mean of {2 * reach + 1} steps"
        axes.plot(steps, _smoothed(losses, reach), color="tab:blue", linewidth=2, label=label)


def _draw_validation(axes: "Axes", rows: list[dict]) -> None:
    points = [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss") is not None]
    if points:
        steps, losses = zip(*points, strict=True)
        axes.plot(steps, losses, "o-", color="tab:orange", markersize=5, label="validation")


def _add_token_axis(axes: "Axes", rows: list[dict]) -> None:
    """Mark tokens above the picture, where each step saw the same number of them."""
    from matplotlib.ticker import EngFormatter

    tokens_per_step = rows[-1].get("tokens", 0) / rows[-1]["step"]
    if tokens_per_step > 0:
        to_tokens = (lambda step: step * tokens_per_step, lambda token: token / tokens_per_step)
        axis = axes.secondary_xaxis("top", functions=to_tokens)
        axis.set_xlabel("tokens")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def _smoothed(values: tuple[float, ...], reach: int) -> list[float]:
    """Means over `reach` values on both sides, over fewer near the ends so that none lags."""
    sums = [0.0, *itertools.accumulate(values)]
    smooth = []
    for index in range(len(values)):
        near = min(reach, index, len(values) - 1 - index)
        smooth.append((sums[index + near + 1] - sums[index - near]) / (2 * near + 1))
    return smooth
