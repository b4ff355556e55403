"""A result file of several parts: what one run measured of logits, of heads, of machine code, and its tests."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .linear.results import LinearResult
from .results import SCHEMA_VERSION, Measurement, Result, ResultFile

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

CLOCKS = "clocks_after_timing"  # of the settings: a GPU's, where its driver tells


@dataclass
class Tests:
    """The numerical-equivalence suite on this machine.

    Attributes:
        passed, failed, skipped: tests; errors count as failed.
        seconds: how long they took.
        note: why there are none, or not all; "" where nothing is missing.
        failures: the names of those that failed.
    """

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    note: str = ""
    failures: list[str] = field(default_factory=list)


@dataclass
class Evidence(ResultFile):
    """Everything that one run of ``all``, or of another command on several operations, measured.

    Attributes:
        logits: cases of logits and log-probabilities; None where there were none.
        linear: a part for each head, dtype, objective and mode.
        kernels: what ``compile --json`` writes, or None.
        tests: the equivalence suite's outcome, or None.
        dropped: a line for each thing that was left out, and why.
    """

    command: str = "all"
    logits: Result | None = None
    linear: list[LinearResult] = field(default_factory=list)
    kernels: dict[str, Any] | None = None
    tests: Tests | None = None
    dropped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._at_work: tuple[Result | LinearResult, ...] | None = None

    @property
    def parts(self) -> list[Result | LinearResult]:
        """Those with times or memory."""
        return [*([] if self.logits is None else [self.logits]), *self.linear]

    def simplest(self) -> ResultFile:
        """The only part, where there is but one and nothing else to tell."""
        alone = len(self.parts) == 1 and not self.dropped and self.kernels is None and self.tests is None
        return self.parts[0] if alone else self

    def work_on(self, *parts: Result | LinearResult) -> None:
        """What is measured from now on goes into these; none: what is done now belongs to no part."""
        self._at_work = parts

    def interrupt(self) -> None:
        """It was cut short, and so was the part at work: the last one, where :meth:`work_on` was never told."""
        self.interrupted = True
        for part in self.parts[-1:] if self._at_work is None else self._at_work:
            part.interrupted = True

    @property
    def measurements(self) -> Sequence[Measurement]:
        """Every row of every part."""
        return [row for part in self.parts for row in part.measurements]

    def to_json(self) -> str:
        """The file's content; the environment, which all parts share, once."""
        content = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        for part in [content["logits"] or {}, *content["linear"]]:
            part.pop("environment", None)
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def of_dict(cls, content: dict[str, Any]) -> Self:
        """The inverse of :meth:`to_json`, the schema version apart."""
        shared = {"environment": content["environment"]}
        content["logits"] = content["logits"] and Result.of_dict({**shared, **content["logits"]})
        content["linear"] = [LinearResult.of_dict({**shared, **part}) for part in content["linear"]]
        content["tests"] = content["tests"] and Tests(**content["tests"])
        return cls(**content)

    @classmethod
    def of_parts(cls, parts: Sequence[Result | LinearResult], **fields: Any) -> Self:
        """An evidence of these."""
        logits = next((part for part in parts if isinstance(part, Result)), None)
        return cls(logits=logits, linear=[part for part in parts if isinstance(part, LinearResult)], **fields)
