"""Result files of any command: read by what they hold, and told as markdown."""

from __future__ import annotations

from pathlib import Path

from . import report
from .linear import report as linear_report
from .linear.results import LinearResult
from .results import Result, ResultFile, read_content

KINDS: dict[str, type[ResultFile]] = {"speed": Result, "linear": LinearResult, "memory": LinearResult}


def read(path: Path) -> ResultFile:
    """A result of whichever command wrote it.

    Raises:
        OSError: no such file, or not readable.
        ValueError: not such a file, or of another schema version.
    """
    content = read_content(path)
    kind = KINDS.get(content.get("command", "speed"))
    if kind is None:
        raise ValueError(f"{path} is not a result of hpo-fused-bench {', '.join(KINDS)}")
    return kind.parse(path, content)


def markdown(result: ResultFile) -> str:
    """Its tables and notes."""
    if isinstance(result, LinearResult):
        return linear_report.markdown(result)
    assert isinstance(result, Result)
    return report.markdown(result)
