"""Heat maps: a small picture inside an SVG, so that many numbers take little room."""

import base64
import math
import struct
import zlib
from html import escape

import numpy as np

from longctx.report.scales import Scale, written

MOST_COLUMNS = 160
SIZE = (550, 200)
LEFT, RIGHT, TOP, BOTTOM = 40, 14, 6, 40
STOPS = (
    *((0.0, (247, 251, 255)), (0.2, (198, 219, 239)), (0.4, (107, 174, 214))),
    *((0.6, (33, 113, 181)), (0.8, (8, 69, 148)), (1.0, (3, 30, 72))),
)
"""From the least to the largest number."""


def draw_heat(
    title: str,
    steps: np.ndarray,
    lists: list[list[float | None]],
    limits: tuple[float, float],
) -> str:
    """One column for each stretch of steps, one row for each place in the lists; the lightest and
    the darkest colour are those of `limits`."""
    grid_RC = _grid(lists)
    columns = min(MOST_COLUMNS, grid_RC.shape[1])
    parts = np.array_split(np.arange(grid_RC.shape[1]), columns)
    means_RC = np.stack([_means(grid_RC[:, part]) for part in parts], 1)
    data = base64.b64encode(_png(_colours(means_RC, *limits))).decode()
    width, height = SIZE
    right, bottom = width - RIGHT, height - BOTTOM
    x = Scale(float(steps[0]), float(steps[-1]) + 1e-9, LEFT, right)
    rows = len(grid_RC)
    numbers = sorted({0, rows // 2, rows - 1})
    texts = [
        f'<text class="y" x="{LEFT - 6}" dy=".32em" '
        f'y="{TOP + (bottom - TOP) * (n + 0.5) / rows:.1f}">{n}</text>'
        for n in numbers
    ]
    ticks = x.ticks(6) if steps[-1] > steps[0] else [float(steps[0])]
    texts += [
        f'<text class="x" x="{x.place(tick):.1f}" y="{bottom + 16}">{written(tick)}</text>'
        for tick in ticks
    ]
    legend = "{} (light) to {} (dark)".format(*map(written, limits))
    return (
        f'<svg class="heat" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f'<image href="data:image/png;base64,{data}" x="{LEFT}" y="{TOP}" width="{right - LEFT}" '
        f'height="{bottom - TOP}" preserveAspectRatio="none"><title>{escape(title)}: {legend}'
        f'</title></image><g class="axes">{"".join(texts)}<text class="x title" '
        f'x="{(LEFT + right) / 2:g}" y="{bottom + 34}">step; {legend}</text></g></svg>'
    )


def _grid(lists: list[list[float | None]]) -> np.ndarray:
    """`[rows, columns]`; NaN where a list has no number."""
    rows = max(map(len, lists))
    grid_RC = np.full((max(rows, 1), len(lists)), np.nan)
    for column, values in enumerate(lists):
        for row, value in enumerate(values):
            grid_RC[row, column] = math.nan if value is None else value
    return grid_RC


def _means(part_RC: np.ndarray) -> np.ndarray:
    known = np.isfinite(part_RC)
    counts = known.sum(1)
    sums = np.where(known, part_RC, 0.0).sum(1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _colours(means_RC: np.ndarray, low: float, high: float) -> np.ndarray:
    """`[rows, columns, 4]` bytes; unknown numbers are transparent."""
    share_RC = (means_RC - low) / ((high - low) or 1.0)
    places = [place for place, _ in STOPS]
    channels = [
        np.interp(np.nan_to_num(share_RC), places, [stop[n] for _, stop in STOPS]) for n in range(3)
    ]
    alpha_RC = np.where(np.isfinite(means_RC), 255, 0)
    return np.stack([*channels, alpha_RC], -1).astype(np.uint8)


def _png(pixels_RC4: np.ndarray) -> bytes:
    rows, columns, _ = pixels_RC4.shape
    lines = b"".join(b"\0" + row.tobytes() for row in pixels_RC4)
    header = struct.pack(">IIBBBBB", columns, rows, 8, 6, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
