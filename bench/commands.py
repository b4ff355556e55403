"""The commands of ``hpo-fused-bench``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from hpo_fused.objective import Objective

from . import accuracy, compile_table, report
from .cases import CUSTOM, DEFAULT_SHAPES, DTYPES, SHAPES, Case, parse_shape
from .compile_report import TARGETS, ReportFailed, broken_limits, run_report
from .display import Display
from .environment import environment
from .providers import DEFAULT, PROVIDERS, create
from .results import Result
from .run import Settings, run_case

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Time the fused policy losses against what people use today, on this machine.",
)
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise typer.BadParameter(f"unknown device {name!r}; expected cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"cannot time on {name!r}; expected cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise typer.BadParameter(f"PyTorch sees {count} GPUs, so there is no {name!r}")
        torch.cuda.set_device(device)
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _one_of(kind: str, name: str, known: Any) -> str:
    if name not in known:
        raise typer.BadParameter(f"unknown {kind} {name!r}; expected one of {', '.join(known)}")
    return name


def _writable(output: Path | None) -> None:
    """Refuse a file that cannot be written now, not after minutes of work."""
    if output is None:
        return
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.open("a", encoding="utf-8").close()
    except OSError as error:
        raise typer.BadParameter(f"cannot write {output}: {error.strerror}") from None


def _show(result: Result, out: Console) -> None:
    out.print(report.environment_line(result), style="dim", highlight=False)
    out.print(report.table(result))
    for line in report.notes(result):
        out.print(line, style="dim", highlight=False, markup=False)
    if (errors := accuracy.table(result)) is not None:
        out.print()
        out.print(errors)
    for line in accuracy.notes(result):
        out.print(line, style="dim", highlight=False, markup=False)
    for line in accuracy.broken(result):
        out.print(line, style="red", highlight=False, markup=False)
    if warning := report.busy_warning(result):
        out.print(warning, style="yellow", highlight=False)
    if result.interrupted:
        out.print("Interrupted: what was finished is above.", style="yellow")
    out.print(report.verdict(result), style="bold", highlight=False)


@app.command()
def speed(
    shape: Annotated[
        list[str], typer.Option(help=f"Named shape (see `shapes`) or {CUSTOM}; repeatable.")
    ] = DEFAULT_SHAPES,
    tokens: Annotated[int | None, typer.Option(min=1, help="Rows of logits (8192 on a GPU, 1024 on a CPU).")] = None,
    dtype: Annotated[str, typer.Option(help=f"Of the logits: {', '.join(DTYPES)}.")] = "bf16",
    objective: Annotated[str, typer.Option(help="A preset of hpo_fused.Objective.")] = "mhpo_ahpo",
    inactive: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of responses with zero advantage.")] = 0.0,
    ragged: Annotated[
        bool, typer.Option("--ragged", help="Responses of different lengths, padded and masked.")
    ] = False,
    inplace: Annotated[
        bool, typer.Option("--inplace", help="hpo_fused writes the gradient over the logits; the others cannot.")
    ] = False,
    provider: Annotated[list[str], typer.Option(help=f"Of {', '.join(PROVIDERS)}; repeatable.")] = DEFAULT,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto is a GPU if there is one.")] = "auto",
    repeats: Annotated[int | None, typer.Option(min=1, help="Rounds at most (100 on a GPU, 20 on a CPU).")] = None,
    budget: Annotated[
        float | None,
        typer.Option(min=0.0, help="Seconds of timing per shape (30), though three rounds at least."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small: about a minute on two CPU cores.")] = False,
    seed: Annotated[int, typer.Option(help="Of the random inputs.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Write every sample to this JSON file; none is written by default.")
    ] = None,
) -> None:
    """Time forward and gradient against eager PyTorch, torch.compile and a bare copy of the logits.

    Every provider is first held against a float64 oracle; one that differs is reported and not timed. Then all run
    once per round, in rotating order. A second table tells how exact each is, and whether it repeats itself. The
    exit status is 1 if a provider was wrong or failed, or if hpo_fused misses a limit of its own.
    """
    where = _device(device)
    on_gpu = where.type == "cuda"
    tokens = tokens or ((2048 if on_gpu else 256) if quick else (8192 if on_gpu else 1024))
    repeats = repeats or (10 if quick else 100 if on_gpu else 20)
    budget = budget if budget is not None else (10.0 if quick else 30.0)
    _one_of("dtype", dtype, DTYPES)
    _one_of("objective", objective, Objective.presets())
    try:
        shapes = [parse_shape(name) for name in dict.fromkeys(shape)]
        providers = [create(name, inplace=inplace) for name in dict.fromkeys(provider)]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    _writable(output)
    cases = [Case.of_tokens(one, tokens, dtype, objective, inactive, ragged) for one in shapes]

    settings = {
        "tokens": tokens,
        "repeats": repeats,
        "budget": budget,
        "seed": seed,
        "inplace": inplace,
        "quick": quick,
    }
    result = Result(environment(where), settings)
    try:
        with Display(Console(stderr=True), len(cases)) as display:
            for case in cases:
                run_case(case, providers, Settings(where, repeats, budget, seed), result.rows, display)
    except KeyboardInterrupt:
        result.interrupted = True
    finally:
        if output is not None and result.rows:
            result.write(output)
    out = Console()
    _show(result, out)
    if output is not None:
        out.print(f"Wrote {output}", highlight=False, soft_wrap=True)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)
    if any(row.status in ("wrong", "failed") for row in result.rows) or any(accuracy.broken(result)):
        raise typer.Exit(1)


@app.command("report")
def report_(file: Annotated[Path, typer.Argument(help="What `speed --output` wrote.")]) -> None:
    """Print a result file as a markdown table."""
    try:
        result = Result.read(file)
    except OSError as error:
        raise typer.BadParameter(f"cannot read {file}: {error.strerror}") from None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    typer.echo(report.markdown(result))


@app.command("compile")
def compile_(
    target: Annotated[list[str], typer.Option(help=f"Of {', '.join(TARGETS)}; repeatable.")] = TARGETS,
    only: Annotated[str, typer.Option(help="Only variants whose kernel/name contains this.")] = "",
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 if a limit is broken, and say which.")] = False,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the records to this JSON file.")] = None,
) -> None:
    """Compile the kernels, without a GPU, and tell what their machine code costs.

    A covering set of variants, with the settings of a launch at V = 151936. The limits: nothing spills, main loops
    access memory 16 bytes at a time, and a statistics and a gradient sweep together take at most 2.3 special-function
    operations per element.
    """
    targets = [_one_of("target", name, TARGETS) for name in dict.fromkeys(target)]
    _writable(json_)
    try:
        with Display(Console(stderr=True), 1) as display:
            display.stage(f"compiling for {', '.join(targets)}")

            def progress(done: int, total: int) -> None:
                display.advance(done / total - display.done)
                display.stage(f"compiling for {', '.join(targets)}")

            records = run_report(targets, only, progress)
    except ReportFailed as error:
        typer.echo(f"hpo-fused-bench compile: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    if json_ is not None:
        json_.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    out = Console(highlight=False)
    out.print(compile_table.table(records))
    for line in compile_table.notes():
        out.print(line, style="dim", markup=False)
    broken = broken_limits(records)
    for line in broken:
        out.print(line, style="red", markup=False, soft_wrap=True)
    out.print(
        f"{len(records)} kernels compiled, {len(broken)} limits broken." if broken
        else f"{len(records)} kernels compiled: no spills, 16-byte accesses, MUFU within limits.",
        style="bold",
    )  # fmt: skip
    if json_ is not None:
        out.print(f"Wrote {json_}", soft_wrap=True)
    if check and broken:
        raise typer.Exit(1)


@app.command()
def shapes() -> None:
    """List the named shapes and the providers."""
    view = Table("shape", "vocabulary", "softcap", "why", box=None, pad_edge=False)
    for shape in SHAPES.values():
        view.add_row(shape.name, str(shape.vocabulary), f"{shape.softcap or '–'}", shape.why)
    view.add_row(CUSTOM, "N", "C or –", "any other")
    out = Console(highlight=False)
    out.print(view)
    view = Table("provider", "what it runs", box=None, pad_edge=False)
    for name in PROVIDERS:
        view.add_row(name, create(name).summary)
    out.print()
    out.print(view)


@app.command()
def env(device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "auto") -> None:
    """Print what a result records about this machine."""
    for key, value in environment(_device(device)).items():
        typer.echo(f"{key}: {'–' if value is None else value}")
