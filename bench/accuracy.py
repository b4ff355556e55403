"""Errors for people: the table "Against float64", in the terminal and as markdown, and what breaks a limit."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich import box
from rich.table import Table

from .check import OWN_GRADIENT_LIMIT, OWN_LOGPROB_LIMIT, ROWS
from .labels import labels
from .results import ColumnErrors, Result, Row, by_case
from .sheet import folded

TITLE = "Against float64"
PROVIDER_WIDTH = 15  # leaves the shape its least width beside the numbers, at 80 columns
HEADINGS = ("shape", "provider", "loss", "log p", "gradient", "worst", "median", "rounded", "beyond", "same")


def error(value: float | None) -> str:
    """An error in as few characters as two digits take; a dash where there is none to tell."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    if value <= 0:
        return "0"
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits}e{int(exponent)}"


def _lines(row: Row) -> Iterator[list[str]]:
    """A provider's cells, from the loss on: a line for each sort of column of the gradient."""
    assert row.errors is not None
    same = {None: "–", True: "yes", False: "no"}[row.repeats]

    def cells(columns: ColumnErrors | None) -> list[str]:
        values = (columns.worst, columns.median, columns.rounding, columns.beyond) if columns else (None,) * 4
        return [error(value) for value in values]

    start = [error(row.errors.loss), error(row.errors.logprob)]
    if row.case.mode == "forward":
        yield [*start, "", *[""] * 4, same]
        return
    yield [*start, "sampled", *cells(row.errors.target), same]
    yield ["", "", "others", *cells(row.errors.others), ""]


def _checked(result: Result) -> Iterator[tuple[str, list[Row]]]:
    """Cases by what tells them apart, with those of their rows whose result was checked."""
    names = labels(row.case for row in result.rows)
    for case, rows in by_case(result.rows):
        checked = [row for row in rows if row.errors is not None]
        if checked:
            yield names[case], checked


def table(result: Result) -> Table | None:
    """The errors as a table that fits 80 columns; None where nothing was checked."""
    view = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, title=TITLE, title_justify="left", title_style="bold")
    view.add_column("shape", overflow="fold", min_width=7, max_width=12)
    view.add_column("provider", no_wrap=True)
    for heading in HEADINGS[2:]:
        view.add_column(heading, justify="left" if heading == "gradient" else "right", no_wrap=True)
    for shape, rows in _checked(result):
        for index, row in enumerate(rows):
            style = "bold" if row.is_ours else None
            cells = ("\n".join(column) for column in zip(*_lines(row), strict=True))
            names = [shape if index == 0 else "", folded(row.provider, PROVIDER_WIDTH)]
            view.add_row(*names, *cells, style=style, end_section=index == len(rows) - 1)
    return view if view.row_count else None


def notes(result: Result) -> Iterator[str]:
    """What the table's columns mean."""
    dtypes = dict.fromkeys(row.case.dtype for row in result.rows if row.errors is not None)
    if not dtypes:
        return
    own = " / ".join(f"{OWN_GRADIENT_LIMIT[dtype]:.0e} in {dtype}" for dtype in dtypes).replace("e-0", "e-")
    logprob = f"{OWN_LOGPROB_LIMIT:.0e}".replace("e-0", "e-")
    yield "loss: error relative to the sum of |dloss/dlogp|, which unlike the loss does not cancel."
    yield f"log p: largest absolute error of a log-probability, over all tokens (hpo_fused's limit: {logprob})."
    yield (
        f"gradient: error relative to the row's gradient, over up to {ROWS} rows; the sampled token's column apart "
        "from the others (their root mean square)."
    )
    yield "rounded: of worst, what rounding the exact gradient to the logits' dtype makes by itself."
    yield f"beyond: worst of what a row's error exceeds its own rounding by (hpo_fused's limit: {own})."
    yield "same: whether a second call gave the same loss and gradient, bit for bit."


def broken(result: Result) -> Iterator[str]:
    """A line for each of this package's providers that misses a limit of its own."""
    for shape, rows in _checked(result):
        for row in rows:
            assert row.errors is not None
            misses = [row.errors.broken] if row.errors.broken else []
            if row.repeats is False and row.is_ours:
                misses.append("a second call gave another result")
            if misses:
                yield f"{shape}: {row.provider} misses its own limits: {', '.join(misses)}"


def markdown(result: Result) -> str:
    """The table and its notes as GitHub-flavoured markdown, "" where nothing was checked."""
    lines = []
    for shape, rows in _checked(result):
        for row in rows:
            provider = f"**{row.provider}**" if row.is_ours else row.provider
            lines += ["| " + " | ".join([shape, provider, *cells]) + " |" for cells in _lines(row)]
    if not lines:
        return ""
    head = [
        f"{TITLE}:",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|---|---|---:|---:|---|" + "---:|" * (len(HEADINGS) - 5),
    ]
    return "\n".join([*head, *lines, "", *(f"- {line}" for line in [*broken(result), *notes(result)])])
