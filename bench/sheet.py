"""A table that is printed on a terminal and as markdown from the same cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.table import Table


@dataclass
class Sheet:
    """Cells under headings.

    Args:
        title: printed above; "" for none.
        headings: one for each column; a line break in it counts on a terminal only.
        texts: how many columns, from the first on, are words; the others are numbers.
    """

    title: str
    headings: Sequence[str]
    texts: int = 1
    rows: list[tuple[list[str], bool]] = field(default_factory=list)
    sections: set[int] = field(default_factory=set)

    def add(self, *cells: str, ours: bool = False) -> None:
        """A row, shorter ones filled up; bold where it is ours."""
        self.rows.append(([*cells, *[""] * (len(self.headings) - len(cells))], ours))

    def end_section(self) -> None:
        """A line below the last row, on a terminal."""
        self.sections.add(len(self.rows) - 1)

    def table(self) -> Table:
        """For a terminal; what the first column says is not repeated from row to row."""
        view = Table(
            box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), collapse_padding=True, show_edge=False,
            title=self.title or None, title_justify="left", title_style="bold",
        )  # fmt: skip
        for index, heading in enumerate(self.headings):
            # The first column gives way where the terminal is narrow.
            left = index < self.texts
            view.add_column(heading, justify="left" if left else "right", no_wrap=index > 0, overflow="fold")
        last = ""
        for index, (cells, ours) in enumerate(self.rows):
            first = "" if cells[0] == last else cells[0]
            last = "" if index in self.sections else cells[0]
            view.add_row(first, *cells[1:], style="bold" if ours else None, end_section=index in self.sections)
        return view

    def markdown(self) -> list[str]:
        """As GitHub-flavoured markdown, the title as a line above."""
        lines = [f"{self.title}:", ""] if self.title else []
        lines.append("| " + " | ".join(_flat(heading) for heading in self.headings) + " |")
        lines.append("|" + "---|" * self.texts + "---:|" * (len(self.headings) - self.texts))
        for cells, ours in self.rows:
            bold = [f"**{cell}**" if ours and cell and index < self.texts else cell for index, cell in enumerate(cells)]
            lines.append("| " + " | ".join(bold) + " |")
        return lines


def _flat(heading: str) -> str:
    """Without its line break: a hyphenated word in one, other words side by side."""
    return heading.replace("-\n", "").replace("\n/", "/").replace("\n", " ").strip()
