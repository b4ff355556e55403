"""Result of a run: one row for each case and provider, and the JSON file that holds them."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .cases import Case, labels
from .check import Errors

SCHEMA_VERSION = 3
Status = Literal["ok", "wrong", "failed", "out_of_memory", "skipped"]


@dataclass
class Row:
    """One provider on one case.

    Attributes:
        ours, limit: the provider belongs to this package; it is a bound and no implementation.
        status, note: "wrong" differs from float64 and is not timed; the reason, for anything but "ok".
        rounds: samples behind the times, 0 where nothing was timed.
        median_s, q25_s, q75_s: seconds, of the samples.
        over_ours: median over rounds of this time / hpo_fused's in the same round; above 1 hpo_fused is faster.
        over_limit: the same over the fastest limit's time.
        device_s, device_over_limit: median of replays of a CUDA graph, without the host's part, and over the fastest
            limit's; None where none were timed.
        peak_bytes: peak memory beyond the inputs, gradients included.
        gradient_bytes: the gradients' own size.
        first_call_s: seconds of the first call, with whatever compilation it takes.
        repeats: a second call gave the same loss and gradients, bit for bit; None if there was none.
        errors: against float64; None for a limit, and where the first call gave no result.
        version: the implementation that ran; "" where it did not come to that.
        leaves_out: work of this package's functions that the provider does not do.
    """

    case: Case
    provider: str
    ours: bool = False
    limit: bool = False
    status: Status = "ok"
    note: str = ""
    rounds: int = 0
    median_s: float | None = None
    q25_s: float | None = None
    q75_s: float | None = None
    over_ours: float | None = None
    over_limit: float | None = None
    device_s: float | None = None
    device_over_limit: float | None = None
    peak_bytes: int | None = None
    gradient_bytes: int = 0
    first_call_s: float | None = None
    repeats: bool | None = None
    errors: Errors | None = None
    version: str = ""
    leaves_out: str = ""

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Row:
        """The inverse of ``dataclasses.asdict``."""
        errors = content["errors"] and Errors.from_dict(content["errors"])
        return cls(**{**content, "case": Case.from_dict(content["case"]), "errors": errors})

    @property
    def complaint(self) -> str:
        """The reason why a command ends with status 1 because of this row, or ""."""
        if self.status in ("wrong", "failed"):
            return f"{self.status}: {self.note}"
        if self.ours and self.errors is not None and self.errors.broken:
            return f"misses its own limits: {self.errors.broken}"
        return "a second call gave another result" if self.ours and self.repeats is False else ""


def against_tokens(rows: Sequence[Row]) -> dict[tuple[str, str], dict[int, int]]:
    """Peak memory by the number of tokens for each case and provider that was measured at several numbers."""
    names = labels((row.case for row in rows), without=("tokens",))
    found: dict[tuple[str, str], dict[int, int]] = {}
    for row in rows:
        if row.peak_bytes is not None:
            found.setdefault((names[row.case], row.provider), {})[row.case.tokens] = row.peak_bytes
    return {key: peaks for key, peaks in found.items() if len(peaks) > 1}


def median_ratio(samples: Sequence[float], others: Sequence[float]) -> float | None:
    """Median over rounds of sample / other; None without a common round.

    Within a round both saw the same machine, so this holds steady where the ratio of two medians wanders.
    """
    pairs = list(zip(samples, others, strict=False))
    return statistics.median(a / b for a, b in pairs) if pairs else None


def summarise(rows: Sequence[Row], samples: Mapping[str, Sequence[float]]) -> None:
    """Fill in the statistics of one case's rows from the seconds of every complete round by provider."""
    timed = {row.provider: row for row in rows if row.status == "ok" and samples.get(row.provider)}
    for name, row in timed.items():
        own = samples[name]
        quartiles = statistics.quantiles(own, n=4, method="inclusive") if len(own) > 1 else [own[0]] * 3
        row.rounds, (row.q25_s, row.median_s, row.q75_s) = len(own), quartiles
    ours = next((name for name, row in timed.items() if row.ours), "")
    limit = min((name for name, row in timed.items() if row.limit), key=lambda n: timed[n].median_s or 0.0, default="")
    for name, row in timed.items():
        row.over_ours = median_ratio(samples[name], samples.get(ours, ()))
        row.over_limit = median_ratio(samples[name], samples.get(limit, ()))
    bound = min((row.device_s for row in rows if row.limit and row.device_s), default=None)
    for row in rows:
        row.device_over_limit = row.device_s / bound if row.device_s and bound else None


@dataclass
class Result:
    """A run of any command.

    Attributes:
        settings: those that are not of a case.
        kernels: each compiled kernel (``machine_code.report.Kernel``) as a dict.
        notes: a line for each thing that was left out.
        interrupted: cut short, so that rows and rounds are missing.
    """

    command: str
    environment: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    kernels: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False

    def write(self, path: Path) -> None:
        """Write the file: JSON, a line for each row."""
        content = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        lists = {name: content.pop(name) for name in ("rows", "kernels")}
        text = json.dumps(content, indent=1).removesuffix("\n}")
        for name, items in lists.items():
            lines = ",\n".join(f"  {json.dumps(item)}" for item in items)
            text += f',\n "{name}": [\n{lines}\n ]' if items else f',\n "{name}": []'
        path.write_text(text + "\n}\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Result:
        """Read a file that :meth:`write` wrote.

        Raises:
            OSError: no such file, or not readable.
            ValueError: not such a file, or of another schema version.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content.pop("schema_version")
            if version == SCHEMA_VERSION:
                return cls(**{**content, "rows": [Row.from_dict(row) for row in content["rows"]]})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{path} is not a result of hpo-fused-bench ({type(error).__name__}: {error})") from error
        raise ValueError(f"{path}: expected schema version {SCHEMA_VERSION}, got {version}")
