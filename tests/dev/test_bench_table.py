"""docs/adapter-types.md holds what `dev.py bench table` writes."""

import pytest

from lora_weave.devtools.paths import ROOT


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import table

    return table


def figures_of(table, page):
    """The figures of the page's table, without their stars."""
    text = page.split(table.START)[1].split(table.END)[0]
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [
        table.Figures(case, *(float(cell.split()[0]) for cell in cells[: len(table.COLUMNS)]))
        for case, *cells in lines[2:]
    ]


def test_the_page_is_what_the_script_makes_of_its_figures(table):
    """Columns, rows, their order and the stars."""
    page = table.PAGE.read_text("utf-8")
    rows = figures_of(table, page)
    assert [row.case for row in rows] == [kind.label for kind in table.TYPES]
    assert table.markdown(rows) in page


def test_the_page_keeps_its_text_when_written(table, tmp_path, monkeypatch):
    page = table.PAGE.read_text("utf-8")
    copy = tmp_path / "page.md"
    copy.write_text(page, "utf-8")
    monkeypatch.setattr(table, "PAGE", copy)
    table.write("new\n")
    before, after = page.split(table.START)[0], page.split(table.END)[1]
    assert copy.read_text("utf-8") == f"{before}{table.START}new\n{table.END}{after}"


@pytest.mark.parametrize(
    ("values", "stars"),
    [
        ([1.0, 10.0, 100.0], [5, 3, 1]),
        ([4.0, 1.0, 2.0], [1, 5, 3]),
        ([1.0, 1.02], [5, 5]),
        ([2.0], [5]),
    ],
)
def test_stars_by_place_on_a_logarithmic_scale(table, values, stars):
    assert list(map(len, table.stars_of(values))) == stars
