"""Makes docs/report.png: PYTHONPATH=. python docs/results/report_page.py [FOLDER].

Trains two small variants on two processes each, unless FOLDER has them, writes their report and
opens it in Chromium, which must ask for nothing else and complain of nothing.
"""

import io
import subprocess
import sys
from pathlib import Path

from longctx.report import ReportConfig, write_report
from tests.report.browser import browser

ROOT = Path(__file__).parents[2]
VARIANTS = {"hybrid": "LLLS", "softmax": "SSSS"}
OPTIONS = (
    *("--train.steps", "100", "--train.seq_len", "256", "--model.width", "64"),
    *("--eval.every", "20", "--optim.warmup_steps", "20", "--parallel.sp", "2"),
)
HEIGHT, COLOURS = 2200, 256


def train(folder: Path) -> list[str]:
    """The folders of the runs."""
    for name, pattern in VARIANTS.items():
        options = ("--run.name", name, "--run.dir", str(folder / name), "--model.pattern", pattern)
        command = [str(ROOT / "launch" / "local.sh"), "-n", "2", "tiny", *options, *OPTIONS]
        subprocess.run(command, check=True, cwd=ROOT)
    return [str(folder / name) for name in VARIANTS]


def main() -> None:
    """Trains, writes and looks."""
    from PIL import Image

    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/report")
    page = folder / "report.html"
    print(write_report(train(folder), ReportConfig(str(page))))
    with browser() as tab:
        tab.open(page)
        outside = [url for url in tab.visit.requests if not url.startswith("data:")]
        assert outside == [page.resolve().as_uri()], outside
        assert tab.visit.complaints == [], tab.visit.complaints
        picture = Image.open(io.BytesIO(tab.picture(HEIGHT))).convert("RGB")
    target = ROOT / "docs" / "report.png"
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(target, optimize=True)
    print(f"{target}: {picture.width} x {picture.height}, {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
