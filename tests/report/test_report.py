"""The page about runs: complete, correct, and nobody's hostage."""

import base64
import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from longctx.cli import main
from longctx.report.charts import MOST_POINTS, Band, Chart, Curve, draw
from longctx.report.curves import Series, reach_of, smoothed, thinned
from longctx.report.heat import draw_heat
from longctx.report.page import render
from longctx.report.reading import read_runs
from longctx.report.scales import Scale, bounds, told_apart, written
from tests.report.made import make_run, row
from tests.report.parsed import Page, charts

HOSTILE = "</title><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;"


@pytest.fixture
def two(tmp_path):
    return [make_run(tmp_path / "a"), make_run(tmp_path / "b", "two", width=96)]


def page_of(*folders) -> tuple[str, Page]:
    html = render(read_runs([str(folder) for folder in folders]))
    return html, Page(html)


def test_a_page_asks_nobody_for_anything(two):
    html, page = page_of(*two)
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html
    assert re.findall(r"url\((?!#clip)", html) == []
    for tag, attributes in page.tags:
        assert "src" not in attributes, tag
        assert attributes.get("href", "#").startswith(("#", "data:image/png;base64,")), tag
        assert not [name for name in attributes if name.startswith("on")], tag
    policy = next(m for m in page.all("meta") if "http-equiv" in m)["content"]
    assert policy.startswith("default-src 'none'")
    assert not {"link", "iframe", "img", "object", "base", "form"} & {tag for tag, _ in page.tags}


def test_every_chart_that_runs_have_numbers_for_is_there(two):
    html, _ = page_of(*two)
    assert set(charts(html)) == {
        *("Loss", "Loss by position", "Accuracy on held-out data", "Gradient norm"),
        *("Learning rate", "Throughput", "Model FLOPs utilisation", "Time of a step", "Data wait"),
        *("Peak memory", "Exchanged", "Exchanges", "Skipped steps"),
        *("Router 3, load", "Router entropy"),
    }
    for text in ("2.2500", "239k", "a processor", "0123456789 + changes", "the loss jumped"):
        assert text in html, text


def test_a_figure_that_no_run_has_has_no_chart(tmp_path):
    html, _ = page_of(make_run(tmp_path / "a", steps=3))
    assert "Loss by position" not in charts(html)
    assert "Skipped steps" not in charts(html)
    assert "Norm of the update" not in charts(html)


def test_hostile_text_stays_text(tmp_path):
    folder = make_run(tmp_path / "a", HOSTILE)
    (folder / "log.txt").write_text(f"2030 warning: {HOSTILE}\n")
    (folder / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE, "git": HOSTILE}))
    hostile = row(61, **{HOSTILE: 1.0, f"router/{HOSTILE}": [1.0, 2.0]})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(hostile) + "\n")
    _, page = page_of(folder, make_run(tmp_path / "b"))
    assert len(page.all("script")) == 1
    assert page.all("img") == []
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    assert "".join(page.text).count(HOSTILE) >= 8


def test_only_fields_that_differ_are_listed_before_the_whole_configs(two):
    html, _ = page_of(*two)
    listed = html.split('id="differences-of-config"')[1].split("<details>")[0]
    assert "model.width" in listed
    assert "96" in listed
    for same in ("optim.lr", "run.name", "model.pattern"):
        assert same not in listed
    assert html.count("pattern = &quot;LLLS&quot;") == 2


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    folder = make_run(tmp_path / "a")
    for name in ("metrics.jsonl", "summary.json", "environment.json", "log.txt"):
        (folder / name).unlink()
    html, _ = page_of(folder)
    assert "no steps in metrics.jsonl" in html
    (folder / "metrics.jsonl").write_text("")
    page_of(folder)


def test_the_same_router_of_two_runs_has_the_same_colours_side_by_side(tmp_path):
    folders = [make_run(tmp_path / name, name=name) for name in ("a", "b")]
    more = {"router/3/load": [0.9, 0.0], "router/4/load": [0.5]}
    with (folders[1] / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row(61, **more)) + "\n")
    html, _ = page_of(*folders)
    heats = re.findall(r'class="heat".*?aria-label="([^"]*)".*?step; ([^<]*)<', html)
    assert heats[0] == ("a: 3, load", "0 (light) to 0.9 (dark)")
    assert [title for title, _ in heats] == ["a: 3, load", "b: 3, load", "b: 4, load"]
    assert heats[1][1] == heats[0][1]


@pytest.mark.parametrize("content", [None, "other"])
def test_a_folder_without_a_run_is_one_line_and_no_page(tmp_path, capsys, content):
    folder, page = tmp_path / "none", tmp_path / "page.html"
    if content:
        make_run(folder / content)
    assert main(["report", str(folder), "--output", str(page)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(folder) in error
    assert ("none/*" in error) == bool(content)
    assert not page.exists()


def test_without_a_run_the_command_says_what_it_needs(capsys):
    assert main(["report"]) == 2
    assert "runs/tiny" in capsys.readouterr().err
    assert main(["report", "--ouput", "x"]) == 2
    assert "nearest: --output" in capsys.readouterr().err


def test_the_page_is_written_whole_or_not_at_all(two, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["report", *map(str, two), "--output", str(page)]) == 0
    assert capsys.readouterr().out.startswith(f"{page}: 2 runs, 0.")
    assert page.read_text().endswith("</html>\n")
    assert main(["report", *map(str, two), "--output", str(tmp_path / "no" / "page.html")]) == 1
    folder = tmp_path / "folder"
    folder.mkdir()
    assert main(["report", *map(str, two), "--output", str(folder)]) == 1
    assert capsys.readouterr().err.count("\n") == 2
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_full_disk_leaves_the_page_of_before(two, tmp_path, monkeypatch, capsys):
    def full(_path, _content):
        raise OSError(28, "No space left on device")

    page = tmp_path / "page.html"
    page.write_text("before")
    monkeypatch.setattr(Path, "replace", full)
    assert main(["report", *map(str, two), "--output", str(page)]) == 1
    assert "No space left" in capsys.readouterr().err
    assert page.read_text() == "before"


def test_a_page_is_there_whole_or_as_before_at_any_moment(two, tmp_path, monkeypatch):
    page, seen = tmp_path / "page.html", []
    page.write_text("before")
    replace = Path.replace

    def watched(path, target):
        seen.append(page.read_text())
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", watched)
    assert main(["report", *map(str, two), "--output", str(page)]) == 0
    assert seen == ["before"]


@pytest.mark.parametrize("log", [False, True])
def test_thinning_keeps_every_spike_and_both_ends(log):
    x = np.arange(1.0, 100_001.0)
    y = np.sin(x / 5000)
    y[54_321], y[70_000], y[3] = 9.0, -9.0, 8.0
    found = thinned(Series(x, y), 1000, log)
    assert len(found.x) <= 1000
    assert {9.0, -9.0, 8.0} <= set(found.y)
    assert found.x[0] <= 3
    assert found.x[-1] >= 99_800
    assert (np.diff(found.x) > 0).all()
    assert np.array_equal(found.y, y[found.x.astype(int) - 1])


def test_a_drawn_curve_has_few_points_and_its_spike(tmp_path):
    folder = make_run(tmp_path / "a", steps=1)
    lines = [json.dumps({"step": n, "lr": 5.0 if n == 2500 else 1.0}) for n in range(1, 5000)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    html, _ = page_of(folder)
    path = re.search(r' d="M([^"]*)"', charts(html)["Learning rate"])[1]
    points = [tuple(map(float, point.split(","))) for point in path.split()]
    assert len(points) <= MOST_POINTS[0]
    heights = sorted(y for _, y in points)
    assert heights[1] - heights[0] > 100


def test_smoothing_is_the_plain_mean_of_its_neighbours():
    y = np.random.default_rng(0).normal(size=400)
    found = smoothed(Series(np.arange(400.0), y)).y
    reach = reach_of(400)
    assert reach == 20
    for index in range(400):
        near = min(reach, index, 399 - index)
        assert found[index] == pytest.approx(y[index - near : index + near + 1].mean())


def test_a_heat_map_has_the_colours_of_its_numbers():
    lists = [[0.0, 1.0], [1.0, None], [1.0, 0.0]]
    drawn = draw_heat("t", np.array([1.0, 2.0, 3.0]), lists, (0.0, 1.0))
    data = base64.b64decode(re.search(r"base64,([^\"]*)", drawn)[1])
    columns, rows = struct.unpack(">II", data[16:24])
    assert (columns, rows) == (3, 2)
    start = data.index(b"IDAT")
    (length,) = struct.unpack(">I", data[start - 4 : start])
    pixels = zlib.decompress(data[start + 4 : start + 4 + length])
    of_row = [pixels[n * 13 + 1 : n * 13 + 13] for n in range(2)]
    light, dark = bytes((247, 251, 255, 255)), bytes((3, 30, 72, 255))
    assert of_row[0] == light + dark + dark
    assert of_row[1][:4] == dark
    assert of_row[1][7] == 0
    assert of_row[1][8:] == light


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (Scale(0, 97, 0, 1), [0, 20, 40, 60, 80]),
        (Scale(1, 1000, 0, 1, log=True), [1, 10, 100, 1000]),
        (Scale(3, 60, 0, 1, log=True), [5, 10, 20, 50]),
        (Scale(0, 3 << 20, 0, 1, unit="bytes"), [n << 19 for n in range(7)]),
        (Scale(-0.02, 0.03, 0, 1), [-0.02, -0.01, 0, 0.01, 0.02, 0.03]),
    ],
)
def test_ticks_are_round(scale, expected):
    assert scale.ticks(6) == pytest.approx(expected)


def test_numbers_are_written_for_people():
    assert written(1_250_000) == "1.25M"
    assert written(3 << 30, "bytes") == "3 GiB"
    assert written(0.1234, "percent") == "12.3 %"
    assert written(0.00025) == "0.00025"
    assert bounds([1.0, 10.0], log=False, to_zero=True)[0] == 0
    assert bounds([5.0, 5.0], log=False) == (0.0, 6.0)
    assert bounds([4.0, 4.0], log=True)[0] < 4 < bounds([4.0, 4.0], log=True)[1]


def test_numbers_of_an_axis_have_digits_enough_to_differ():
    assert told_apart([2.001, 2.002]) == ["2.001", "2.002"]
    assert told_apart([1000, 1500, 2000]) == ["1k", "1.5k", "2k"]
    assert told_apart([2.0, 2.5]) == ["2", "2.5"]
    assert told_apart([0.123, 0.1234], "percent") == ["12.3 %", "12.34 %"]


def test_a_band_that_knows_nothing_does_not_squeeze_the_curves():
    x = np.array([1.0, 2.0])
    dots = Curve(0, "runs", Series(x, np.array([2.0, 3.0])), "dots")
    wide = Chart("t", [dots], bands=[Band(0, x, np.array([1e-9, 2.0]), np.array([3.0, 1e30]))])
    assert wide.ends_of_y() == (1.0, 4.0)
    narrow = Chart("t", [dots], bands=[Band(0, x, np.array([1.9, 2.9]), np.array([2.1, 3.1]))])
    assert narrow.ends_of_y() == (1.9, 3.1)
    band = re.search(r' band" d="M([^"]*)Z"', draw(wide))[1]
    assert all(-50 < float(pair.split(",")[1]) < 310 for pair in band.split())


def test_steps_are_whole_numbers(tmp_path):
    html, _ = page_of(make_run(tmp_path / "a", steps=1))
    assert set(re.findall(r'class="x">([^<]*)<', charts(html)["Gradient norm"])) == {"1", "2"}


def test_a_band_lies_behind_its_line_within_the_chart_and_has_the_colour_of_its_run():
    x = np.array([1e-4, 1e-3, 1e-2])
    line = Curve(2, "law", Series(x, np.array([3.0, 2.0, 1.5])))
    dots = Curve(2, "runs", Series(x, np.array([3.1, 2.0, 1.4])), "dots", ["a", "b<", "c"])
    band = Band(2, x, np.array([2.5, 1.9, 1.0]), np.array([3.5, 2.1, 2.0]))
    chart = Chart("t", [line, dots], log_x=True, whole_x=False, bands=[band])
    drawn = draw(chart)
    assert drawn.index('run-2 band"') < drawn.index('run-2 line"')
    places = re.search(r'band" d="M([^Z]*)Z"', drawn)[1].split(" ")
    heights = [float(place.split(",")[1]) for place in places]
    assert len(places) == 6
    assert min(heights) >= 10
    assert max(heights) <= 260 - 44
    assert [float(place.split(",")[0]) for place in places] == [62, 299, 536, 536, 299, 62]
    assert drawn.count("<circle") == 3
    assert "<title>b&lt;</title></circle>" in drawn
    ticks = re.findall(r'class="x">([^<]*)<', drawn)
    assert {"0.0001", "0.001", "0.01"} < set(ticks)
