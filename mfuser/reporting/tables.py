"""Tables, written once: framed for a terminal, in plain lines, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table as RichTable

UNLIMITED = 200
"""Width in characters where the output is not a terminal."""


@dataclass(frozen=True)
class Table:
    """heads: of the columns. left: how many columns, from the first, are text, flush left; the
    others hold numbers, flush right, but for the last `tail`, which are text again. strong: the
    first cell of the row that sums up the others."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    left: int = 1
    tail: int = 0
    strong: str | None = None

    def framed(self) -> RichTable:
        """The table for a terminal, with a rule above the strong row."""
        from rich.table import Table as RichTable

        table = RichTable(title=self.title or None, title_justify="left")
        for k, head in enumerate(self.heads):
            table.add_column(head, justify="left" if self._is_text(k) else "right")
        for row in self.rows:
            if row[0] == self.strong:
                table.add_section()
            table.add_row(*row, style="bold" if row[0] == self.strong else None)
        return table

    def lines(self) -> list[str]:
        """Aligned columns without a frame; heads first, unless all are empty."""
        rows = [self.heads, *self.rows] if any(self.heads) else self.rows
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(self._aligned(row, widths)).rstrip() for row in rows]

    def markdown(self) -> list[str]:
        """Lines of a Markdown table, the strong row in bold; the title is left to the caller."""
        lines = [self._row(self.heads)]
        rule = ("---" if self._is_text(k) else "--:" for k in range(len(self.heads)))
        lines.append("|" + "|".join(rule) + "|")
        for row in self.rows:
            bold = row[0] == self.strong
            lines.append(self._row([f"**{c}**" if bold and c else c for c in row]))
        return lines

    def _is_text(self, column: int) -> bool:
        return column < self.left or column >= len(self.heads) - self.tail

    def _aligned(self, row: Sequence[str], widths: Sequence[int]) -> list[str]:
        return [
            cell.ljust(width) if self._is_text(k) else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]

    @staticmethod
    def _row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"


def document(title: str, parts: Iterable[str | Table], pictures: Sequence[str] = ()) -> str:
    """A Markdown page: a paragraph per text, tables under their titles, pictures at the end."""
    lines = [f"# {title}", ""]
    for part in parts:
        if isinstance(part, str):
            lines += [part, ""]
        else:
            lines += [f"## {part.title}", ""] if part.title else []
            lines += [*part.markdown(), ""]
    lines += [f"![{picture}]({picture})" for picture in pictures]
    return "\n".join(lines).rstrip() + "\n"


def csv_text(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """CSV for programs: None becomes an empty cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(["" if cell is None else cell for cell in row] for row in rows)
    return out.getvalue()


def show(*parts: str | Table) -> None:
    """Tables and lines on standard output; nothing is cut where that is not a terminal."""
    from rich.console import Console

    out = Console()
    if not out.is_terminal:
        out = Console(width=UNLIMITED)
    for part in parts:
        if isinstance(part, str):
            out.print(part, highlight=False, markup=False, soft_wrap=True)
        else:
            out.print(part.framed(), highlight=False, markup=False)
