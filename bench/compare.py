"""Two results side by side: rows of equal cases and providers, the ratio of their times and memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .cases import labels
from .results import Result, Row
from .tables import Table, mib, number


@dataclass(frozen=True)
class Pair:
    """Rows of A and B that measured the same."""

    first: Row
    second: Row

    @property
    def time(self) -> float | None:
        """Time of B over A's; None where one was not timed."""
        return _ratio(self.second.median_s, self.first.median_s)

    @property
    def memory(self) -> float | None:
        """Peak memory of B over A's; None where one was not taken."""
        return _ratio(self.second.peak_bytes, self.first.peak_bytes)

    def worse(self, threshold: float) -> str:
        """How B is worse, by more than ``threshold`` times or by its status, or ""."""
        if self.first.status == "ok" and self.second.status != "ok":
            return f"is {self.second.status}: {self.second.note}"
        ratios = {"time": self.time, "peak memory": self.memory}
        return ", ".join(f"{name} {number(v)}×" for name, v in ratios.items() if v is not None and v > threshold)


def _ratio(second: float | None, first: float | None) -> float | None:
    return second / first if second is not None and first else None


def pairs(first: Result, second: Result) -> list[Pair]:
    """Joined by case and provider, in the order of A."""
    others = {(row.case, row.provider): row for row in second.rows}
    return [Pair(row, others[row.case, row.provider]) for row in first.rows if (row.case, row.provider) in others]


def differences(first: Result, second: Result) -> Iterator[str]:
    """A line for each entry of the environments that differs, the date apart."""
    for name in dict.fromkeys([*first.environment, *second.environment]):
        a, b = (result.environment.get(name) for result in (first, second))
        if a != b and name != "created":
            yield f"{name}: {a} → {b}"


def missing(first: Result, second: Result) -> list[str]:
    """A line for each row of hpo_fused that was ok in A and that B does not have."""
    names, others = labels(row.case for row in first.rows), {(row.case, row.provider) for row in second.rows}
    lost = [row for row in first.rows if row.ours and row.status == "ok" and (row.case, row.provider) not in others]
    return [f"{names[row.case]}: {row.provider} is not in B" for row in lost]


def worse(found: list[Pair], threshold: float) -> list[str]:
    """A line for each row of hpo_fused that is worse in B."""
    names = labels(pair.first.case for pair in found)
    told = [(pair.first, pair.worse(threshold)) for pair in found if pair.first.ours]
    return [f"{names[row.case]}: {row.provider} {words}" for row, words in told if words]


def table(found: list[Pair]) -> Table:
    """Times and peaks of both."""
    names = labels(pair.first.case for pair in found)
    headings = ("case", "provider", "A ms", "B ms", "B÷A", "A÷limit", "B÷limit", "A MiB", "B MiB", "B÷A")
    view = Table("B against A", headings)
    for pair in found:
        both = (pair.first, pair.second)
        view.add(
            names[pair.first.case], pair.first.provider,
            *(number(1e3 * row.median_s if row.median_s else None) for row in both), number(pair.time),
            *(number(row.over_limit) for row in both), *(mib(row.peak_bytes) for row in both), number(pair.memory),
            bold=pair.first.ours,
        )  # fmt: skip
    view.notes = ["÷limit: where it did not change and the time did, so did the machine."]
    return view
