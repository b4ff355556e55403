"""Times for people: the terminal's table, the one-line verdict, and markdown for a README, errors included."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich import box
from rich.table import Table

from . import accuracy, memory_report
from .labels import describe, labels, number
from .results import COPY, COPY_NEW, Measurement, Result, ResultFile, Row, by_case
from .sheet import NAME_WIDTH, folded, words_folded

MIB = 1 << 20
BUSY = 0.1  # share of the CPUs in use by others from which a warning is printed
# Where copying to new memory takes this many times longer, page faults are what is measured, and worth a hint.
PAGE_FAULTS, PAGE_FAULT_BYTES = 2.0, 32 * MIB  # below, the C library keeps what it freed


def _cells(row: Row) -> list[str]:
    """A timed row's cells, from the median on."""
    assert row.median_s is not None and row.q20_s is not None and row.q80_s is not None
    return [
        number(row.median_s * 1e3),
        f"{number(row.q20_s * 1e3)}–{number(row.q80_s * 1e3)}",
        "–" if row.ratio_to_ours is None else f"{number(row.ratio_to_ours)}×",
        number(row.gb_per_s),
        "–" if row.share_of_copy is None else number(100 * row.share_of_copy),
        "" if row.is_copy else ("–" if row.peak_extra_bytes is None else number(row.peak_extra_bytes / MIB)),
    ]


HEADINGS = ("shape", "provider", "median ms", "20–80 %", "time ÷ ours", "GB/s", "% of copy", "peak MiB")
NARROW = ("median\nms", "20–80 %", "time\n÷ ours", "GB/s", "% of\ncopy", "peak\nMiB")  # on a terminal


def table(result: Result) -> Table:
    """The result as a table that fits 80 columns without a digit cut off; a section for each case."""
    view = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), collapse_padding=True, show_edge=False)
    view.add_column("shape", overflow="fold", min_width=7, max_width=14)
    view.add_column("provider", no_wrap=True)
    for heading in NARROW:
        view.add_column(heading, justify="right", no_wrap=True)
    names = labels(row.case for row in result.rows)
    for case, rows in by_case(result.rows):
        for index, row in enumerate(rows):
            shape = names[case] if index == 0 else ""
            cells = _cells(row) if row.median_s is not None else [words_folded(row.status.replace("_", " "))]
            style = "bold" if row.is_ours else "dim" if row.is_copy else None
            view.add_row(
                shape, folded(row.provider, NAME_WIDTH), *cells, style=style, end_section=index == len(rows) - 1
            )
    return view


def _reasons(rows: Iterable[Row]) -> list[str]:
    """A line for each reason why something was not timed."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.status != "ok":
            reasons.setdefault((row.status, row.note), []).append(row.provider)
    return [f"{', '.join(who)}: {status.replace('_', ' ')}: {note}" for (status, note), who in reasons.items()]


def notes(result: Result) -> Iterator[str]:
    """What the table cannot say: the cases in full, whatever was not timed, and what the columns mean."""
    names = labels(row.case for row in result.rows)
    found = [(names[case], case, _reasons(rows)) for case, rows in by_case(result.rows)]
    everywhere = [line for line in found[0][2] if all(line in lines for _, _, lines in found)] if len(found) > 1 else []
    for name, case, lines in found:
        yield f"{name}: {describe(case)}"
        yield from (f"  {line}" for line in lines if line not in everywhere)
    yield from everywhere
    yield from left_out(result.rows)
    if not any(row.median_s for row in result.rows):
        return
    gradients = {row.gradient_bytes for row in result.rows if row.gradient_bytes}
    sizes = " / ".join(number(size / MIB) for size in sorted(gradients)) or "–"
    modes = {row.case.mode for row in result.rows}
    read = "the logits"
    if any(row.case.inactive and row.case.op == "logits" for row in result.rows):
        read = "the logits of rows that have an advantage"
    yield (
        f"GB/s: one read of {read} and one write of the whole gradient over the median time"
        + (" (forward: the read alone; gradient: open)." if modes != {"both"} else ".")
    )
    if any(row.case.ragged for row in result.rows):
        yield "ragged: who skips padding reads less, so neither GB/s nor % of copy is told."
    if "gradient" in modes:
        yield "gradient: backward alone; who makes the gradient in its forward has next to nothing left to do there."
        yield "peak MiB of the gradient: with its forward, whose results are held meanwhile."
    yield "% of copy: speed reached, of that of copying the logits to memory already in use."
    yield f"peak MiB: beyond the inputs, gradient included (which alone is {sizes} MiB)."
    if any(row.provider == COPY_NEW for row in result.rows):
        yield "copy_new: the same to new memory, as an operation that returns a new tensor does by default."
    hint = page_fault_hint(result)
    if hint:
        yield hint


def left_out(rows: Iterable[Measurement]) -> Iterator[str]:
    """A line for each provider that was right, and does less than the functions of this package."""
    yield from dict.fromkeys(
        f"{row.provider} leaves out: {row.leaves_out}" for row in rows if row.status == "ok" and row.leaves_out
    )


def page_fault_hint(result: Result) -> str:
    """Advice where the system's handing out of memory takes most of a copy's time, or ""."""
    on_linux_cpu = "gpu" not in result.environment and result.environment.get("transparent_huge_pages") is not None
    if not on_linux_cpu or result.environment.get("thp_mem_alloc_enable") == "1":
        return ""
    for case, rows in by_case(result.rows):
        if case.logits_bytes < PAGE_FAULT_BYTES:
            continue
        medians = {row.provider: row.median_s for row in rows if row.is_copy and row.median_s}
        new, reused = medians.get(COPY_NEW), medians.get(COPY)
        if new and reused and new > PAGE_FAULTS * reused:
            return (
                f"{1 - reused / new:.0%} of copy_new is page faults; "
                "with THP_MEM_ALLOC_ENABLE=1 in the environment PyTorch asks for huge pages."
            )
    return ""


def _spread(values: list[float], unit: str) -> str:
    texts = dict.fromkeys(f"{value:.2f}" if value < 10 else f"{value:.0f}" for value in (min(values), max(values)))
    return "–".join(texts) + unit


def _steps(result: Result) -> list[Row]:
    """Rows of whole steps without inactive rows; where there are none, of the only kind of case there is, if it is one.

    What is read and written, and by whom what is left out, differs from kind to kind: one number would mix them.
    """

    def kind(row: Row) -> tuple[str, str, float]:
        return row.case.op, row.case.mode, row.case.inactive

    whole = [row for row in result.rows if kind(row) == ("logits", "both", 0.0)]
    return whole or (result.rows if len({kind(row) for row in result.rows}) == 1 else [])


def verdict(result: Result) -> str:
    """One line: how our first provider that was timed stands against the others, over all cases of whole steps."""
    rows = [row for row in _steps(result) if row.status == "ok" and row.median_s is not None]
    if result.rows and not _steps(result):
        return "No verdict: several kinds of cases, and no whole step without inactive rows."
    base = next((row.provider for row in rows if row.is_ours), None)
    if base is None:
        return "No verdict: hpo_fused was not timed."
    ratios: dict[str, list[float]] = {}
    shares: list[float] = []
    for row in rows:
        if row.provider == base:
            shares += [] if row.share_of_copy is None else [100 * row.share_of_copy]
        elif not row.is_copy and row.ratio_to_ours is not None:
            ratios.setdefault(row.provider, []).append(row.ratio_to_ours)
    words = []
    for name, values in ratios.items():
        if max(values) < 1:
            words.append(f"{_spread([1 / value for value in values], '×')} slower than {name}")
        else:
            words.append(f"{_spread(values, '×')} the speed of {name}")
    words += [f"{_spread(shares, '%')} of a bare copy's"] if shares else []
    return f"{base}: {', '.join(words) or 'timed alone'}."


def busy_warning(result: ResultFile) -> str:
    """A warning where other processes took so much of the CPUs that times on them mean little, or ""."""
    others = max((row.others_cpu or 0.0 for row in result.measurements), default=0.0)
    if others < BUSY:
        return ""
    return f"Other processes used {others:.0%} of the CPUs meanwhile: do not trust these times."


def environment_line(result: ResultFile) -> str:
    """The machine and the versions in one line."""
    found = result.environment
    where = found.get("gpu") or f"{found['cpu']}, {found['threads']} thread{'s' * (found['threads'] != 1)}"
    triton = f", triton {found['triton']}" if found.get("triton") else ""
    return f"{where}; torch {found['torch']}{triton}, python {found['python']}, hpo_fused {found['hpo_fused']}"


def times(result: Result) -> list[str]:
    """Times and peak memory as GitHub-flavoured markdown, without notes."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|---|" + "---:|" * (len(HEADINGS) - 2)]
    names = labels(row.case for row in result.rows)
    for row in result.rows:
        cells = _cells(row) if row.median_s is not None else [row.status.replace("_", " "), *[""] * 5]
        provider = f"**{row.provider}**" if row.is_ours else row.provider
        lines.append("| " + " | ".join([names[row.case], provider, *cells]) + " |")
    return lines


def markdown(result: Result) -> str:
    """The result as GitHub-flavoured markdown: times, then errors, each with what is needed to read them."""
    interrupted = ["Interrupted: rows or rounds are missing."] if result.interrupted else []
    warnings = filter(None, [busy_warning(result)])
    below = [environment_line(result) + ".", *interrupted, *warnings, *notes(result)]
    lines = [*times(result), "", *(f"- {line.strip()}" for line in below)]
    if not result.rows:
        lines = [environment_line(result) + "."]
    errors = accuracy.markdown(result)
    lines += ["", errors] if errors else []
    for sheet in memory_report.sheets(result):
        lines += ["", *sheet.markdown()]
    lines += ["", *(f"- {line}" for line in memory_report.notes(result))] if result.memory else []
    return "\n".join(lines)
