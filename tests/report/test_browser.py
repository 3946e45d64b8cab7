"""The page in a real browser; and pages of long runs."""

import json
import time
import warnings

import pytest

from longctx.report.page import ReportConfig, render, write_report
from longctx.report.reading import read_runs
from longctx.study.page import make_plots
from longctx.study.page import render as render_study
from longctx.study.points import read_points
from tests.report.browser import CHROMIUM, browser
from tests.report.made import make_run, row
from tests.study.made import make_study

pytestmark = pytest.mark.cluster
LOSS = "document.querySelector('.way svg')"
BOX = f"JSON.stringify({LOSS}.getBoundingClientRect())"
SHOWN = "[...document.querySelectorAll('.way')].map(way => way.offsetHeight > 0)"


@pytest.fixture(scope="module")
def tab():
    if not CHROMIUM:
        warnings.warn("NOT RUN: no chromium here (apt-get install chromium)", stacklevel=1)
        pytest.skip("no chromium")
    with browser() as opened:
        yield opened


@pytest.fixture
def page(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", "two", width=96)]
    file = tmp_path / "page.html"
    file.write_text(render(read_runs([str(run) for run in runs])))
    return file


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_page_asks_for_nothing_else_and_complains_of_nothing(tab, page, dark):
    tab.visit.requests.clear()
    tab.visit.complaints.clear()
    tab.open(page, dark=dark)
    outside = [url for url in tab.visit.requests if not url.startswith("data:image/png")]
    assert outside == [page.as_uri()]
    assert tab.visit.complaints == []
    back = tab.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, back[4:-1].split(","))) < 150) == dark
    tab.value("document.getElementById('theme').click()")
    assert tab.value("getComputedStyle(document.body).backgroundColor") != back


def test_what_the_mouse_is_over_is_told(tab, page):
    tab.open(page)
    tab.value(f"{LOSS}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
    box = json.loads(tab.value(BOX))
    tab.hover(box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"])
    told = tab.value("document.getElementById('tip').innerText").split("\n")
    step = int(told[told.index("step") + 1])
    assert 25 <= step <= 35
    assert float(told[told.index("one, each step") + 1]) == pytest.approx(2 + 3 / step, abs=2e-3)
    assert "two, held-out" in " ".join(told)


def test_without_javascript_a_page_is_complete_and_still_chooses_its_axis(tab, page):
    tab.open(page, script=False)
    assert tab.value(SHOWN) == [True, False, False, False]
    assert tab.value("document.getElementById('theme').hidden") is True
    tab.value("document.getElementById('way-2').checked = true")
    assert tab.value(SHOWN) == [False, False, True, False]


def test_a_page_fits_a_narrow_screen(tab, page):
    tab.open(page, width=400)
    assert tab.value("document.documentElement.scrollWidth") <= 400


def test_the_page_of_a_study_asks_for_nothing_complains_of_nothing_and_tells_small_numbers(
    tab, tmp_path
):
    points, page = read_points(make_study(tmp_path / "study")), tmp_path / "study.html"
    page.write_text(render_study(points, make_plots(points)))
    tab.visit.requests.clear()
    tab.visit.complaints.clear()
    tab.open(page)
    assert tab.visit.requests == [page.as_uri()]
    rate = """document.querySelector('[aria-label^="Learning rate"]')"""
    tab.value(f"{rate}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
    box = json.loads(tab.value(f"JSON.stringify({rate}.getBoundingClientRect())"))
    tab.hover(box["x"] + 0.55 * box["width"], box["y"] + 0.5 * box["height"])
    told = tab.value("document.getElementById('tip').innerText").split("\n")
    assert told[told.index("peak learning rate") + 1] == "0.003"
    filled = "getComputedStyle(document.querySelector('path.band')).fill"
    assert tab.value(filled).startswith("rgb(")
    assert tab.visit.complaints == []
    tab.open(page, width=400)
    assert tab.value("document.documentElement.scrollWidth") <= 400


def test_a_complaint_would_be_heard(tab, page):
    broken = page.with_name("broken.html")
    text = page.read_text().replace("</main>", "<img src='http://localhost:9/x.png'></main>")
    broken.write_text(text)
    tab.visit.complaints.clear()
    tab.open(broken)
    assert "localhost:9" in " ".join(tab.visit.complaints)


def test_five_runs_of_a_hundred_thousand_steps_are_a_small_page_soon(tmp_path):
    lines = [json.dumps(row(n, loss=2 + (n * 7919 % 997) / 997)) for n in range(1, 100_001)]
    folders = [make_run(tmp_path / name, name) for name in "abcde"]
    for folder in folders:
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    started, page = time.process_time(), tmp_path / "page.html"
    write_report([str(folder) for folder in folders], ReportConfig(str(page)))
    assert time.process_time() - started < 5
    assert page.stat().st_size < 2_000_000
