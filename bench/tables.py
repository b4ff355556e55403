"""Tables that are printed on a terminal and written as markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

MIB = 1 << 20
NOTHING = "–"


def number(value: float | None) -> str:
    """Three digits or all those before the point, never in exponent form; a dash where there is nothing."""
    if value is None or not math.isfinite(value):
        return NOTHING
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(0, min(digits, 3))}f}"


def mib(size: float | None) -> str:
    """Bytes in MiB."""
    return number(None if size is None else size / MIB)


def error(value: float | None) -> str:
    """An error in as few characters as two digits take; a dash where there is none to tell."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return str(value)
    return "0" if value <= 0 else f"{value:.1e}".replace("e-0", "e-")


@dataclass
class Table:
    """A table with notes below; the first ``left`` columns are aligned to the left, the others to the right.

    A bold row stands out as a whole, in markdown by its second cell.
    Rows that begin with the same cell belong together.
    """

    title: str
    headings: Sequence[str]
    left: int = 2
    rows: list[list[str]] = field(default_factory=list)
    bold: list[bool] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells: str, bold: bool = False) -> None:
        """Add a row; cells that are missing at its end stay empty."""
        self.rows.append([*cells, *[""] * (len(self.headings) - len(cells))])
        self.bold.append(bold)

    def print(self, out: Console) -> None:
        """Print on a terminal: a section for each first cell, under it, since it is long."""
        out.print(f"\n{self.title}", style="bold", markup=False)
        for first, group in groupby(zip(self.rows, self.bold, strict=True), key=lambda pair: pair[0][0]):
            view = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
            for index, heading in enumerate(self.headings[1:], start=1):
                number_like = index >= self.left
                view.add_column(
                    heading, justify="right" if number_like else "left", overflow="fold", no_wrap=number_like
                )
            for cells, bold in group:
                view.add_row(*map(escape, cells[1:]), style="bold" if bold else None)
            out.print(first, style="bold cyan", markup=False)
            out.print(view)
        for note in self.notes:
            out.print(note, style="dim", markup=False)

    def markdown(self) -> str:
        """GitHub-flavoured markdown of the table and its notes."""
        rule = ["---"] * self.left + ["---:"] * (len(self.headings) - self.left)
        rows = [
            [row[0], f"**{row[1]}**", *row[2:]] if bold else row for row, bold in zip(self.rows, self.bold, strict=True)
        ]
        lines = [f"| {' | '.join(cells)} |" for cells in (self.headings, *rows)]
        lines.insert(1, f"|{'|'.join(rule)}|")
        return "\n".join([f"## {self.title}", "", *lines, "", *(f"- {note}" for note in self.notes)]).rstrip()
