"""A result for people: tables of times, errors, memory and kernels, for the terminal and as markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.console import Console

from .cases import labels
from .machine_code.report import kernel_table
from .results import Result, Row, against_tokens
from .tables import NOTHING, Table, error, mib, number
from .truth import OWN_GRADIENT_LIMIT, OWN_LOGPROB_LIMIT, ROWS


def rate(row: Row) -> tuple[float | None, str]:
    """The speed that a row reached, of the work that nobody can avoid, and its unit."""
    work = row.case.work()
    if work is None or row.median_s is None:
        return None, ""
    amount, unit = work
    if row.limit and unit == "GB/s":  # a copy reads and writes all, whatever the case needs
        amount = 2 * row.case.logits_bytes / 1e9
    return amount / row.median_s, unit


def speed_table(rows: Sequence[Row]) -> Table | None:
    """Times; None where nothing was timed."""
    if not any(row.rounds for row in rows):
        return None
    names = labels(row.case for row in rows)
    device = any(row.device_s for row in rows)
    headings = ("device ms", "device ÷ limit") if device else ()
    view = Table(
        "Time", ("case", "provider", *headings, "median ms", "25–75 %", "÷ ours", "÷ limit", "rate", "peak MiB")
    )
    for row in rows:
        if row.median_s is None or row.q25_s is None or row.q75_s is None:
            continue
        speed, unit = rate(row)
        replayed = (number(row.device_s and 1e3 * row.device_s), number(row.device_over_limit)) if device else ()
        view.add(
            names[row.case], row.provider, *replayed, number(1e3 * row.median_s),
            f"{number(1e3 * row.q25_s)}–{number(1e3 * row.q75_s)}", number(row.over_ours), number(row.over_limit),
            f"{number(speed)} {unit}".strip(), mib(row.peak_bytes), bold=row.ours,
        )  # fmt: skip
    view.notes = [
        "÷ ours, ÷ limit: medians of the ratios within each round; limit: a copy of the logits, or the bare GEMMs in "
        "the faster dtype.",
        "rate: GB/s of one read of the active rows and, where there is a gradient, one write of all of it; TFLOP/s of "
        "one GEMM over the active rows, three where there are gradients. Peak MiB: beyond the inputs, with gradients.",
    ]
    if device:
        view.notes.append(
            "median: of steps as they are called; device: of replays of a CUDA graph, without the host's part, "
            f"over the fastest limit's; {NOTHING} where a step cannot be captured or gives other bits each time."
        )
    return view


def accuracy_table(rows: Sequence[Row]) -> Table | None:
    """Errors; None where nothing was checked."""
    checked = [row for row in rows if row.errors is not None]
    if not checked:
        return None
    names = labels(row.case for row in checked)
    headings = ("case", "provider", "gradient of", "loss", "log p", "worst", "median", "beyond", "same")
    view = Table("Against float64", headings, left=3)
    for row in checked:
        assert row.errors is not None
        same = {None: NOTHING, True: "yes", False: "no"}[row.repeats]
        first = [error(row.errors.loss), error(row.errors.logprob)]
        for part, found in row.errors.gradients.items() or [(NOTHING, None)]:
            values = (None,) * 3 if found is None else (found.worst, found.median, found.beyond)
            view.add(names[row.case], row.provider, part, *first, *map(error, values), same, bold=row.ours)
            first, same = ["", ""], ""
    dtypes = dict.fromkeys(row.case.dtype for row in checked)
    own = ", ".join(f"{error(OWN_GRADIENT_LIMIT[dtype])} in {dtype}" for dtype in dtypes)
    view.notes = [
        "loss: error relative to the sum of |dloss/dlogp|, which unlike the loss does not cancel. log p: largest "
        f"absolute error (hpo_fused's limit: {error(OWN_LOGPROB_LIMIT)}; of hidden states, where logits were rounded "
        "alike).",
        f"gradient: relative to the row's, over up to {ROWS} rows; the sampled token's column apart from the others.",
        f"beyond: worst error beyond one rounding to the dtype (hpo_fused's limit: {own}). same: a second call gave "
        "the same loss and gradients, bit for bit.",
    ]
    return view


def memory_table(rows: Sequence[Row]) -> Table | None:
    """Peak memory against the number of tokens; None where no case was measured at several."""
    if not (several := against_tokens(rows)):
        return None
    sizes = sorted({tokens for peaks in several.values() for tokens in peaks})
    view = Table("Peak memory, MiB", ("case", "provider", *(f"N={size}" for size in sizes)))
    for (name, provider), peaks in several.items():
        view.add(name, provider, *(mib(peaks.get(size)) for size in sizes), bold=provider.startswith("hpo_fused"))
    view.notes = ["Beyond the inputs, gradients included."]
    return view


def remarks(result: Result) -> list[str]:
    """A line for each reason why something was not measured or is not right, and for each provider that does less."""
    names = labels(row.case for row in result.rows)
    reasons: dict[str, dict[str, list[str]]] = {}
    for row in result.rows:
        told = row.complaint or (f"{row.status.replace('_', ' ')}: {row.note}" if row.status != "ok" else "")
        if told:
            reasons.setdefault(told, {}).setdefault(row.provider, []).append(names[row.case])
    lines = []
    for told, who in reasons.items():
        places = dict.fromkeys(place for found in who.values() for place in found)
        where = "" if len(places) == len(names) > 1 else f" ({'; '.join(places)})"
        lines.append(f"{', '.join(who)}: {told}{where}")
    lines += dict.fromkeys(
        f"{row.provider} leaves out: {row.leaves_out}" for row in result.rows if row.status == "ok" and row.leaves_out
    )
    if result.interrupted:
        lines.append("Interrupted: rows or rounds are missing.")
    return [*result.notes, *lines]


def verdict(result: Result) -> str:
    """One line: the median over the timed cases of every provider's time over hpo_fused's, "" where there is none."""
    ratios: dict[str, list[float]] = {}
    for row in result.rows:
        if row.over_ours is not None and not row.limit and not row.ours:
            ratios.setdefault(row.provider, []).append(row.over_ours)
    limits = [row.over_limit for row in result.rows if row.ours and row.over_limit is not None]
    words = [f"{name} {number(statistics.median(values))}×" for name, values in ratios.items()]
    words += [f"the limit {number(1 / statistics.median(limits))}×"] if limits else []
    cases = len({row.case for row in result.rows if row.ours and row.over_ours})
    return f"Time over hpo_fused's, median over {cases} cases: {', '.join(words)}." if words else ""


def machine(result: Result) -> str:
    """The machine and the versions in one line."""
    found = result.environment
    where = found.get("gpu") or f"{found['cpu']}, {found['threads']} thread{'s' * (found['threads'] != 1)}"
    triton = f", triton {found['triton']}" if found.get("triton") else ""
    commit = f" at {found['commit'][:12]}" if found.get("commit") else ""
    return f"{where}; torch {found['torch']}{triton}, python {found['python']}, hpo_fused {found['hpo_fused']}{commit}."


def tables(result: Result) -> list[Table]:
    """Every table that there is something for."""
    rows = result.rows
    found = speed_table(rows), accuracy_table(rows), memory_table(rows), kernel_table(result.kernels)
    return [table for table in found if table is not None]


def show(result: Result, out: Console) -> None:
    """Print the machine, the tables and the remarks on the terminal."""
    out.print(machine(result), style="dim")
    for table in tables(result):
        table.print(out)
    out.print()
    for line in remarks(result):
        out.print(line, style="yellow", markup=False)
    if said := verdict(result):
        out.print(said, style="bold", markup=False)


def markdown(result: Result, pictures: Sequence[str] = ()) -> str:
    """A markdown document of the result, with pictures by their file names."""
    parts = [machine(result), verdict(result), *(f"![{name.partition('.')[0]}]({name})" for name in pictures)]
    parts += [table.markdown() for table in tables(result)]
    if lines := remarks(result):
        parts.append("\n".join(["## Remarks", "", *(f"- {line}" for line in lines)]))
    return "\n\n".join(part for part in parts if part) + "\n"
