"""The page that compares predictions with published tables says what its script gives."""

import importlib
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "results"
PAGE = (FOLDER / "published.md").read_text()


@pytest.fixture
def published(monkeypatch):
    """The script."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("published")


def text_of(published, name: str) -> str:
    start, end = published.block(PAGE, name)
    return PAGE[start:end]


@pytest.mark.parametrize("name", ["lasp2", "memory", "gains", "lengths", "ladder"])
def test_a_table_is_what_its_fit_gives(published, name):
    assert published.SECTIONS[name]() == text_of(published, name), (
        f"run python docs/results/published.py {name}, and read what it changes"
    )


@pytest.mark.cluster
@pytest.mark.parametrize("name", ["collectives", "operators", "delays"])
def test_a_table_that_takes_seconds_is_what_its_fit_gives(published, name):
    assert published.SECTIONS[name]() == text_of(published, name)


@pytest.mark.cluster
def test_speeds_follow_from_the_constants_on_the_page(published):
    text = text_of(published, "speeds")
    numbers = re.findall(r"(\S+?)[,.]?(?= seconds LASP|\n)", text.splitlines()[0] + "\n")
    table = published.speeds()
    table.__dict__["constants"] = tuple(float(number) for number in numbers)
    assert table.text() == text


def test_no_table_fits_more_than_two_constants_or_more_than_half_its_cells(published):
    for name in ("lasp2", "memory", "gains", "collectives", "lengths"):
        table = getattr(published, name)()
        assert len(table.start) <= 2
        fitted = sum(cell.fitted for cell in table.cells)
        assert fitted <= (len(table.cells) + 1) // 2 if table.start else fitted == 0


def test_a_fit_finds_constants_that_explain_everything(published):
    def cell(x: float):
        return published.Cell((), 3.0 + 0.5 * x, lambda a, b: a + b * x, True)

    assert published.fit([cell(x) for x in (1, 2, 8)], (1.0, 1.0)) == pytest.approx((3.0, 0.5))
