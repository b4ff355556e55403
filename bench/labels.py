"""Short texts of numbers and cases, for every table and picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from .cases import Case

MIB = 1 << 20


def number(value: float | None) -> str:
    """Three digits or all those before the point, never in exponent form; a dash where there is nothing."""
    if value is None or not math.isfinite(value):
        return "–"
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(0, min(digits, 3))}f}"


def labels(cases: Iterable[Case]) -> dict[Case, str]:
    """What tells these cases apart: the shape's name, and whatever else is not the same for all of them."""
    found = list(dict.fromkeys(cases))

    def differ(of: Callable[[Case], object]) -> bool:
        return len({of(case) for case in found}) > 1

    kinds: list[tuple[Callable[[Case], object], Callable[[Case], str]]] = [
        (lambda case: case.op, lambda case: {"logprobs": "log p"}.get(case.op, case.op)),
        (lambda case: case.tokens, lambda case: f"N={case.tokens}"),
        (lambda case: case.dtype, lambda case: case.dtype),
        (lambda case: case.objective, lambda case: case.objective),
        (lambda case: case.inactive, lambda case: f"{case.inactive:.0%}"),
        (lambda case: case.mode, lambda case: {"gradient": "grad"}.get(case.mode, case.mode)),
    ]
    told = [text for key, text in kinds if differ(key)]
    return {case: " ".join([case.shape.name, *(text(case) for text in told)]) for case in found}


WORK = {
    ("logits", "forward"): "forward alone",
    ("logits", "gradient"): "gradient alone",
    ("logprobs", "forward"): "log-probabilities and entropies, forward alone",
    ("logprobs", "gradient"): "log-probabilities' gradient alone",
    ("logprobs", "both"): "log-probabilities and entropies, forward and gradient",
}


def describe(case: Case) -> str:
    """A case in a few words, for the line above its rows."""
    words = [
        f"{case.responses}×{case.length} = {case.tokens} tokens × {case.shape.vocabulary} {case.dtype} "
        f"({number(case.logits_bytes / MIB)} MiB)",
        *([case.objective] if case.op == "logits" else []),
        *filter(None, [WORK.get((case.op, case.mode))]),
    ]
    if case.shape.softcap is not None:
        words.append(f"softcap {case.shape.softcap:g}")
    if case.inactive:
        words.append(f"{case.inactive:.0%} inactive")
    if case.ragged:
        words.append("ragged")
    return ", ".join(words)
