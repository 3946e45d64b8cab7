"""The page about a study: what it shows of cells, fits and failures, and that it asks nobody."""

import csv
import io
import math
import re
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import pytest

from longctx.study.axes import kind_of
from longctx.study.page import make_plots, render
from longctx.study.points import read_points
from longctx.study.report import write_report
from longctx.study.results import Results
from tests.report.parsed import Page, charts
from tests.study.made import FLOOR, RATES, RATIOS, WIDTHS, make_row, make_study, write_run

HOSTILE = "</title><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;"


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Results:
    return make_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def html(study) -> str:
    return page_of(study)


def page_of(results: Results) -> str:
    points = read_points(results)
    return render(points, make_plots(points))


def tables(html: str) -> dict[str, list[dict[str, str]]]:
    """The files that a page offers, by name."""
    found = re.findall(r'download="([^"]*)" href="data:text/csv;charset=utf-8,([^"]*)"', html)
    return {name: list(csv.DictReader(io.StringIO(unquote(data)))) for name, data in found}


def shaped(folder: Path, cells: list[dict], **figures) -> Results:
    """A study whose cells have these values, and seconds of a step."""
    rows = []
    for cell in cells:
        values = {name: value for name, value in cell.items() if name != "seconds"}
        row = make_row(folder, values, lambda flops: 2.0)
        write_run(row.run_dir, 20, 1e9, lambda flops: 2.0, cell["seconds"])
        rows.append(replace(row, processes=values.get("parallel.sp", 1), **figures))
    return Results("shaped", "longctx study shaped.toml", tuple(rows[0].values), tuple(rows))


def test_a_page_asks_nobody_for_anything(html):
    page = Page(html)
    assert "http://" not in html
    assert "https://" not in html
    assert re.findall(r"url\((?!#clip)", html) == []
    for tag, attributes in page.tags:
        assert "src" not in attributes, tag
        assert attributes.get("href", "#").startswith(("#", "data:text/csv;")), tag
        assert not [name for name in attributes if name.startswith("on")], tag
    assert not {"link", "iframe", "img", "object", "base", "form"} & {tag for tag, _ in page.tags}
    assert len(page.all("script")) == 1
    assert "default-src 'none'" in html


def test_everything_that_a_study_can_show_is_there(html, study):
    titles = set(charts(html))
    wanted = {"Loss over compute", "Loss over weights and tokens", "All loss curves"}
    wanted |= {f"Loss at equal compute, {ratio}" for ratio in RATIOS}
    wanted |= {f"Learning rate, {ratio}" for ratio in RATIOS} | {"Peak memory over size"}
    assert titles == wanted
    for title, body in charts(html).items():
        assert study.command in body, title
        assert "data:text/csv" in body, title
    text = " ".join(Page(html).text)
    for told in ("48: 48 done", "a processor", "0123456789abcdef", "2.13.0", "0.40 hours"):
        assert told in text, told


def test_laws_are_fitted_to_the_best_cells_alone_and_told_with_their_points(html, study):
    files = tables(html)
    points = files["loss-over-compute.csv"]
    best = {row.name: row for row in study.rows if row.is_best}
    assert {point["cell"] for point in points} == set(best)
    for point in points:
        summary = best[point["cell"]].summary
        assert float(point["flops"]) == summary["flops"]
        assert float(point["val_loss"]) == summary["val_loss"]
    fits = files["loss-over-compute-fits.csv"]
    assert [fit["group"] for fit in fits] == list(RATIOS)
    for number, fit in enumerate(fits):
        assert float(fit["E"]) == pytest.approx(FLOOR * (1 + 0.03 * number), rel=0.2)
        assert fit["runs"] == "8"
        assert float(fit["R2"]) > 0.99
        assert re.fullmatch(r"\d+ of 300", fit["resamples that failed"])
    body = charts(html)["Loss over compute"]
    assert body.count(' band"') == len(RATIOS)
    assert body.count("<circle") == len(best)
    assert f"<title>{points[0]['cell']}</title>" in body


def test_curves_that_are_not_of_the_best_are_faint(html, study):
    body = charts(html)["All loss curves"]
    best = sum(row.is_best for row in study.rows)
    assert len(re.findall(r'class="run run-\d line"', body)) == best
    assert len(re.findall(r'class="run run-\d faint"', body)) == len(study.rows) - best


def test_a_sweep_whose_best_rate_is_at_its_end_is_told(study):
    body = charts(page_of(study))[f"Learning rate, {RATIOS[0]}"]
    assert "is at the end" not in body
    assert body.count("data-name") == 2 * len(WIDTHS)
    assert 'data-whole="0"' in body
    for left_out in (RATES[0], RATES[-1]):
        kept = tuple(row for row in study.rows if row.values["optim.lr"] != left_out)
        body = charts(page_of(replace(study, rows=kept)))[f"Learning rate, {RATIOS[0]}"]
        assert "the best rate, 0.003, is at the end of those that were tried" in body


def test_a_sweep_that_is_not_over_has_no_law_yet(study):
    rows = [replace(row, is_best=False) for row in study.rows]
    html = page_of(replace(study, rows=tuple(rows)))
    assert "Loss over compute" in charts(html)
    assert "known for 0 combinations" in html
    assert "band" not in charts(html)["Loss over compute"].replace("band: 90", "")


def test_a_fit_that_is_not_possible_says_why(study):
    few = tuple(row for row in study.rows if row.values["model.width"] == WIDTHS[0])
    html = page_of(replace(study, rows=few))
    assert "none, all: no fit: needs runs at 3 amounts of compute, has 2" in html
    assert "needs 3 sizes, has 1" in charts(html)["Loss at equal compute"]
    without = tuple(
        replace(row, summary={k: v for k, v in row.summary.items() if k != "flops"})
        for row in study.rows
    )
    html = page_of(replace(study, rows=without))
    assert "the runs do not tell their FLOPs" in charts(html)["Loss over compute"]
    assert "<svg" not in charts(html)["Loss over compute"]


def test_a_law_that_explains_little_is_told(study, html):
    assert "says little" not in html

    def rough(row):
        off = 1 + 0.05 * (-1) ** WIDTHS.index(row.values["model.width"])
        return replace(row, summary=row.summary | {"val_loss": 3 * row.flops**-0.02 * off})

    told = page_of(replace(study, rows=tuple(rough(row) for row in study.rows)))
    assert "none, all: the law says little: R2 is below a half" in told


@pytest.mark.parametrize(
    ("field", "title", "terms"),
    [
        ("train.seq_len", "Time of a token over length", ("fixed", "n", "n^2")),
        ("parallel.sp", "Time of a step over processes", ("fixed", "1/P", "P-1")),
    ],
)
def test_time_is_shown_over_what_differs_with_its_parts(tmp_path, field, title, terms):
    cells = [
        {"mixer": mixer, field: value, "seconds": 0.1 + 1.0 / value}
        for mixer in ("linear", "softmax")
        for value in (1, 2, 4, 8)
    ]
    results = shaped(tmp_path, cells)
    html = page_of(results)
    assert title in charts(html)
    refused = "linear, softmax: no fit: the runs differ in train.seq_len"
    assert (refused in page_of(replace(results, group="mixer"))) == (field == "train.seq_len")
    fits = tables(html)[title.lower().replace(" ", "-") + "-fits.csv"]
    assert [fit["line"] for fit in fits] == ["linear", "softmax"]
    assert all(fit[term] != "" for fit in fits for term in terms)
    if field == "parallel.sp":
        assert float(fits[0]["1/P"]) == pytest.approx(1.0)
        assert float(fits[0]["fixed"]) == pytest.approx(0.1)
    assert "Learning rate" not in html


def test_failures_are_told_with_their_reason_and_nothing_finished_is_a_page(study):
    error = "exit code 1: wandb_api_key=hunter2 is wrong"
    rows = [
        replace(row, status="failed", summary={}, attempts=2, is_best=False, error=error)
        for row in study.rows[:2]
    ]
    failed = replace(study, rows=tuple(rows), command="longctx study x --key api_key=hunter2")
    html = page_of(failed)
    assert "2: 2 failed" in html
    assert "exit code 1" in html
    assert "hunter2" not in html
    assert tables(html)["cells.csv"][0]["attempts"] == "2"


def test_a_finished_cell_whose_folder_is_gone_is_told(study):
    rows = (replace(study.rows[0], run_dir=Path("/nowhere")), *study.rows[1:])
    assert f"without their folders: {study.rows[0].name}" in page_of(replace(study, rows=rows))


def test_hostile_text_stays_text(tmp_path):
    cells = [{"mixer": HOSTILE, "train.seq_len": n, "seconds": 0.5} for n in (1, 2, 3)]
    results = shaped(tmp_path, cells, error=HOSTILE)
    results = replace(results, name=HOSTILE, command=HOSTILE)
    page = Page(page_of(results))
    assert len(page.all("script")) == 1
    assert page.all("img") == []
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    assert "".join(page.text).count(HOSTILE) >= 8


def test_lines_are_told_apart_by_what_changes_the_task_or_the_model_but_not_its_size(
    study, tmp_path
):
    points = read_points(study)
    assert list(points.groups(points.best)) == list(RATIOS)
    by_width = read_points(replace(study, group="model.width"))
    assert list(by_width.groups(by_width.best)) == [f"width {width}" for width in WIDTHS]
    cells = [{"mixer": "linear", "train.seq_len": n, "seconds": 0.5} for n in (512, 1024)]
    of_lengths = read_points(shaped(tmp_path, cells))
    names = list(of_lengths.groups(of_lengths.best))
    assert names == ["seq_len 512", "seq_len 1024"]
    kinds = {"optim.lr": "rate", "run.seed": "seed", "train.seq_len": "length", "mixer": ""}
    kinds |= {
        "model.width": "size",
        "size": "size",
        "train.steps": "tokens",
        "parallel.sp": "processes",
    }
    assert {axis: kind_of(axis) for axis in kinds} == kinds


def test_colours_mean_the_same_if_a_line_has_no_losses(tmp_path):
    rows = []
    for width in (32, 48, 64):
        for rate in RATES:
            loss = math.nan if width == 32 else 2.0
            values = {"mixer": "linear", "model.width": width, "optim.lr": rate}
            row = make_row(tmp_path, values, lambda _, loss=loss: loss)
            write_run(row.run_dir, 20, 1e9, lambda _, loss=loss: loss)
            rows.append(row)
    html = page_of(Results("rates", "", tuple(rows[0].values), tuple(rows)))
    chart = html[html.index("<h3>Learning rate") :]
    for number, name in enumerate(("width 48", "width 64")):
        assert f'<span class="key run run-{number}">{name}</span>' in chart
        assert f'<path class="run run-{number} points" data-name="{name}"' in chart
    assert "width 32: no loss that is a number" in chart


def test_page_and_picture_are_written_beside_the_cells(study, tmp_path):
    write_report(replace(study, rows=study.rows[:3]), tmp_path)
    assert (tmp_path / "study.html").read_text().endswith("</html>\n")
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.cluster
def test_a_picture_shows_the_charts_that_have_fits(study, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(
        "longctx.study.report._chart", lambda _, chart, *__: shown.append(chart.title)
    )
    write_report(study, tmp_path)
    assert shown == ["Loss over compute"]
    monkeypatch.undo()
    write_report(study, tmp_path)
    assert (tmp_path / "study.png").stat().st_size > 20_000
