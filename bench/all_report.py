"""Everything that ``all`` measured, for people: a short table, and a markdown report that answers questions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from . import accuracy, compile_table, limits, memory_report, report
from .accuracy import error
from .evidence import CLOCKS, Evidence
from .labels import labels, number
from .linear import limits as linear_limits
from .linear import report as linear_report
from .linear.limits import Limit
from .linear.results import LinearErrors, LinearResult, LinearRow
from .results import Measurement, MemoryRow, Result, Row, by_case
from .roofline import Prediction
from .sheet import Sheet

MIB = 1 << 20
SUMMARY = ("", "provider", "time\n÷ ours", "memory\n÷ ours", "log p\noff by", "gradient\noff by", "% of\nlimit")
# Settings of the evidence that the report reads.
COMMAND_LINE, PICTURES, KERNELS_ASKED = "command_line", "pictures", "kernels"


def _main_cases(result: Result) -> Result:
    """Cases of the default training step, on which shapes are compared."""
    return _those(result, main=True)


def _others(result: Result) -> Result:
    """The same shapes in other ways: forward alone, log-probabilities, another dtype, inactive rows."""
    return _those(result, main=False)


def _those(result: Result, *, main: bool) -> Result:
    rows = [
        row for row in result.rows
        if (row.case.op == "logits" and row.case.mode == "both" and row.case.inactive == 0 and row.case.dtype == "bf16")
        is main
    ]  # fmt: skip
    return replace(result, rows=rows, memory=[])


# ---------------------------------------------------------------------------------------------------------------
# the short table


def _ratio(value: float | None, ours: float | None) -> str:
    return "–" if value is None or not ours else f"{number(value / ours)}×"


def _errors(row: Measurement) -> tuple[float | None, float | None]:
    """Of log-probabilities, and of gradients: beyond its rounding from logits, relative to its row in a linear path."""
    if isinstance(row, Row) and row.errors is not None:
        columns = [one.beyond for one in (row.errors.target, row.errors.others) if one is not None]
        return row.errors.logprob, max(columns, default=None)
    if isinstance(row, LinearRow) and isinstance(row.errors, LinearErrors):
        rows = [one.worst for one in (row.errors.hidden, row.errors.weight) if one is not None]
        logprob = row.errors.logprob
        return None if logprob is None else logprob.worst, max(rows, default=None)
    return None, None


def _share(row: Measurement) -> float | None:
    return row.share_of_copy if isinstance(row, Row) else row.share_of_gemms if isinstance(row, LinearRow) else None


def _name(row: Measurement) -> str:
    """The provider, marked where it does less work than the others."""
    return f"{row.provider}*" if row.leaves_out else row.provider


def _add(view: Sheet, title: str, rows: Sequence[Measurement]) -> None:
    ours = next((row.peak_extra_bytes for row in rows if row.is_ours), None)
    for row in rows:
        if row.status == "skipped":
            continue
        if row.status != "ok":
            view.add(title, _name(row), row.status.replace("_", " "), ours=row.is_ours)
            continue
        logprob, gradient = _errors(row)
        share = _share(row)
        time = "–" if row.ratio_to_ours is None else f"{number(row.ratio_to_ours)}×"
        memory = _ratio(row.peak_extra_bytes, ours)
        percent = "–" if share is None else number(100 * share)
        view.add(title, _name(row), time, memory, error(logprob), error(gradient), percent, ours=row.is_ours)
    view.end_section()


def summary(evidence: Evidence) -> Sheet:
    """Who is how much slower, larger and less exact than we are, and how near everybody is to the limit."""
    view = Sheet("", SUMMARY, 2)
    for _, title, rows in _whole_steps(evidence):
        _add(view, title, rows)
    return view


def _whole_steps(evidence: Evidence) -> Iterator[tuple[str, str, list[Measurement]]]:
    """Rows of each whole step without inactive rows, floors apart: what it starts from, its name, and they."""
    if evidence.logits is not None:
        part = _main_cases(evidence.logits)
        names = labels(row.case for row in part.rows)
        for case, rows in by_case(part.rows):
            yield "from logits", f"{names[case]} logits", [row for row in rows if not row.is_copy]
    for head in evidence.linear:
        mine: list[Measurement] = [row for row in head.rows if row.case.inactive == 0 and not row.is_floor]
        if mine:
            yield "in the linear path", _title(head), mine


def _title(part: LinearResult) -> str:
    case = part.rows[0].case if part.rows else part.memory[0].case
    return f"{case.shape.name} linear N={case.tokens}"


def _spread(values: Sequence[float]) -> str:
    ends = dict.fromkeys(number(value) for value in (min(values), max(values)))
    return "–".join(ends) + "×"


def against(evidence: Evidence) -> Iterator[str]:
    """A line for each provider: how many times our time and memory it takes, over all shapes."""
    found: dict[str, dict[str, list[tuple[float, float | None]]]] = {}
    for way, _, rows in _whole_steps(evidence):
        peak = next((row.peak_extra_bytes for row in rows if row.is_ours and row.status == "ok"), None)
        for row in rows:
            if not row.is_ours and row.ratio_to_ours is not None:
                memory = row.peak_extra_bytes / peak if row.peak_extra_bytes is not None and peak else None
                found.setdefault(_name(row), {}).setdefault(way, []).append((row.ratio_to_ours, memory))
    for name, ways in found.items():
        said = []
        for way, pairs in ways.items():
            memories = [memory for _, memory in pairs if memory is not None]
            of_memory = f" and {_spread(memories)} the memory" if memories else ""
            said.append(f"{way} it takes {_spread([time for time, _ in pairs])} the time{of_memory}")
        yield f"{name}: {'; '.join(said)} of hpo_fused."


def summary_notes(evidence: Evidence) -> Iterator[str]:
    """What its columns and marks mean."""
    yield (
        "time, memory ÷ ours: above 1× hpo_fused is faster, or smaller; forward and gradient, peak beyond the inputs."
    )
    yield (
        "log p: largest error against float64. gradient: of logits, what the worst row has beyond one rounding to the "
        "dtype (negative or 0: nothing); of the linear path, the worst row's relative error, rounding included."
    )
    yield "% of limit: speed reached, of copying the logits once, or of the three bare GEMMs of the linear path."
    shown = (row for _, _, rows in _whole_steps(evidence) for row in rows if row.status != "skipped")
    for name, missing in dict.fromkeys((_name(row), row.leaves_out) for row in shown if row.leaves_out):
        yield f"{name} does less work: it leaves out {missing}."


def short(evidence: Evidence) -> str:
    """The short table and what is needed to read it, as markdown."""
    lines = [*summary(evidence).markdown(), ""]
    lines += _bullets([f"{report.environment_line(evidence)}.", *summary_notes(evidence)])
    return "\n".join(lines).rstrip()


def all_limits(evidence: Evidence) -> list[Limit]:
    """Of every part; the linear path's with their head."""
    found = limits.limits(evidence.logits) if evidence.logits is not None else []
    least = limits.TOKENS["gpu" if "gpu" in evidence.environment else "cpu"]
    for part in evidence.linear:
        # Those of time are stated for so many tokens: with fewer, what a call costs by itself weighs more.
        stated = part if part.rows and part.rows[0].case.tokens >= least else replace(part, rows=[])
        for limit in linear_limits.limits(stated):
            found.append(replace(limit, what=f"{_title(part)}: {limit.what}"))
    return found


def verdict(evidence: Evidence) -> list[str]:
    """A line for each of: the limits, the tests, the machine code."""
    found = all_limits(evidence)
    lines = [f"Limits: {limits.counts(found)}." if found else "Limits: none is stated for what was measured."]
    lines += [f"Missed: {limit.what}: {limit.measured}, limit {limit.limit}." for limit in found if limit.met is False]
    lines.append(f"Equivalence tests: {tests_line(evidence)}.")
    if evidence.kernels is not None:
        broken = evidence.kernels["broken"]
        said = f"{len(broken)} limits broken" if broken else "all within their limits"
        lines.append(f"Machine code: {len(evidence.kernels['records'])} kernels compiled, {said}.")
    return lines


def tests_line(evidence: Evidence) -> str:
    """The outcome of the equivalence suite in a line."""
    tests = evidence.tests
    if tests is None:
        return "none run"
    if not tests.passed and not tests.failed:
        return tests.note or "none run"
    said = f"{tests.passed} passed, {tests.failed} failed, {tests.skipped} skipped in {tests.seconds:.0f} s"
    return f"{said} ({tests.note})" if tests.note else said


# ---------------------------------------------------------------------------------------------------------------
# the report


def _bullets(lines: Iterable[str]) -> list[str]:
    found = [f"- {line.strip()}" for line in lines]
    return [*found, ""] if found else []


def _pictures(evidence: Evidence, *kinds: str) -> list[str]:
    """Those that were written, by the kind that their names start with."""
    written: list[str] = evidence.settings.get(PICTURES, [])
    found = [name for name in written if name.rpartition(".")[0].startswith(kinds)]
    return [line for name in found for line in (f"![{name.rpartition('.')[0]}]({name})", "")]


def _of_linear(part: LinearResult) -> list[str]:
    return [f"### The linear path of {part.rows[0].case.shape.name}, {part.rows[0].case.tokens} tokens", ""]


def _to_show(rows: Sequence[Row]) -> list[Row]:
    """Of a case's rows those for a table of times: where nobody was timed, only what went wrong."""
    if any(row.median_s is not None for row in rows):
        return list(rows)
    return [row for row in rows if row.status not in ("ok", "skipped")]


def _faster(evidence: Evidence) -> Iterator[str]:
    yield from _pictures(evidence, "time", "linear-")
    if evidence.logits is not None:
        for title, part in (
            ("### From logits", _main_cases(evidence.logits)),
            ("### The same in other ways", _others(evidence.logits)),
        ):
            timed = replace(part, rows=[row for _, rows in by_case(part.rows) for row in _to_show(rows)])
            if timed.rows:
                yield from (title, "", *report.times(timed), "", *_bullets(report.notes(timed)))
    for head in evidence.linear:
        if any(row.median_s is not None for row in head.rows):
            yield from _of_linear(head)
            yield from (*linear_report.times(head).markdown(), "", *_bullets(linear_report.time_notes(head)))


def _peaks(evidence: Evidence) -> Sheet:
    """Peaks of whole steps side by side."""
    view = Sheet("", ("", "provider", "peak MiB", "of it gradients", "peak ÷ ours"), 2)
    for _, title, rows in _whole_steps(evidence):
        ours = next((row.peak_extra_bytes for row in rows if row.is_ours), None)
        for row in rows:
            if row.peak_extra_bytes is not None:
                sizes = (number(row.peak_extra_bytes / MIB), number(row.gradient_bytes / MIB))
                view.add(title, row.provider, *sizes, _ratio(row.peak_extra_bytes, ours), ours=row.is_ours)
    return view


def _smaller(evidence: Evidence) -> Iterator[str]:
    yield from _pictures(evidence, "memory")
    peaks = _peaks(evidence)
    if peaks.rows:
        yield from (*peaks.markdown(), "")
        yield from _bullets(["Beyond the inputs, gradients included."])
    if evidence.logits is not None:
        for sheet in memory_report.sheets(evidence.logits):
            yield from (*sheet.markdown(), "")
        yield from _bullets(memory_report.notes(evidence.logits))
    for part in evidence.linear:
        for sheet in (linear_report.memory(part), linear_report.parts(part)):
            if sheet.rows:
                yield from (f"Linear path of {part.memory[0].case.shape.name}. " + "\n".join(sheet.markdown()), "")
        if part.memory:
            yield from _bullets([*linear_report.memory_notes(part), *_not_measured(part.memory)])


def _not_measured(rows: Iterable[MemoryRow]) -> Iterator[str]:
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.status not in ("ok", "predicted"):
            reasons.setdefault(f"{row.status.replace('_', ' ')}: {row.note}", []).append(row.provider)
    for reason, names in reasons.items():
        yield f"{', '.join(dict.fromkeys(names))}: {reason}"


def _accurate(evidence: Evidence) -> Iterator[str]:
    yield from _pictures(evidence, "accuracy")
    if evidence.logits is not None and (text := accuracy.markdown(evidence.logits)):
        yield from (text, "")
    for part in evidence.linear:
        sheet = linear_report.errors(part)
        if sheet.rows:
            lines = replace(sheet, title="").markdown()
            yield from (*_of_linear(part), *lines, "", *_bullets(linear_report.error_notes(part)))


def _far(evidence: Evidence) -> Iterator[str]:
    view = Sheet("", ("", "the limit is", "hpo_fused reaches"), 2)
    if evidence.logits is not None:
        names = labels(row.case for row in evidence.logits.rows)
        for row in evidence.logits.rows:
            if row.is_ours and row.share_of_copy is not None:
                view.add(names[row.case], "a copy of the logits", f"{number(100 * row.share_of_copy)} %")
    for part in evidence.linear:
        for one in part.rows:
            if one.is_ours and one.share_of_gemms is not None:
                share = f"{_title(part)}, {one.case.inactive_share:.0%} inactive"
                view.add(share, "three bare GEMMs of the active rows", f"{number(100 * one.share_of_gemms)} %")
    if view.rows:
        yield from (*view.markdown(), "")
    found = all_limits(evidence)
    if found:
        yield from ("What the project holds itself to:", "", *limits.sheet(found).markdown(), "")


def _kernels(evidence: Evidence) -> Iterator[str]:
    kernels = evidence.kernels
    if kernels is None:
        asked = evidence.settings.get(KERNELS_ASKED, True)
        yield from _bullets(["Not compiled; see what was left out." if asked else "Not asked for."])
        return
    yield from _bullets(
        [
            *(f"{target}: not covered: {reason}" for target, reason in kernels["unavailable"].items()),
            *kernels["broken"],
        ]
    )
    predictions = [Prediction(**one) for one in kernels["predictions"]]
    yield from (compile_table.markdown(kernels["records"], predictions, kernels["covered"]), "")


def _tests(evidence: Evidence) -> Iterator[str]:
    tests = evidence.tests
    yield from _bullets(
        [f"{tests_line(evidence)}.", *(f"failed: {name}" for name in (tests.failures if tests else []))]
    )


def _where(evidence: Evidence) -> Iterator[str]:
    view = Sheet("", ("", "this machine"), 2)
    for key, value in evidence.environment.items():
        view.add(key, "–" if value is None else str(value))
    for key, value in evidence.settings.get(CLOCKS, {}).items():
        view.add(f"after timing: {key}", ", ".join(value) or "–" if isinstance(value, list) else str(value))
    yield from (*view.markdown(), "")
    yield from ("To repeat it:", "", "```sh", evidence.settings.get(COMMAND_LINE, "hpo-fused-bench all"), "```")


def markdown(evidence: Evidence) -> str:
    """The report."""
    commit = evidence.environment.get("commit")
    made = f"{evidence.environment['created']}{f', commit {commit}' if commit else ''}"
    lines = [f"# hpo_fused on {report.environment_line(evidence).partition(';')[0]}", "", f"Measured {made}.", ""]
    lines += _bullets(
        [
            *(["Interrupted: parts are missing."] if evidence.interrupted else []),
            *filter(None, [report.busy_warning(evidence)]),
        ]
    )
    short = summary(evidence)
    if short.rows:
        lines += [*short.markdown(), "", *_bullets(summary_notes(evidence))]
    lines += _bullets([*against(evidence), *verdict(evidence)])
    questions = {
        "How much faster?": _faster(evidence),
        "How much smaller?": _smaller(evidence),
        "How accurate?": _accurate(evidence),
        "How far from the hardware's limit?": _far(evidence),
        "Machine code for GPUs?": _kernels(evidence),
        "Tests?": _tests(evidence),
        "What was left out?": iter(_bullets(evidence.dropped or ["Nothing."])),
        "Where, and how again?": _where(evidence),
    }
    for question, answer in questions.items():
        lines += [f"## {question}", "", *(list(answer) or ["Nothing was measured.", ""])]
    return "\n".join(lines).rstrip() + "\n"
