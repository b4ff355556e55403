"""The commands of ``hpo-fused-bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from hpo_fused.objective import Objective

from . import accuracy, files, report
from .arguments import INTERRUPTED, check_writable, device_of, one_of
from .cases import CUSTOM, DEFAULT_SHAPES, DTYPES, SHAPES, Case, parse_shape
from .compile_command import compile_
from .counters_command import counters
from .curves import curves
from .display import Display
from .environment import environment
from .linear import commands as linear_commands
from .linear.cases import CUSTOM as CUSTOM_HEAD
from .linear.cases import HEADS
from .linear.providers import PROVIDERS as LINEAR_PROVIDERS
from .linear.providers import create as create_linear
from .providers import DEFAULT, PROVIDERS, create
from .results import Result
from .run import run_case
from .trial import Settings
from .tune_command import tune

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Time the fused policy losses against what people use today, on this machine.",
)


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
    where = device_of(device)
    on_gpu = where.type == "cuda"
    tokens = tokens or ((2048 if on_gpu else 256) if quick else (8192 if on_gpu else 1024))
    repeats = repeats or (10 if quick else 100 if on_gpu else 20)
    budget = budget if budget is not None else (10.0 if quick else 30.0)
    one_of("dtype", dtype, DTYPES)
    one_of("objective", objective, Objective.presets())
    try:
        shapes = [parse_shape(name) for name in dict.fromkeys(shape)]
        providers = [create(name, inplace=inplace) for name in dict.fromkeys(provider)]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    check_writable(output)
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


app.command()(linear_commands.linear)
app.command()(linear_commands.memory)
app.command()(linear_commands.plot)
app.command("compile")(compile_)
app.command()(curves)
app.command()(tune)
app.command()(counters)


@app.command("report")
def report_(file: Annotated[Path, typer.Argument(help="What `speed`, `linear` or `memory` wrote.")]) -> None:
    """Print a result file as markdown tables."""
    try:
        result = files.read(file)
    except OSError as error:
        raise typer.BadParameter(f"cannot read {file}: {error.strerror}") from None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    typer.echo(files.markdown(result))


@app.command()
def shapes() -> None:
    """List the named shapes and the providers, of logits and of the linear path."""
    view = Table("shape", "vocabulary", "softcap", "why", box=None, pad_edge=False)
    for shape in SHAPES.values():
        view.add_row(shape.name, str(shape.vocabulary), f"{shape.softcap or '–'}", shape.why)
    view.add_row(CUSTOM, "N", "C or –", "any other")
    out = Console(highlight=False)
    out.print(view)
    out.print()
    out.print(_providers({name: create(name).summary for name in PROVIDERS}))
    out.print("\nlinear", style="bold")
    view = Table("head", "hidden", "vocabulary", "softcap", "why", box=None, pad_edge=False)
    for head in HEADS.values():
        view.add_row(head.name, str(head.hidden), str(head.vocabulary), f"{head.softcap or '–'}", head.why)
    view.add_row(CUSTOM_HEAD, "N", "N", "C or –", "any other")
    out.print(view)
    out.print()
    out.print(_providers({name: create_linear(name).summary for name in LINEAR_PROVIDERS}))


def _providers(summaries: dict[str, str]) -> Table:
    view = Table("provider", "what it runs", box=None, pad_edge=False)
    for name, summary in summaries.items():
        view.add_row(name, summary)
    return view


@app.command()
def env(device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "auto") -> None:
    """Print what a result records about this machine."""
    for key, value in environment(device_of(device)).items():
        typer.echo(f"{key}: {'–' if value is None else value}")
