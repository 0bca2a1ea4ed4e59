"""One table, four forms: the same cells everywhere."""

from __future__ import annotations

import csv
import io

import pytest

from mfuser.reporting.tables import Table, csv_text, document, show

TABLE = Table(
    ("model", "params", "mIoU", "license"),
    [("a [b]", "1,000", "51.0", "MIT"), ("all", "22", "", "Apache-2.0")],
    title="Costs",
    tail=1,
    strong="all",
)


def test_markdown_aligns_numbers_and_marks_the_sum() -> None:
    assert TABLE.markdown() == [
        "| model | params | mIoU | license |",
        "|---|--:|--:|---|",
        "| a [b] | 1,000 | 51.0 | MIT |",
        "| **all** | **22** |  | **Apache-2.0** |",
    ]


def test_plain_lines_are_aligned() -> None:
    assert TABLE.lines() == [
        "model  params  mIoU  license",
        "a [b]   1,000  51.0  MIT",
        "all        22        Apache-2.0",
    ]
    assert Table(["", ""], [("a", "x"), ("bb", "y")], left=2).lines() == ["a   x", "bb  y"]


def test_a_document_has_tables_under_their_titles_and_pictures_last() -> None:
    text = document("Title", ["Before.", TABLE, "After."], ["plot.png"])
    assert text.startswith("# Title\n\nBefore.\n\n## Costs\n\n| model |")
    assert text.endswith("| **Apache-2.0** |\n\nAfter.\n\n![plot.png](plot.png)\n")


def test_csv_quotes_and_leaves_empty_what_is_missing() -> None:
    text = csv_text(["a", "b"], [['x, "y"', None], [1, 2.5]])
    assert list(csv.reader(io.StringIO(text))) == [["a", "b"], ['x, "y"', ""], ["1", "2.5"]]


def test_nothing_is_cut_or_read_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    long = Table(["x" * 90, "y" * 90], [("[red]a[/red]", "1")])
    show(long, "[bold]a line[/bold] " + "z" * 300)
    out = capsys.readouterr().out
    assert "x" * 90 in out and "y" * 90 in out and "[red]a[/red]" in out
    assert "[bold]a line[/bold] " + "z" * 300 + "\n" in out
