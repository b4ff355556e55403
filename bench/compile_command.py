"""``hpo-fused-bench compile``: the kernels' machine code, its limits, and what a model makes of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import compile_table
from .arguments import INTERRUPTED, check_writable, one_of
from .compile_document import CompileDocument, document
from .compile_limits import KEPT
from .compile_plan import TARGETS
from .compile_report import Report, ReportFailed, run_report
from .display import Display
from .gpus import GPUS


def _compiled(targets: list[str], only: str, every: bool) -> Report:
    """The report, a progress bar meanwhile."""
    title = f"compiling for {', '.join(targets)}"
    with Display(Console(stderr=True), 1) as display:
        display.stage(title)

        def progress(done: int, total: int) -> None:
            display.advance(done / total - display.done)
            display.stage(title)

        return run_report(targets, only, every, progress)


def _print(lines: Iterable[tuple[str, bool]], out: Console) -> None:
    for text, heading in lines:
        out.print(text, style="bold" if heading else "", markup=False, no_wrap=True, overflow="crop")


def _show(result: CompileDocument, out: Console) -> None:
    if result.records:
        _print(compile_table.lines(result.records, out.width), out)
        for line in compile_table.notes():
            out.print(line, style="dim", markup=False)
    if result.predictions:
        out.print()
        out.print(compile_table.MODEL_TITLE, style="bold")
        _print(compile_table.prediction_lines(result.predictions, out.width), out)
        for line in compile_table.prediction_notes(result.predictions):
            out.print(line, style="dim", markup=False)
    out.print()
    out.print(result.covered, markup=False)
    for target, reason in result.unavailable.items():
        out.print(f"{target}: not covered, nothing compiles for it here: {reason}", style="yellow", markup=False)
    for line in result.broken:
        out.print(line, style="red", markup=False, soft_wrap=True)
    verdict = f"{len(result.broken)} limits broken." if result.broken else f"{KEPT}."
    separator = ", " if result.broken else ": "
    out.print(f"{len(result.records)} kernels compiled{separator}{verdict}", style="bold")


def compile_(
    target: Annotated[
        list[str], typer.Option(help=f"Of {', '.join(TARGETS)}; repeatable. Default: all that compile here.")
    ] = [],  # noqa: B006
    only: Annotated[str, typer.Option(help="Only variants whose kernel/name contains this, on each target.")] = "",
    every: Annotated[bool, typer.Option("--every", help="Every variant on each target, not a covering set.")] = False,
    gpu: Annotated[
        list[str], typer.Option(help=f"Whose time to predict, of {', '.join(GPUS)}; repeatable. Default: all.")
    ] = [],  # noqa: B006
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 if a limit is broken, and say which.")] = False,
    json_: Annotated[Path | None, typer.Option("--json", help="Write everything to this JSON file.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print tables for documentation.")] = False,
    summary: Annotated[
        bool, typer.Option("--summary", help="Print only the predicted time over a copy's, as markdown.")
    ] = False,
) -> None:
    """Compile the kernels, without a GPU: what their machine code costs, and what a roofline model makes of it.

    By default a covering set of variants and targets, with the settings of a launch at V = 151936. The limits: nothing
    spills; main loops access memory 16 bytes at a time; statistics and gradient sweep together take at most 2.3
    special-function operations and 18 instructions per element (22 with the entropy), softcap apart; the programs of a
    launch are resident together. The exit status is 2 where a target that was asked for cannot be compiled for.
    """
    targets = [one_of("target", name, TARGETS) for name in dict.fromkeys(target)] or TARGETS
    gpus = [GPUS[one_of("gpu", name, GPUS)] for name in dict.fromkeys(gpu)] or list(GPUS.values())
    check_writable(json_)
    try:
        report = _compiled(targets, only, every or bool(target))
    except ReportFailed as error:
        typer.echo(f"hpo-fused-bench compile: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    result = document(report, targets, only, every or bool(target), gpus)
    if json_ is not None:
        json_.write_text(json.dumps(result.as_dict(), indent=1) + "\n", encoding="utf-8")
    out = Console(highlight=False)
    if summary and result.predictions:
        typer.echo(compile_table.summary(result.predictions))
    elif markdown:
        typer.echo(compile_table.markdown(result.records, result.predictions, result.covered))
    else:
        _show(result, out)
    if json_ is not None:
        out.print(f"Wrote {json_}", soft_wrap=True)
    for name in result.unavailable:
        if name in target or not result.records:
            typer.echo(f"hpo-fused-bench compile: {name}: {result.unavailable[name]}", err=True)
    if not result.records or any(name in result.unavailable for name in target):
        raise typer.Exit(2)
    if check and result.broken:
        raise typer.Exit(1)
