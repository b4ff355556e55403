"""What a run of ``linear`` produces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hpo_fused.bench.results import Measurement, MemoryRow, ResultFile, median_ratio

from .cases import HeadShape, LinearCase

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

GEMMS = "gemms"  # the floor that every row is held against


@dataclass(frozen=True)
class RowErrors:
    """The worst and the median of the rows checked; of a gradient each relative to the row."""

    worst: float
    median: float


@dataclass(frozen=True)
class LinearErrors:
    """How far a provider's result is from float64.

    Attributes:
        loss: relative to the sum of |dloss/dlogp|, which unlike the loss does not cancel; None where none was given.
        logprob: absolute errors of the active rows whose logits were rounded as the oracle's; None if none given.
        moved: rows whose logits were rounded otherwise, as a GEMM that sums in another order may.
        hidden, weight: of the gradients; None where no checked row has any.
        complaint: what is wrong, "" if nothing.
        broken: limits that only this package's providers are held to and this one misses, "" if none.
    """

    loss: float | None
    logprob: RowErrors | None = None
    moved: int = 0
    hidden: RowErrors | None = None
    weight: RowErrors | None = None
    complaint: str = ""
    broken: str = ""

    @classmethod
    def of_dict(cls, content: dict[str, Any]) -> LinearErrors:
        """The inverse of ``dataclasses.asdict``."""
        rows = {name: content[name] and RowErrors(**content[name]) for name in ("logprob", "hidden", "weight")}
        return cls(**{**content, **rows})


@dataclass
class LinearRow(Measurement):
    """A provider on hidden states with some share of inactive rows.

    Attributes:
        tflop_per_s: 6 n H V (2 n H V without gradients) over the median, n the rows that this provider puts through
            its GEMMs; None for the gradients alone.
        share_of_gemms: median over rounds of the bare GEMMs' time / this time, in the same round.
        ratio_to_full: median over rounds of this time / the same provider's with no inactive row.
        errors: None for what is not checked.
    """

    case: LinearCase
    tflop_per_s: float | None = None
    share_of_gemms: float | None = None
    ratio_to_full: float | None = None
    errors: LinearErrors | None = None

    @property
    def is_floor(self) -> bool:
        """Whether this is the bare GEMMs."""
        return self.provider == GEMMS


def _case(content: dict[str, Any]) -> LinearCase:
    return LinearCase(**{**content, "shape": HeadShape(**content["shape"])})


@dataclass
class LinearResult(ResultFile):
    """A run of ``linear`` or ``memory``."""

    command: str = "linear"
    rows: list[LinearRow] = field(default_factory=list)
    memory: list[MemoryRow] = field(default_factory=list)

    @property
    def measurements(self) -> Sequence[LinearRow]:
        """Every row that was timed."""
        return self.rows

    @classmethod
    def of_dict(cls, content: dict[str, Any]) -> Self:
        """The inverse of ``dataclasses.asdict``."""
        rows = [
            LinearRow(**{
                **row, "case": _case(row["case"]),
                "errors": row["errors"] and LinearErrors.of_dict(row["errors"]),
            })
            for row in content["rows"]
        ]  # fmt: skip
        memory = [MemoryRow.of_dict(row, _case(row["case"])) for row in content["memory"]]
        return cls(**{**content, "rows": rows, "memory": memory})

    def of_series(self, series: str) -> Iterator[MemoryRow]:
        """Memory rows of one series."""
        return (row for row in self.memory if row.series == series)


def summarise(rows: Sequence[LinearRow], ours: str | None, rows_of: dict[str, bool]) -> None:
    """Fill in the statistics from the samples.

    Args:
        rows: of one problem, with any shares of inactive rows.
        ours: the provider that the others are compared with.
        rows_of: whether a provider leaves inactive rows out.
    """
    samples = {(row.provider, row.case.inactive): row.samples_s for row in rows if row.status == "ok"}
    for row in rows:
        median = row.take_quantiles()
        if median is None:
            continue
        inactive = row.case.inactive
        flops = row.case.flops(row.case.active if rows_of[row.provider] else row.case.tokens)
        row.tflop_per_s = None if flops is None else flops / median / 1e12
        row.ratio_to_ours = median_ratio(row.samples_s, samples.get((ours or "", inactive), []))
        if row.case.mode != "gradient":
            row.share_of_gemms = median_ratio(samples.get((GEMMS, inactive), []), row.samples_s)
        row.ratio_to_full = median_ratio(row.samples_s, samples.get((row.provider, 0.0), []))
