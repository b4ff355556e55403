"""What the losses from logits are held to, what was measured of them, and whether it was met."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .labels import number
from .linear.limits import Limit
from .results import Result, Row, by_case
from .sheet import Sheet

MIB = 1 << 20
# As stated for this vocabulary and dtype, forward and gradient, with at least so many tokens.
VOCABULARY, DTYPE = 151936, "bf16"
TOKENS = {"cpu": 1024, "gpu": 8192}
# Times of others over ours, and ours over the copy's.
OVER = {"cpu": {"compile": 1.5, "eager": 4.0}, "gpu": {"compile": 2.0, "eager": 8.0}}
BEST_PEER, OVER_COPY = 1.4, 1.15  # on a GPU
BEYOND_GRADIENT = 64 * MIB  # on a CPU
PLAIN = ("eager", "compile")
WORDS = {True: "yes", False: "NO", None: "not measured"}
PREDICTED = "predicted"  # how the linear path's limits call what was computed and not measured


def _at_least(what: str, limit: float, value: float | None) -> Limit:
    measured = "–" if value is None else f"{number(value)}×"
    return Limit(what, f"≥ {limit:g}×", measured, None if value is None else value >= limit)


def _of_case(rows: Sequence[Row], machine: str) -> Iterator[Limit]:
    case = rows[0].case
    where = f"{case.shape.name}, {case.tokens} tokens, {case.dtype}"
    ratios = {row.provider: row.ratio_to_ours for row in rows if not row.is_ours and not row.is_copy}
    for name, limit in OVER[machine].items():
        if name in ratios:
            yield _at_least(f"{name}'s time ÷ ours, {where}", limit, ratios[name])
    ours = next((row for row in rows if row.is_ours), None)
    if machine == "gpu":
        peers = {name: ratio for name, ratio in ratios.items() if name not in PLAIN and ratio is not None}
        best = min(peers, key=lambda name: peers[name], default=None)
        name = "" if best is None else f" ({best}'s)"
        yield _at_least(f"best peer's{name} time ÷ ours, {where}", BEST_PEER, None if best is None else peers[best])
        value = ours.time_over_copy if ours is not None else None
        met = None if value is None else value <= OVER_COPY
        yield Limit(
            f"time ÷ a copy's, {where}", f"≤ {OVER_COPY:g}×", "–" if value is None else f"{number(value)}×", met
        )
        return
    beyond = None
    if ours is not None and ours.peak_extra_bytes is not None:
        beyond = ours.peak_extra_bytes - ours.gradient_bytes
    met = None if beyond is None else beyond <= BEYOND_GRADIENT
    measured = "–" if beyond is None else f"{number(beyond / MIB)} MiB"
    yield Limit(f"peak memory beyond the gradient, {where}", f"≤ {BEYOND_GRADIENT // MIB} MiB", measured, met)


def limits(result: Result) -> list[Limit]:
    """Those that the run can tell something about."""
    machine = "gpu" if "gpu" in result.environment else "cpu"
    found: list[Limit] = []
    for case, rows in by_case(result.rows):
        of_whole_step = case.op == "logits" and case.mode == "both" and case.inactive == 0 and not case.ragged
        stated = case.shape.vocabulary == VOCABULARY and case.dtype == DTYPE and case.tokens >= TOKENS[machine]
        if of_whole_step and stated and any(row.is_copy for row in rows):
            found += _of_case(rows, machine)
    return found


def is_predicted(limit: Limit) -> bool:
    """Whether it is held against a prediction that was not measured here."""
    return limit.what.endswith(f", {PREDICTED}")


def _outcome(limit: Limit) -> str:
    """Of a limit: met, missed (a prediction, too), predicted to be met, or not measured."""
    if limit.met is None:
        return "not measured"
    if not limit.met:
        return "missed"
    return PREDICTED if is_predicted(limit) else "met"


def counts(found: Sequence[Limit]) -> str:
    """How many were met, missed, predicted to be met and not measured, in a line."""
    outcomes = [_outcome(limit) for limit in found]
    words = ("met", "missed", PREDICTED, "not measured")
    return ", ".join(f"{outcomes.count(word)} {word}" for word in words if word == "met" or word in outcomes)


def meets(found: Sequence[Limit]) -> str:
    """What keeps a run from having shown that the limits are met, or "": the one rule behind every ``--check``.

    A limit that is stated for what was run and was not measured is not met; a prediction is no measurement.
    """
    if not found:
        return "no limit is stated for what was measured"
    outcomes = {_outcome(limit) for limit in found}
    if outcomes <= {"met", PREDICTED} and "met" in outcomes:
        return ""
    if outcomes == {PREDICTED}:
        return f"no limit was measured ({counts(found)})"
    reasons = [
        f"{word}: {'; '.join(limit.what for limit in found if _outcome(limit) == word)}"
        for word in ("missed", "not measured")
        if word in outcomes
    ]
    return ". ".join(reasons)


def sheet(found: Sequence[Limit]) -> Sheet:
    """Limits of any part as a table."""
    view = Sheet("", ("limit of hpo_fused", "limit", "measured", "met"))
    for limit in found:
        said = PREDICTED if _outcome(limit) == PREDICTED else WORDS[limit.met]
        view.add(limit.what, limit.limit, limit.measured, said)
    return view
