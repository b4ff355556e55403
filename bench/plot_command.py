"""``hpo-fused-bench plot``: pictures of any result file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from . import files
from .arguments import check_writable
from .evidence import Evidence
from .linear.cases import LinearCase
from .linear.results import LinearResult
from .results import Result, ResultFile


def drawing_of(result: Result | LinearResult) -> Callable[[Path], None]:
    """Draws one part to a file; imported here, as matplotlib takes a second."""
    from . import plot as of_logits
    from .linear import plot as of_heads

    if isinstance(result, LinearResult):
        return lambda output: of_heads.draw_figure(result, output)
    return lambda output: of_logits.draw_figure(result, output)


def part_name(part: Result | LinearResult) -> str:
    """A part's name in a file's name."""
    if isinstance(part, Result):
        return "logits"
    case: LinearCase | None = next((one.case for rows in (part.rows, part.memory) for one in rows), None)
    name = "" if case is None else f"-{case.shape.name}-{case.tokens}"
    return "linear" + re.sub(r"[^A-Za-z0-9.]+", "-", name)


def _jobs(result: ResultFile, output: Path) -> Iterator[tuple[Path, Callable[[Path], None]]]:
    """A file for each part: ``output`` itself where there is one, else with the part's name behind its own."""
    parts = files.parts(result)
    used: dict[str, int] = {}
    for part in parts:
        name = part_name(part)
        used[name] = used.get(name, 0) + 1
        suffix = f"-{name}" + (f"-{used[name]}" if used[name] > 1 else "")
        several = isinstance(result, Evidence) and len(parts) > 1
        yield output.with_name(f"{output.stem}{suffix}{output.suffix}") if several else output, drawing_of(part)


def plot(
    file: Annotated[Path, typer.Argument(help="What `--output` of any command wrote.")],
    output: Annotated[Path, typer.Option(help="The picture: .png, .svg or .pdf.")],
) -> None:
    """Draw a result: times over a copy's, peak memory and errors; of the linear path time and memory as lines.

    Where the file holds several operations or heads there is a picture for each, its name behind that of `--output`:
    `all.svg` becomes `all-logits.svg`, `all-linear-qwen3-8b-8192.svg` and so on.
    """
    from .plot_style import PlotUnavailable

    try:
        result = files.read(file)
    except OSError as error:
        raise typer.BadParameter(f"cannot read {file}: {error.strerror}") from None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    jobs = list(_jobs(result, output))
    if not jobs:
        raise typer.BadParameter(f"{file} holds no measurement")
    reasons = []
    for where, draw in jobs:
        check_writable(where)
        try:
            draw(where)
        except PlotUnavailable as error:
            reasons.append(str(error))
            if not where.stat().st_size:  # made by the check above
                where.unlink()
        else:
            typer.echo(f"Wrote {where}")
    if len(reasons) == len(jobs):
        typer.echo(f"hpo-fused-bench plot: {'; '.join(dict.fromkeys(reasons))}", err=True)
        raise typer.Exit(2)
