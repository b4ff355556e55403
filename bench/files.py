"""Result files of any command: read by what they hold, and told as markdown."""

from __future__ import annotations

from pathlib import Path

from . import all_report, report
from .evidence import Evidence
from .linear import report as linear_report
from .linear.results import LinearResult
from .results import Result, ResultFile, read_content

COMMANDS = ("speed", "linear", "memory", "accuracy", "all")


def read(path: Path) -> ResultFile:
    """A result of whichever command wrote it.

    Raises:
        OSError: no such file, or not readable.
        ValueError: not such a file, or of another schema version.
    """
    content = read_content(path)
    if content.get("command", "speed") not in COMMANDS:
        raise ValueError(f"{path} is not a result of hpo-fused-bench {', '.join(COMMANDS)}")
    return _kind(content).parse(path, content)


def _kind(content: dict[str, object]) -> type[ResultFile]:
    """By what is in it: one command writes a part alone where there is but one."""
    if "linear" in content:
        return Evidence
    rows = [*_list(content.get("rows")), *_list(content.get("memory"))]
    of_heads = any("hidden" in row["case"]["shape"] for row in rows) if rows else content.get("command") == "linear"
    return LinearResult if of_heads else Result


def _list(rows: object) -> list[dict[str, dict[str, dict[str, object]]]]:
    """Rows whose case has a shape, as far as these are any."""
    found = rows if isinstance(rows, list) else []
    return [row for row in found if isinstance(row, dict) and isinstance(row.get("case", {}).get("shape"), dict)]


def parts(result: ResultFile) -> list[Result | LinearResult]:
    """What it holds of times and memory."""
    if isinstance(result, Evidence):
        return result.parts
    assert isinstance(result, Result | LinearResult)
    return [result]


def markdown(result: ResultFile) -> str:
    """Its tables and notes; of everything the report."""
    if isinstance(result, Evidence) and result.command == "all":
        return all_report.markdown(result).rstrip("\n")
    texts = [linear_report.markdown(part) if isinstance(part, LinearResult) else report.markdown(part)
             for part in parts(result)]  # fmt: skip
    return "\n\n".join(texts)
