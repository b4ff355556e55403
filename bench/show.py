"""A result on the terminal, and the exit status that it asks for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import typer
from rich.console import Console

from . import accuracy, files, memory_report, report
from . import limits as logits_limits
from .arguments import INTERRUPTED
from .evidence import Evidence
from .linear import limits
from .linear import report as linear_report
from .linear.results import LinearResult
from .results import Result, ResultFile

BAD = ("wrong", "failed")


def _show_logits(result: Result, out: Console) -> None:
    if result.command == "speed":
        out.print(report.table(result))
    for line in report.notes(result) if result.rows else ():
        out.print(line, style="dim", highlight=False, markup=False)
    if (errors := accuracy.table(result)) is not None:
        out.print()
        out.print(errors)
    for line in accuracy.notes(result):
        out.print(line, style="dim", highlight=False, markup=False)
    for line in accuracy.broken(result):
        out.print(line, style="red", highlight=False, markup=False)
    for sheet in memory_report.sheets(result):
        out.print()
        out.print(sheet.table())
    for line in memory_report.notes(result):
        out.print(line, style="dim", highlight=False, markup=False)
    if warning := report.busy_warning(result):
        out.print(warning, style="yellow", highlight=False)
    if result.interrupted:
        out.print("Interrupted: what was finished is above.", style="yellow")
    if result.command == "speed":
        out.print(report.verdict(result), style="bold", highlight=False)


def _show_linear(result: LinearResult, out: Console) -> None:
    for sheet, below in linear_report.sections(result):
        out.print()
        out.print(sheet.table())
        for line in below:
            out.print(line, style="dim", highlight=False, markup=False)
    out.print()
    for line in linear_report.remarks(result):
        out.print(line, style="yellow", highlight=False, markup=False)
    out.print(linear_report.verdict(result), style="bold", highlight=False)


def show(result: ResultFile, out: Console) -> None:
    """Every part's tables, notes and verdict."""
    out.print(report.environment_line(result), style="dim", highlight=False)
    for part in files.parts(result):
        if isinstance(part, LinearResult):
            _show_linear(part, out)
        else:
            _show_logits(part, out)
    for line in result.dropped if isinstance(result, Evidence) else ():
        out.print(line, style="yellow", highlight=False, markup=False)


def wrong(result: ResultFile) -> Iterator[str]:
    """A line for each provider that was wrong or failed, and for each of ours that misses its own limits."""
    for part in files.parts(result):
        for row in part.rows:
            if row.status in BAD:
                yield f"{row.case.shape.name}: {row.provider} {row.status}: {row.note}"
        for memory_row in part.memory:
            if memory_row.status in BAD:
                yield f"{memory_row.provider} at {memory_row.case.tokens} tokens {memory_row.status}: {memory_row.note}"
        yield from limits.wrong(part) if isinstance(part, LinearResult) else accuracy.broken(part)


def complaint(result: ResultFile) -> str:
    """What keeps the result from showing that every limit stated for what was measured is met, or ""."""
    found = []
    for part in files.parts(result):
        found += limits.limits(part) if isinstance(part, LinearResult) else logits_limits.limits(part)
    return logits_limits.meets(found)


def finish(result: ResultFile, output: Path | None, *, check: bool = False) -> None:
    """Show the result and end the command: 130 if it was interrupted, 1 if something was wrong.

    ``check``: 1, too, where a limit is missed, or where one was not measured or none is stated, and says so.
    """
    out = Console()
    show(result, out)
    if output is not None:
        out.print(f"Wrote {output}", highlight=False, soft_wrap=True)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)
    missed = complaint(result) if check else ""
    if missed:
        out.print(f"--check: {missed}.", style="red", highlight=False, markup=False, soft_wrap=True)
    if missed or any(wrong(result)):
        raise typer.Exit(1)
