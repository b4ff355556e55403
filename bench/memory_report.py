"""Peak memory against the number of tokens for people, logits given: a table for each operation and shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

from .labels import describe, number
from .results import MemoryRow, Result
from .sheet import Sheet

MIB = 1 << 20


def _series(result: Result) -> Iterator[tuple[str, list[MemoryRow]]]:
    """Rows of cases that differ in their number of tokens only, under what they have in common."""
    for _, group in groupby(result.memory, key=lambda row: replace(row.case, responses=0, length=0)):
        rows = list(group)
        last = rows[-1].case
        yield f"{last.shape.name}, V {last.shape.vocabulary}: {describe(last).partition('), ')[2]}, {last.dtype}", rows


def _cell(row: MemoryRow | None) -> str:
    if row is None:
        return ""
    return row.status.replace("_", " ") if row.peak_extra_bytes is None else number(row.peak_extra_bytes / MIB)


def sheets(result: Result) -> Iterator[Sheet]:
    """Peak memory beyond the inputs, a column for each provider."""
    for title, rows in _series(result):
        names = list(dict.fromkeys(row.provider for row in rows))
        view = Sheet(f"Peak memory beyond the inputs, MiB; {title}", ["tokens", "gradient", *names])
        for tokens, group in groupby(rows, key=lambda row: row.case.tokens):
            found = {row.provider: row for row in group}
            gradient = max(row.gradient_bytes for row in found.values())
            view.add(str(tokens), number(gradient / MIB), *(_cell(found.get(name)) for name in names))
        yield view


def notes(result: Result) -> Iterator[str]:
    """What was not measured, and why."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in result.memory:
        if row.status != "ok":
            reasons.setdefault((row.status, row.note), []).append(f"{row.provider} at {row.case.tokens}")
    for (status, note), names in reasons.items():
        yield f"{', '.join(dict.fromkeys(names))}: {status.replace('_', ' ')}: {note}"
    if result.memory:
        yield "gradient: its own size, which is part of every peak."
