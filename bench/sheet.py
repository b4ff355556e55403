"""A table that is printed on a terminal and as markdown from the same cells."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.table import Table

NAME_WIDTH = 21  # of a provider's column: the longest name of one in this package, with its mark
# Of a number's column: what its heading is folded to, and from where on a single word of it is broken; and what words
# in its cells are folded to.
HEADING_WIDTH, LONGEST_WORD, WORDS_WIDTH = 8, 9, 12


def folded(text: str, width: int, longest: int | None = None) -> str:
    """``text`` on lines of at most ``width``, broken behind spaces and punctuation; nothing of it is lost.

    Rich cuts what does not fit into its columns, the digits of a number as well: so what can give way is folded before.

    Args:
        longest: characters of a part without such a place from which it is broken anywhere; ``width`` by default.
    """
    most = longest or width
    parts = [part[i : i + most] for part in re.findall(r"[^\s:_/.-]*[\s:_/.-]+|[^\s:_/.-]+", text)
             for i in range(0, len(part), most)]  # fmt: skip
    lines = [""]
    for part in parts:
        if lines[-1] and len((lines[-1] + part).rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def words_folded(cell: str) -> str:
    """The cell of a number, folded where it holds words instead, as of who was out of memory."""
    return folded(cell, WORDS_WIDTH) if cell[:1].isalpha() else cell


@dataclass
class Sheet:
    """Cells under headings.

    Args:
        title: printed above; "" for none.
        headings: one for each column; a line break in it counts on a terminal only.
        texts: how many columns, from the first on, are words; the others are numbers.
        name_width: what words but those of the first column are folded to, on a terminal.
    """

    title: str
    headings: Sequence[str]
    texts: int = 1
    rows: list[tuple[list[str], bool]] = field(default_factory=list)
    sections: set[int] = field(default_factory=set)
    name_width: int = NAME_WIDTH

    def add(self, *cells: str, ours: bool = False) -> None:
        """A row, shorter ones filled up; bold where it is ours."""
        self.rows.append(([*cells, *[""] * (len(self.headings) - len(cells))], ours))

    def end_section(self) -> None:
        """A line below the last row, on a terminal."""
        self.sections.add(len(self.rows) - 1)

    def table(self) -> Table:
        """For a terminal; what the first column says is not repeated from row to row.

        Words are folded and numbers are not, whatever the headings and names: no digit is cut off at 80 columns.
        """
        view = Table(
            box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), collapse_padding=True, show_edge=False,
            title=self.title or None, title_justify="left", title_style="bold",
        )  # fmt: skip
        rows = [[self._folded(index, cell) for index, cell in enumerate(cells)] for cells, _ in self.rows]
        for index, heading in enumerate(self.headings):
            # The first column gives way where the terminal is narrow.
            left = index < self.texts
            if not left and "\n" not in heading:
                longest = max((len(line) for cells in rows for line in cells[index].split("\n")), default=0)
                heading = folded(heading, max(HEADING_WIDTH, longest), LONGEST_WORD)
            view.add_column(heading, justify="left" if left else "right", no_wrap=index > 0, overflow="fold")
        last = ""
        for index, (cells, (_, ours)) in enumerate(zip(rows, self.rows, strict=True)):
            first = "" if cells[0] == last else cells[0]
            last = "" if index in self.sections else cells[0]
            view.add_row(first, *cells[1:], style="bold" if ours else None, end_section=index in self.sections)
        return view

    def _folded(self, index: int, cell: str) -> str:
        if index == 0:
            return cell
        return folded(cell, self.name_width) if index < self.texts else words_folded(cell)

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
