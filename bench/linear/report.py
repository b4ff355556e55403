"""A result of the linear path for people: tables for a terminal and for a README, from the same cells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby

from hpo_fused.bench.accuracy import PROVIDER_WIDTH, error
from hpo_fused.bench.labels import number
from hpo_fused.bench.report import busy_warning, environment_line, left_out
from hpo_fused.bench.results import MemoryRow
from hpo_fused.bench.sheet import Sheet

from . import limits
from .check import PROBE_LIMIT, ROW_LIMIT
from .exact import BLOCKS, COLUMNS, ROWS
from .memory import BUDGET, SEVEN_B, TOKENS
from .providers.cross_entropy import ROWS as CROSS_ENTROPY_ROWS
from .results import LinearErrors, LinearResult, LinearRow, RowErrors

MIB = 1 << 20
TIMES = (
    "in-\nactive", "provider", "ms", "20–80 %", "÷ ours", "TFLOP\n/s", "% of\ngemms", "peak\nMiB", "of it\ngrad.",
)  # fmt: skip
WORK = {
    "both": "loss, log-probabilities, entropy and the gradients of hidden states and head",
    "forward": "loss, log-probabilities and entropy, forward alone",
    "gradient": "the gradients of hidden states and head alone, after a forward that is not timed",
}
GEMMS_OF = {"forward": "logits", "gradient": "dhidden and dweight", "both": "logits, dhidden and dweight"}
ERRORS = (
    "in-\nactive",
    "provider",
    "log p\nworst",
    "\nmedian",
    "dhidden\nworst",
    "\nmedian",
    "dweight\nworst",
    "\nmedian",
    "same",
)
PARTS = (
    "head", "tokens", "active", "gradi-\nents", "accu-\nmulator", "chunk", "beyond", "pre-\ndicted", "peak",
    "pre-\ndicted",
)  # fmt: skip


def _mib(value: float | None) -> str:
    return "–" if value is None else number(value / MIB)


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _by_share(rows: Iterable[LinearRow]) -> Iterator[tuple[str, list[LinearRow]]]:
    for _, group in groupby(rows, key=lambda row: row.case.inactive):
        found = list(group)
        yield _percent(found[0].case.inactive_share), found


def _time_cells(row: LinearRow) -> list[str]:
    if row.median_s is None or row.q20_s is None or row.q80_s is None:
        return [row.status.replace("_", " ")]
    return [
        number(row.median_s * 1e3),
        f"{number(row.q20_s * 1e3)}–{number(row.q80_s * 1e3)}",
        "–" if row.ratio_to_ours is None else f"{number(row.ratio_to_ours)}×",
        number(row.tflop_per_s),
        "–" if row.share_of_gemms is None else number(100 * row.share_of_gemms),
        *(["", ""] if row.is_floor else [_mib(row.peak_extra_bytes), _mib(row.gradient_bytes)]),
    ]


def times(result: LinearResult) -> Sheet:
    """Times and peak memory, for each share of inactive rows."""
    view = Sheet("", TIMES, 2)
    for share, rows in _by_share(result.rows):
        for row in rows:
            view.add(share, row.provider, *_time_cells(row), ours=row.is_ours)
        view.end_section()
    return view


def _error_cells(row: LinearRow) -> list[str]:
    assert row.errors is not None

    def cells(rows: RowErrors | None) -> list[str]:
        return ["–", "–"] if rows is None else [error(rows.worst), error(rows.median)]

    same = {None: "–", True: "yes", False: "no"}[row.repeats]
    return [*cells(row.errors.logprob), *cells(row.errors.hidden), *cells(row.errors.weight), same]


def errors(result: LinearResult) -> Sheet:
    """Errors of everything that was checked."""
    view = Sheet("Against float64", ERRORS, 2, name_width=PROVIDER_WIDTH)
    for share, rows in _by_share(row for row in result.rows if row.errors is not None):
        for row in rows:
            view.add(share, row.provider, *_error_cells(row), ours=row.is_ours)
        view.end_section()
    return view


def _memory_cell(row: MemoryRow | None) -> str:
    if row is None:
        return ""
    return _mib(row.peak_extra_bytes) if row.status == "ok" else row.status.replace("_", " ")


def memory(result: LinearResult) -> Sheet:
    """Peak memory against the number of tokens, a column for each provider."""
    rows = list(result.of_series(TOKENS))
    names = list(dict.fromkeys(row.provider for row in rows))
    ours = [row.provider for row in rows if row.prediction is not None][:1]
    view = Sheet("Peak memory beyond the inputs, MiB", ["tokens", *ours, *["predicted", "beyond"] * len(ours), *(
        name for name in names if name not in ours)])  # fmt: skip
    for tokens, group in groupby(rows, key=lambda row: row.case.tokens):
        found = {row.provider: row for row in group}
        cells = [str(tokens)]
        for name in ours:
            row = found.get(name)
            cells.append(_memory_cell(row))
            if row is not None and row.prediction is not None:
                cells += [_mib(row.prediction.peak), _mib(row.beyond)]
            else:
                cells += ["", ""]
        view.add(*cells, *(_memory_cell(found.get(name)) for name in names if name not in ours))
    return view


def parts(result: LinearResult) -> Sheet:
    """What this package's memory consists of: with a fixed chunk budget, and for the head of a 7B model."""
    view = Sheet("Memory of hpo_fused in parts, MiB", PARTS)
    for series in (BUDGET, SEVEN_B):
        for row in result.of_series(series):
            prediction = row.prediction
            if prediction is None:
                continue
            name = f"{row.case.shape.name} {row.case.dtype} {row.device}"
            measured = [_mib(row.beyond), _mib(prediction.extra), _memory_cell(row), _mib(prediction.peak)]
            if row.status == "predicted":
                measured[0] = measured[2] = ""
            sizes = [_mib(prediction.gradients), _mib(prediction.accumulator), _mib(prediction.chunk)]
            view.add(name, str(row.case.tokens), str(row.case.active), *sizes, *measured)
        view.end_section()
    return view


def _reasons(result: LinearResult) -> Iterator[str]:
    """A line for each reason and all whom it stopped; where, unless they were skipped everywhere."""
    memory_rows = [row for row in result.memory if row.status != "predicted"]
    measured = Counter([*(row.provider for row in result.rows), *(row.provider for row in memory_rows)])
    reasons: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in result.rows:
        if row.status != "ok":
            places = reasons.setdefault((row.status, row.note), {}).setdefault(row.provider, [])
            places.append(f"{row.provider} at {_percent(row.case.inactive_share)}")
    for memory_row in memory_rows:
        if memory_row.status != "ok":
            places = reasons.setdefault((memory_row.status, memory_row.note), {}).setdefault(memory_row.provider, [])
            places.append(f"memory of {memory_row.provider} at {memory_row.case.tokens} tokens")
    for (status, note), stopped in reasons.items():
        names: list[str] = []
        for name, places in stopped.items():
            names += [name] if status == "skipped" and len(places) == measured[name] else places
        yield f"{', '.join(names)}: {status.replace('_', ' ')}: {note}"


def time_notes(result: LinearResult) -> Iterator[str]:
    """What was timed, and what the columns mean."""
    if not result.rows:
        return
    case = result.rows[0].case
    softcap = "" if case.shape.softcap is None else f", softcap {case.shape.softcap:g}"
    yield (
        f"{case.shape.name}: {case.tokens} tokens × H {case.shape.hidden} × V {case.shape.vocabulary} {case.dtype}, "
        f"{case.objective}{softcap}; {WORK[case.mode]}."
    )
    if case.mode == "gradient":
        yield "who makes the gradients in its forward has next to nothing left to do."
    yield from left_out(row for row in result.rows if not row.is_floor)
    names = {row.provider for row in result.rows}
    once = [row.provider for row in result.rows if row.case.inactive == 0 and not row.is_ours and not row.is_floor]
    if len({row.case.inactive for row in result.rows}) > 1 and once:
        yield f"{', '.join(once)}: the same time whatever the advantages, so timed at the first share only."
    yield "Pairs of provider and share of inactive rows are timed in turn within each round, in rotating order."
    if "linear_cross_entropy" in names:
        chosen = "its own choice of chunks"
        if "gpu" not in result.environment:
            chosen = (
                f"chunks of at most {CROSS_ENTROPY_ROWS} rows, acc_policy='compact', as fast as any setting tried in "
                "bf16 on two CPU cores, where its default took over a minute"
            )
        yield f"linear_cross_entropy: PyTorch's, plain cross entropy, which is less work than a policy loss; {chosen}."
    if "gemms" in names:
        yield f"gemms: {GEMMS_OF[case.mode]} of the active rows in ours' chunks, to memory in use: the floor."
    flops = "2 n H V" if case.mode == "forward" else "6 n H V"
    yield (
        f"ms: median. ÷ ours, % of gemms: medians of ratios within rounds. TFLOP/s: {flops}, n the rows computed, over "
        "the median."
    )
    meanwhile = "; with the forward, whose results are held meanwhile" if case.mode == "gradient" else ""
    yield f"peak MiB: beyond the inputs, gradients included (which alone are the last column){meanwhile}."


def error_notes(result: LinearResult) -> Iterator[str]:
    """What the columns of the errors mean."""
    checked = [row for row in result.rows if row.errors is not None]
    if not checked:
        return
    dtype = checked[0].case.dtype
    yield "Exact: float64 from the logits as one GEMM rounds them to the dtype. log p: absolute."
    yield (
        f"dhidden, dweight: error relative to the row, over up to {ROWS} rows for each share, and these rows' tokens "
        f"and {COLUMNS} further entries of the vocabulary. A row beyond {ROW_LIMIT[dtype]:g} is wrong; so is any of "
        f"all rows along random directions (dweight: in {BLOCKS} blocks) beyond {PROBE_LIMIT[dtype]:g}."
    )
    if any(row.provider == "linear_cross_entropy" for row in checked):
        yield "linear_cross_entropy: only its loss is judged, against float64 cross entropy."
    moved = sum(row.errors.moved for row in checked if isinstance(row.errors, LinearErrors))
    if moved:
        yield f"{moved} rows in all whose logits a provider's GEMM rounded otherwise are left out or allowed for."
    yield "same: whether a second call gave the same loss and gradients, bit for bit."


def memory_notes(result: LinearResult) -> Iterator[str]:
    """What the columns of the memory tables mean."""
    if not result.memory:
        return
    yield (
        "predicted: hpo_fused.linear_memory, an upper bound. beyond: what the peak has beyond the gradients and, over "
        "several chunks, dweight's float32 accumulator; nearly nothing where the peak comes when that is cast to the "
        "gradient, the chunk already released. Scratch of the C library's and of GEMMs is not seen on a CPU."
    )
    cuts = [row for row in result.of_series(SEVEN_B) if row.status != "predicted"]
    if len(cuts) > 1:
        yield (
            "The 7B head on this machine: all of it with few active rows and a small chunk budget, and all rows active "
            "with a head of an eighth in each direction. Without a peak: predicted only."
        )


def notes(result: LinearResult) -> Iterator[str]:
    """All of them, and what was not measured."""
    yield from time_notes(result)
    yield from error_notes(result)
    yield from memory_notes(result)
    yield from _reasons(result)


def sections(result: LinearResult) -> Iterator[tuple[Sheet, list[str]]]:
    """Tables that hold something, each with its notes."""
    pairs = (
        (times(result), time_notes(result)),
        (errors(result), error_notes(result)),
        (memory(result), iter(())),
        (parts(result), memory_notes(result)),
        (limits.sheet(result), iter(())),
    )
    for sheet, lines in pairs:
        if sheet.rows:
            yield sheet, list(lines)


def remarks(result: LinearResult) -> Iterator[str]:
    """What is said below the tables, whatever they hold."""
    yield from _reasons(result)
    yield from limits.wrong(result)
    if warning := busy_warning(result):
        yield warning
    if result.interrupted:
        yield "Interrupted: rows or rounds are missing."


def verdict(result: LinearResult) -> str:
    """One line: correct or not, and the limits."""
    if any(limits.wrong(result)):
        return "hpo_fused is WRONG: see above."
    found = [limit for limit in limits.limits(result) if limit.met is not None]
    met = sum(bool(limit.met) for limit in found)
    if not found:
        return "No limit was measured."
    return f"hpo_fused: {met} of {len(found)} limits met."


def markdown(result: LinearResult) -> str:
    """The result as GitHub-flavoured markdown."""
    lines: list[str] = []
    for sheet, below in sections(result):
        lines += [*sheet.markdown(), "", *(f"- {line}" for line in below), *([""] if below else [])]
    lines += [f"- {line}" for line in (environment_line(result) + ".", *remarks(result))]
    return "\n".join(lines)
