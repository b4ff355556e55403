"""What the linear path is held to, what was measured of it, and whether it was met."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hpo_fused.bench.labels import number
from hpo_fused.bench.results import MemoryRow
from hpo_fused.bench.sheet import Sheet

from .memory import BUDGET, SEVEN_B
from .results import GEMMS, LinearResult, LinearRow

MIB, GIB = 1 << 20, 1 << 30
# Of time, as ratios within one run.
OVER_CROSS_ENTROPY, EAGER_OVER = 1.15, 1.8
OVER_GEMMS = {"cpu": 1.35, "gpu": 1.15}
QUARTER, OVER_FULL = 0.75, 0.35
# Of memory beyond the gradients and the float32 accumulator: beside the chunk, and for the head of a 7B model in all.
BESIDE_CHUNK, IN_ALL = 64 * MIB, GIB
# More per token would grow with the number of tokens in a way that matters (hidden states take 2 H bytes).
PER_TOKEN = 1024


@dataclass(frozen=True)
class Limit:
    """One line of the final table; ``met`` is None where the run did not measure it."""

    what: str
    limit: str
    measured: str
    met: bool | None


def _at_most(what: str, limit: float, value: float | None, unit: str = "×") -> Limit:
    met = None if value is None else value <= limit
    return Limit(what, f"≤ {limit:g}{unit}", "–" if value is None else f"{number(value)}{unit}", met)


def _ours(result: LinearResult, inactive: float = 0.0) -> LinearRow | None:
    timed = (row for row in result.rows if row.is_ours and row.median_s is not None)
    return next((row for row in timed if row.case.inactive == inactive), None)


def _ratio(result: LinearResult, provider: str) -> float | None:
    """A provider's time / ours, without inactive rows."""
    rows = (row for row in result.rows if row.provider == provider and row.case.inactive == 0)
    return next((row.ratio_to_ours for row in rows), None)


def _times(result: LinearResult) -> Iterator[Limit]:
    if any(row.case.mode != "both" for row in result.rows):
        return  # they are limits of a training step
    providers = {row.provider for row in result.rows}
    machine = "gpu" if "gpu" in result.environment else "cpu"
    floor = _ratio(result, GEMMS)
    if GEMMS in providers:
        yield _at_most("time ÷ three bare GEMMs", OVER_GEMMS[machine], floor and 1 / floor)
    if "linear_cross_entropy" in providers and machine == "cpu":
        ratio = _ratio(result, "linear_cross_entropy")
        yield _at_most("time ÷ linear_cross_entropy", OVER_CROSS_ENTROPY, ratio and 1 / ratio)
    if "eager" in providers and machine == "cpu":
        ratio = _ratio(result, "eager")
        met = None if ratio is None else ratio >= EAGER_OVER
        what = "eager's time ÷ ours"
        share = next((row.share_of_gemms for row in result.rows if row.provider == "eager"), None)
        if share:  # slow GEMMs are the same for all, and bound what can be gained on the rest
            what += f" (÷ three bare GEMMs: {number(1 / share)}×)"
        yield Limit(what, f"≥ {EAGER_OVER:g}×", "–" if ratio is None else f"{number(ratio)}×", met)
    if any(row.case.inactive == QUARTER and abs(row.case.inactive_share - QUARTER) < 0.01 for row in result.rows):
        row = _ours(result, QUARTER)
        yield _at_most(f"time at {QUARTER:.0%} inactive ÷ at 0%", OVER_FULL, row.ratio_to_full if row else None)


def _beyond(rows: list[MemoryRow]) -> list[tuple[MemoryRow, int]]:
    return [(row, row.beyond) for row in rows if row.beyond is not None]


def _budget(result: LinearResult) -> Iterator[Limit]:
    rows = list(result.of_series(BUDGET))
    if not rows:
        return
    found = _beyond(rows)
    chunk = (rows[0].case.chunk_bytes or 0) / MIB
    sizes = ", ".join(str(row.case.tokens) for row in rows)
    most = max((beyond for _, beyond in found), default=None)
    yield _at_most(
        f"extra memory with a chunk budget of {number(chunk)} MiB at {sizes} tokens, {rows[0].case.dtype}",
        round(chunk + BESIDE_CHUNK / MIB, 1),
        None if most is None else most / MIB,
        " MiB",
    )
    growth = None
    if len(found) > 1:
        (first, least), (last, most) = found[0], found[-1]
        growth = max(most - least, 0) / (last.case.tokens - first.case.tokens)
    yield _at_most("its growth with the number of tokens", PER_TOKEN, growth, " B/token")


def _seven_b(result: LinearResult) -> Iterator[Limit]:
    rows = list(result.of_series(SEVEN_B))
    for row in rows:
        if row.status == "predicted" and row.prediction is not None:
            what = f"extra memory, {row.case.shape.name}, {row.case.tokens} tokens, {row.device}, predicted"
            yield _at_most(what, IN_ALL / GIB, row.prediction.extra / GIB, " GiB")
    whole = [row for row in rows if row.status != "predicted" and row.case.active == rows[0].case.tokens]
    whole = [row for row in whole if row.case.shape == rows[0].case.shape]
    if whole:
        most = whole[0].beyond
        yield _at_most("the same measured", IN_ALL / GIB, None if most is None else most / GIB, " GiB")
    for row in rows:  # cuts through it are held to their own predictions
        if row.status == "predicted" or row in whole:
            continue
        share = None if row.beyond is None or row.prediction is None else row.beyond / row.prediction.extra
        what = (
            f"measured ÷ predicted extra, {row.case.shape.name}, {row.case.active} of {row.case.tokens} tokens active"
        )
        yield _at_most(what, 1.0, share)


def _predictor(result: LinearResult) -> Iterator[Limit]:
    ratios = [
        row.peak_extra_bytes / row.prediction.peak
        for row in result.memory
        if row.prediction is not None and row.peak_extra_bytes is not None
    ]
    if ratios:
        yield _at_most("measured peak ÷ hpo_fused.linear_memory's, worst", 1.0, max(ratios))


def limits(result: LinearResult) -> list[Limit]:
    """Those that the run can tell something about."""
    return [*_times(result), *_budget(result), *_seven_b(result), *_predictor(result)]


def missed(result: LinearResult) -> list[Limit]:
    """Those that were measured and not met."""
    return [limit for limit in limits(result) if limit.met is False]


def sheet(result: LinearResult) -> Sheet:
    """The final table."""
    words = {True: "yes", False: "NO", None: "not measured"}
    view = Sheet("Limits", ("limit of hpo_fused", "limit", "measured", "met"))
    for limit in limits(result):
        view.add(limit.what, limit.limit, limit.measured, words[limit.met])
    return view


def wrong(result: LinearResult) -> Iterator[str]:
    """A line for each of this package's rows that is not right."""
    for row in result.rows:
        if not row.is_ours:
            continue
        where = f"{row.provider} at {row.case.inactive:.0%} inactive"
        if row.status in ("wrong", "failed"):
            yield f"{where} is {row.status}: {row.note}"
        elif row.errors is not None and row.errors.broken:
            yield f"{where} misses its own limits: {row.errors.broken}"
        if row.repeats is False:
            yield f"{where}: a second call gave another result"
    for memory in result.memory:
        if memory.prediction is not None and memory.status in ("wrong", "failed"):  # ours are predicted
            yield f"{memory.provider} at {memory.case.tokens} tokens {memory.status}: {memory.note}"
