"""What a run produces: rows, their statistics, and the JSON file."""

from __future__ import annotations

import dataclasses
import json
import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .cases import Case, Shape

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

SCHEMA_VERSION = 2
Status = Literal["ok", "wrong", "failed", "out_of_memory", "skipped", "predicted"]

# The limit that every row is held against: one read and one write of the logits, to memory already in use. On a
# CPU a second copy goes to new memory, as a gradient does: the difference is what the system takes to hand it out.
# (On a GPU PyTorch keeps the memory that it freed, and the two are the same.)
COPY, COPY_NEW = "copy", "copy_new"


@dataclass(frozen=True)
class ColumnErrors:
    """Errors of some columns of the gradient, relative to the same columns of the same row, over the checked rows.

    Attributes:
        worst, median: of the rows' errors.
        rounding: worst error that rounding the exact gradient to the logits' dtype, once, makes by itself.
        beyond: worst of the rows' errors less the row's own rounding; negative where all came out luckier than that.
    """

    worst: float
    median: float
    rounding: float
    beyond: float


@dataclass(frozen=True)
class Errors:
    """How far a provider's result is from float64.

    Attributes:
        loss: relative to the sum of |dloss/dlogp|, which unlike the loss does not cancel; None where there is none.
        logprob: largest absolute error over all tokens whose log-probability was computed; None if it returned none.
        target, others: of the gradient, in the column of the row's token and (root mean square) in all others; None
            where no row has a gradient, or none was asked for.
        complaint: what is wrong, "" if nothing.
        broken: limits that only this package's providers are held to and this one misses, "" if none.
    """

    loss: float | None
    logprob: float | None
    target: ColumnErrors | None
    others: ColumnErrors | None
    complaint: str = ""
    broken: str = ""

    @classmethod
    def of_dict(cls, content: dict[str, Any]) -> Errors:
        """The inverse of ``dataclasses.asdict``."""
        columns = {name: content[name] and ColumnErrors(**content[name]) for name in ("target", "others")}
        return cls(**{**content, **columns})


@dataclass
class Measurement:
    """One provider on one case.

    Attributes:
        case, provider: what was measured.
        status: "ok" (timed), "wrong" (differs from the oracle, not timed), "failed", "out_of_memory" or "skipped".
        note: why, for anything but "ok".
        samples_s: seconds of every complete round, in order; samples of one case belong together by index as
            long as no provider failed midway.
        median_s, q20_s, q80_s: of the samples.
        ratio_to_ours: median over rounds of this time / our time in the same round; above 1 we are faster.
        peak_extra_bytes: peak memory beyond the inputs, gradients included.
        gradient_bytes: the gradients' own size.
        first_call_s: the first call, with whatever compilation it takes.
        repeats: whether a second call gave the same loss and gradients, bit for bit; None if there was none.
        others_cpu: share of the CPUs that other processes took while the case was timed; None on a GPU.
        ours: whether the provider belongs to this package.
        version: the implementation that ran, as the provider calls it; "" where it did not come to that.
        leaves_out: what of the work of this package's functions the provider does not do, "" if nothing.
    """

    case: Any
    provider: str
    status: Status = "ok"
    note: str = ""
    samples_s: list[float] = field(default_factory=list)
    median_s: float | None = None
    q20_s: float | None = None
    q80_s: float | None = None
    ratio_to_ours: float | None = None
    peak_extra_bytes: int | None = None
    gradient_bytes: int = 0
    first_call_s: float | None = None
    repeats: bool | None = None
    others_cpu: float | None = None
    ours: bool = False
    version: str = ""
    leaves_out: str = ""

    @property
    def is_ours(self) -> bool:
        """Whether this is a provider of this package; older files tell by its name alone."""
        return self.ours or self.provider == "hpo_fused" or self.provider.startswith("hpo_fused:")

    def take_quantiles(self) -> float | None:
        """Fill in quantiles from the samples and return the median; None where there is nothing to take."""
        if self.status != "ok" or not self.samples_s:
            return None
        self.q20_s, self.median_s, self.q80_s = quantiles(self.samples_s)
        return self.median_s


@dataclass(frozen=True)
class Prediction:
    """``hpo_fused.linear_memory``, bytes."""

    gradients: int
    accumulator: int
    chunk: int
    working: int
    peak: int

    @property
    def extra(self) -> int:
        """Peak beyond the gradients and the accumulator, at most."""
        return self.chunk + self.working


@dataclass
class MemoryRow:
    """Peak memory of one provider on one case.

    Attributes:
        series: what it belongs to: "tokens" (against their number, default settings), "budget" (with a fixed one) or
            "7b" (the head of a 7B model).
        case, provider, status, note, peak_extra_bytes, gradient_bytes: as in :class:`Measurement`; a row that was
            "predicted" has no peak.
        device: "cpu" or "cuda", where it runs or would run.
        prediction: for this package's providers on the linear path.
    """

    series: str
    case: Any
    provider: str
    device: str
    status: Status = "ok"
    note: str = ""
    peak_extra_bytes: int | None = None
    gradient_bytes: int = 0
    prediction: Prediction | None = None

    @property
    def beyond(self) -> int | None:
        """Measured peak beyond the gradients and the float32 accumulator; None where one of these is unknown."""
        if self.peak_extra_bytes is None or self.prediction is None:
            return None
        return max(self.peak_extra_bytes - self.gradient_bytes - self.prediction.accumulator, 0)

    @classmethod
    def of_dict(cls, content: dict[str, Any], case: Any) -> MemoryRow:
        """The inverse of ``dataclasses.asdict``, the case apart."""
        prediction = content["prediction"] and Prediction(**content["prediction"])
        return cls(**{**content, "case": case, "prediction": prediction})


@dataclass
class Row(Measurement):
    """A provider of losses from logits.

    Attributes:
        gb_per_s: the traffic that nobody can avoid over the median, in 1e9 bytes per second; None where it is open what
            that is.
        time_over_copy: median over rounds of this time / the copy's time.
        errors: against the float64 oracle; None for a copy, and where the first call gave no result.
    """

    case: Case
    gb_per_s: float | None = None
    time_over_copy: float | None = None
    errors: Errors | None = None

    @property
    def is_copy(self) -> bool:
        """Whether this is one of the limits and not a provider."""
        return self.provider in (COPY, COPY_NEW)

    @property
    def least_bytes(self) -> int | None:
        """The traffic that this row cannot avoid: a copy's is one read and one write, whatever is timed beside it."""
        return 2 * self.case.logits_bytes if self.is_copy else self.case.least_bytes

    @property
    def share_of_copy(self) -> float | None:
        """The part of the copy's bytes per second that is reached."""
        if not self.time_over_copy or self.least_bytes is None:
            return None
        return self.least_bytes / (2 * self.case.logits_bytes) / self.time_over_copy


def by_case(rows: Iterable[Row]) -> Iterator[tuple[Case, list[Row]]]:
    """Rows in the order in which they were measured, those of one case together."""
    for case, group in groupby(rows, key=lambda row: row.case):
        yield case, list(group)


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """20%, 50% and 80% quantile, interpolated between samples."""
    if len(samples) == 1:
        return (samples[0],) * 3
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return fifths[0], statistics.median(samples), fifths[3]


def first_of_ours(rows: Iterable[Measurement]) -> str | None:
    """Whom the others are compared with: the first provider of this package that was timed, or else the first one."""
    mine = [row for row in rows if row.is_ours]
    timed = (row.provider for row in mine if row.status == "ok" and row.samples_s)
    return next(timed, mine[0].provider if mine else None)


def median_ratio(samples: Sequence[float], others: Sequence[float]) -> float | None:
    """Median over rounds of sample / other; None without a common round.

    Within a round both saw the same machine, so this holds steady where the ratio of two medians wanders.
    """
    pairs = list(zip(samples, others, strict=False))
    return statistics.median(a / b for a, b in pairs) if pairs else None


def summarise(rows: Sequence[Row], ours: str | None) -> None:
    """Fill in the statistics of one case's rows from their samples.

    Args:
        rows: rows of one case.
        ours: the provider that the others are compared with.
    """
    samples = {row.provider: row.samples_s for row in rows if row.status == "ok"}
    for row in rows:
        median = row.take_quantiles()
        if median is None:
            continue
        row.gb_per_s = None if row.least_bytes is None else row.least_bytes / median / 1e9
        row.ratio_to_ours = median_ratio(row.samples_s, samples.get(ours or "", []))
        row.time_over_copy = median_ratio(row.samples_s, samples.get(COPY, []))


@dataclass
class ResultFile(ABC):
    """A whole run. ``interrupted`` says that it was cut short, so that rows and rounds are missing."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    command: str
    interrupted: bool = False

    def to_json(self) -> str:
        """The file's content."""
        content = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        return json.dumps(content, indent=1) + "\n"

    def write(self, path: Path) -> None:
        """Write the file."""
        path.write_text(self.to_json(), encoding="utf-8")

    @property
    @abstractmethod
    def measurements(self) -> Sequence[Measurement]:
        """Every row that was timed."""

    @classmethod
    @abstractmethod
    def of_dict(cls, content: dict[str, Any]) -> Self:
        """The inverse of ``dataclasses.asdict``; KeyError or TypeError for anything else."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file that :meth:`write` wrote.

        Raises:
            OSError: no such file, or not readable.
            ValueError: not such a file, or of another schema version.
        """
        return cls.parse(path, read_content(path))

    @classmethod
    def parse(cls, path: Path, content: dict[str, Any]) -> Self:
        """What :func:`read_content` found in ``path``.

        Raises:
            ValueError: not such a result.
        """
        try:
            return cls.of_dict(content)
        except (AttributeError, KeyError, TypeError) as error:
            command = cls.__dataclass_fields__["command"].default
            raise ValueError(f"{path} is not a result of hpo-fused-bench {command}: {error}") from error


def read_content(path: Path) -> dict[str, Any]:
    """The fields of a result file of any command.

    Raises:
        OSError: no such file, or not readable.
        ValueError: not such a file, or of another schema version.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("schema_version")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not a result of hpo-fused-bench") from error
    if version != SCHEMA_VERSION:
        raise ValueError(f"{path} has schema version {version}; this hpo-fused-bench reads {SCHEMA_VERSION}")
    return content


@dataclass
class Result(ResultFile):
    """A run of ``speed``, ``accuracy`` or ``memory`` on logits."""

    command: str = "speed"
    rows: list[Row] = field(default_factory=list)
    memory: list[MemoryRow] = field(default_factory=list)

    @property
    def measurements(self) -> Sequence[Row]:
        """Every row that was timed."""
        return self.rows

    @classmethod
    def of_dict(cls, content: dict[str, Any]) -> Self:
        """The inverse of ``dataclasses.asdict``."""

        def case(row: dict[str, Any]) -> Case:
            return Case(**{**row["case"], "shape": Shape(**row["case"]["shape"])})

        rows = [
            Row(**{**row, "case": case(row), "errors": row["errors"] and Errors.of_dict(row["errors"])})
            for row in content["rows"]
        ]
        memory = [MemoryRow.of_dict(row, case(row)) for row in content.get("memory", [])]
        return cls(**{**content, "rows": rows, "memory": memory})
