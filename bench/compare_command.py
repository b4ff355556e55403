"""The command ``compare`` of ``hpo-fused-bench``: two result files, told as tables and an exit status."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from . import compare_machines, files
from .cases import BatchCase
from .compare import (
    FEW_SAMPLES,
    FLOORS,
    MIB,
    Change,
    Comparison,
    Entry,
    Key,
    Verdict,
    describe,
    entries,
    moved_floors,
    texts,
)
from .compare import compare as compare_entries
from .labels import number
from .linear.results import LinearResult
from .report import busy_warning
from .results import Result
from .sheet import Sheet

MARKS: dict[Verdict | None, str] = {"worse": " ▲", "better": " ▼", "noise": " ~", "same": "", None: ""}
TIMES = (
    "case", "provider", "A ms", "B ms", "B ÷ A", "÷ floor\nA", "÷ floor\nB", "peak\nB ÷ A",
)  # fmt: skip
PEAKS = ("case", "provider", "A MiB", "B MiB", "B ÷ A")
_COMMANDS = f"{', '.join(files.COMMANDS[:-1])} or {files.COMMANDS[-1]}"


_Part = Result | LinearResult


class _Refused(Exception):
    """What makes a comparison impossible, a line each."""


def _read(path: Path) -> tuple[Sequence[_Part], bool]:
    """A file's parts, and whether any of it was interrupted."""
    try:
        result = files.read(path)
        parts = files.parts(result)
    except OSError as error:
        raise _Refused(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise _Refused(str(error)) from None
    try:
        for part in parts:
            compare_machines.check(part)
    except ValueError as error:
        raise _Refused(f"{path}: {error}") from None
    return parts, result.interrupted or any(part.interrupted for part in parts)


def _text(values: Sequence[Any]) -> str:
    return ", ".join("–" if value is None else str(value) for value in values)


def _machines(base: Path, new: Path, a: Sequence[_Part], b: Sequence[_Part], *, allowed: bool) -> list[str]:
    """In what the machines differ, where that is allowed."""
    found = compare_machines.machine_differences(a, b)
    lines = [f"{name}: {_text(old)} in {base}, {_text(now)} in {new}" for name, old, now in found]
    if lines and not allowed:
        lines.append("Their times say nothing of the code. --different-machines compares them all the same.")
        raise _Refused("\n".join(["different machines:", *lines]))
    return lines


def _entries(path: Path, parts: Sequence[_Part]) -> dict[Key, Entry]:
    try:
        return entries(parts)
    except ValueError as error:
        raise _Refused(f"{path}: {error}") from None


def labels(cases: Iterable[BatchCase]) -> dict[BatchCase, str]:
    """What tells cases of one kind apart, in as few words as that takes, after the shape's name."""
    words = {case: texts(case) for case in cases}
    names = dict.fromkeys(name for found in words.values() for name in found)
    told = [name for name in names if len({found[name] for found in words.values()}) > 1]
    sizes = {(found["tokens"], found["layout"]) for found in words.values()}
    if len(sizes) == len({tokens for tokens, _ in sizes}):
        told = [name for name in told if name != "layout"]
    return {
        case: " ".join([case.shape.name, *(found[name] for name in told if found[name])])
        for case, found in words.items()
    }


def _ratio(value: float | None, verdict: Verdict | None) -> str:
    if value is None:  # growth from nothing has no ratio
        return "–" if verdict is None else f"–{MARKS[verdict]}"
    return f"{number(value)}{MARKS[verdict]}"


def _milliseconds(entry: Entry) -> str:
    return entry.status.replace("_", " ") if entry.time is None else number(entry.time.median * 1e3)


def _mib(entry: Entry) -> str:
    return entry.status.replace("_", " ") if entry.peak is None else number(entry.peak / MIB)


def sheets(comparison: Comparison) -> Iterator[Sheet]:
    """A table for each operation, a row for each key in both files."""
    for op in dict.fromkeys(change.key.op for change in comparison.changes):
        changes = [change for change in comparison.changes if change.key.op == op]
        memory_only = changes[0].key.is_memory
        names = labels(change.key.case for change in changes)
        view = Sheet(op, PEAKS if memory_only else TIMES, 2)
        for case, rows in groupby(changes, key=lambda change: change.key.case):
            for change in rows:
                base, new, memory = change.base, change.new, _ratio(change.memory_ratio, change.memory)
                if memory_only:
                    cells = [_mib(base), _mib(new), memory]
                else:
                    cells = [
                        _milliseconds(base), _milliseconds(new), _ratio(change.time_ratio, change.time),
                        number(base.over_floor), number(new.over_floor),
                        "" if change.key.provider in FLOORS else memory,
                    ]  # fmt: skip
                view.add(names[case], change.key.name, *cells, ours=change.key.is_ours)
            view.end_section()
        yield view


def legend(comparison: Comparison, threshold: float) -> Iterator[str]:
    """What the tables' marks and columns mean."""
    yield (
        f"▲ worse, ▼ better: by more than {100 * threshold:.3g}% and, of times, with 20–80 % bands that do not "
        "overlap; ~ by more, but the bands overlap: noise. Only hpo_fused's rows count."
    )
    if any(change.time is not None for change in comparison.changes):
        yield f"÷ floor: median over rounds of this time / {' or '.join(FLOORS)} of the same case in the same round."
    few = [change for change in comparison.changes if change.time and _samples(change) < FEW_SAMPLES]
    if few:
        yield f"{len(few)} times are of fewer than {FEW_SAMPLES} rounds: their bands say nothing of noise."


def _samples(change: Change) -> int:
    return min(change.base.samples, change.new.samples)


def _where(key: Key) -> str:
    return f"{key.op}, {describe(key.case)}: {key.name}"


def changes_told(change: Change) -> Iterator[str]:
    """What became worse in a row, with the values it is judged by."""
    base, new = change.base, change.new
    if change.time == "worse" and base.time and new.time:
        a, b = base.time, new.time
        floor = ""
        if base.over_floor is not None and new.over_floor is not None:
            floor = f", {number(base.over_floor)} → {number(new.over_floor)} ÷ floor"
        yield (
            f"time {number(a.median * 1e3)} → {number(b.median * 1e3)} ms (20–80 %: {number(a.q20 * 1e3)}–"
            f"{number(a.q80 * 1e3)} → {number(b.q20 * 1e3)}–{number(b.q80 * 1e3)}){floor}"
        )
    if change.memory == "worse" and base.peak is not None and new.peak is not None:
        yield f"peak memory {number(base.peak / MIB)} → {number(new.peak / MIB)} MiB"
    yield from change.faults


def context(comparison: Comparison, threshold: float) -> Iterator[str]:
    """What the tables do not show and nobody is blamed for."""
    floors = moved_floors(comparison, threshold)
    for change in floors:
        assert change.time_ratio is not None
        yield f"{_where(change.key)} took {number(change.time_ratio)} times as long, and is none of hpo_fused's code."
    if floors:
        yield "Where the floor moved, the machine did: read ÷ floor instead of B ÷ A, and measure again."
    for change in comparison.changes:
        if not change.key.is_ours:
            yield from (f"{_where(change.key)}: {fault}" for fault in change.faults)
        yield from (f"{_where(change.key)}: no longer so: {fix}" for fix in change.fixes)
        if not change.faults and not change.fixes and change.base.status != change.new.status:
            note = f": {change.new.note}" if change.new.note else ""
            yield f"{_where(change.key)}: {_status(change.base)} in A, {_status(change.new)} in B{note}"
    yield from _only("A", comparison.only_base)
    yield from _only("B", comparison.only_new)


def _status(entry: Entry) -> str:
    return entry.status.replace("_", " ")


def _only(file: str, found: Mapping[Key, Entry]) -> Iterator[str]:
    for (op, case), keys in groupby(found, key=lambda key: (key.op, key.case)):
        names = [key.name if (entry := found[key]).status == "ok" else f"{key.name} ({_status(entry)})" for key in keys]
        yield f"only in {file}: {op}, {describe(case)}: {', '.join(names)}"


def _head(file: str, path: Path, parts: Sequence[_Part], interrupted: bool) -> Iterator[str]:
    """A file: where it comes from, and what makes its times doubtful."""
    for part in parts:
        found = part.environment
        where = found.get("gpu") or f"{found['cpu']}, {found['threads']} threads"
        yield f"{file}: {path}, {part.command}, {found.get('created', 'undated')}, {where}"
        if part.interrupted:
            yield f"{file}: {part.command} was interrupted: rows or rounds are missing"
        if warning := busy_warning(part):
            yield f"{file}: {warning}"
    if interrupted and not any(part.interrupted for part in parts):
        yield f"{file}: was interrupted between its parts: some are missing"


def verdict(comparison: Comparison) -> str:
    """One line, about rows that were compared."""
    compared, judged = len(comparison.compared), len(comparison.judged)
    rows = f"{compared} row{'s' * (compared != 1)} of hpo_fused"
    count = len(comparison.regressions)
    said = f"{count} of {rows} regressed" if count else f"No regression in {rows}"
    return f"{said}." if compared == judged else f"{said}; {compared} of {judged} compared."


def _refuse_too_little(comparison: Comparison, base: Path, new: Path) -> None:
    """Raise where silence about regressions would say more than was compared."""
    if not comparison.judged:
        raise _Refused(f"{base} and {new} have no row of hpo_fused in common that is ok in {base}")
    lines = [f"{_where(key)}: in {base}, and missing from {new}, which was interrupted" for key in comparison.cut_off]
    compared, judged = len(comparison.compared), len(comparison.judged)
    if not compared:
        lines.append(f"0 of {judged} row{'s' * (judged != 1)} of hpo_fused compared: {new} has no result of it")
    elif lines:
        lines.append(f"{verdict(comparison)} That is not all of {base}: measure again.")
    if lines:
        raise _Refused("\n".join(lines))


def _show(comparison: Comparison, threshold: float, out: Console) -> None:
    for sheet in sheets(comparison):
        out.print()
        out.print(sheet.table())
    out.print()
    for line in legend(comparison, threshold):
        out.print(line, style="dim", highlight=False, markup=False)
    for line in context(comparison, threshold):
        out.print(line, style="yellow", highlight=False, markup=False)
    for change in comparison.regressions:
        for line in changes_told(change):
            out.print(f"{_where(change.key)}: {line}", style="red", highlight=False, markup=False)


def compare(
    base: Annotated[Path, typer.Argument(metavar="A", help=f"The base: a result of {_COMMANDS}.")],
    new: Annotated[Path, typer.Argument(metavar="B", help="The new one.")],
    threshold: Annotated[
        float, typer.Option(min=0.0, help="Share by which a time or a peak may grow before it is a regression.")
    ] = 0.1,
    different_machines: Annotated[
        bool, typer.Option("--different-machines", help="Compare results of different machines, too.")
    ] = False,
) -> None:
    """Compare two results, B with A: times, peak memory, and what is right.

    Rows are matched by what they measured. A time regressed where its median grew by more than the threshold and the
    20–80 % bands do not overlap, a peak where it grew by more than the threshold and 1 MiB. Exit status: 0 without a
    regression of hpo_fused, 1 with one, 2 where the files cannot be compared: different machines, no row of hpo_fused
    in both, or rows of the base that an interrupted new run lacks.
    """
    if not math.isfinite(threshold):
        raise typer.BadParameter(f"--threshold must be finite, got {threshold}")
    out = Console()
    try:
        (a, cut_a), (b, cut_b) = _read(base), _read(new)
        machines = _machines(base, new, a, b, allowed=different_machines)
        comparison = compare_entries(_entries(base, a), _entries(new, b), threshold, cut_short=cut_b)
        if not comparison.changes:
            raise _Refused(f"{base} and {new} have no row in common")
        for file, path, parts, cut in (("A", base, a, cut_a), ("B", new, b, cut_b)):
            for line in _head(file, path, parts, cut):
                out.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)
        for line in machines:
            out.print(f"different machines: {line}", style="yellow", highlight=False, markup=False, soft_wrap=True)
        for name, old, now in compare_machines.other_differences(a, b):
            out.print(f"{name}: {_text(old)} → {_text(now)}", highlight=False, markup=False, soft_wrap=True)
        for command, (name, old, now) in compare_machines.setting_differences(a, b):
            text = f"{command}'s {name}: {_text(old)} → {_text(now)}"
            out.print(text, highlight=False, markup=False, soft_wrap=True)
        _show(comparison, threshold, out)
        if not comparison.regressions:
            _refuse_too_little(comparison, base, new)
    except _Refused as error:
        for line in str(error).splitlines():
            typer.echo(f"hpo-fused-bench compare: {line}", err=True)
        raise typer.Exit(2) from None
    out.print(verdict(comparison), style="bold", highlight=False)
    if comparison.regressions:
        raise typer.Exit(1)
