"""Short texts of numbers and cases, for every table and picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from .cases import Case


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
        (lambda case: case.op, lambda case: case.op),
        (lambda case: case.tokens, lambda case: f"N={case.tokens}"),
        (lambda case: case.dtype, lambda case: case.dtype),
        (lambda case: case.objective, lambda case: case.objective),
        (lambda case: case.inactive, lambda case: f"{case.inactive:.0%}"),
        (lambda case: case.mode, lambda case: case.mode),
    ]
    told = [text for key, text in kinds if differ(key)]
    return {case: " ".join([case.shape.name, *(text(case) for text in told)]) for case in found}
