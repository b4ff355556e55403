"""The commands of ``hpo-fused-bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from . import all_report, files, matrix_command
from .all_command import all_
from .arguments import device_of
from .cases import CUSTOM, SHAPES
from .compare_command import compare
from .compile_command import compile_
from .counters_command import counters
from .curves import curves
from .environment import environment
from .evidence import Evidence
from .linear import commands as linear_commands
from .linear.cases import CUSTOM as CUSTOM_HEAD
from .linear.cases import HEADS
from .plot_command import plot
from .providers_command import providers
from .tune_command import tune

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Time the fused policy losses against what people use today, on this machine.",
)


app.command("all")(all_)
app.command()(matrix_command.speed)
app.command()(matrix_command.accuracy)
app.command()(matrix_command.memory)
app.command()(linear_commands.linear)
app.command()(plot)
app.command("compile")(compile_)
app.command()(curves)
app.command()(compare)
app.command()(providers)
app.command()(tune)
app.command()(counters)


@app.command("report")
def report_(
    file: Annotated[Path, typer.Argument(help="What any command wrote with --output.")],
    summary: Annotated[bool, typer.Option("--summary", help="Only the short table, of a result of `all`.")] = False,
) -> None:
    """Print a result file as markdown."""
    try:
        result = files.read(file)
    except OSError as error:
        raise typer.BadParameter(f"cannot read {file}: {error.strerror}") from None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if summary and not isinstance(result, Evidence):
        raise typer.BadParameter(f"--summary is for results of all, {file} is one of {result.command}")
    typer.echo(all_report.short(result) if summary and isinstance(result, Evidence) else files.markdown(result))


@app.command()
def shapes() -> None:
    """List the named shapes, of logits and of the linear path."""
    out = Console(highlight=False)
    view = _names("shape", "vocabulary", "softcap", "why")
    for shape in SHAPES.values():
        view.add_row(shape.name, str(shape.vocabulary), f"{shape.softcap or '–'}", shape.why)
    view.add_row(CUSTOM, "N", "C or –", "any other")
    out.print(view)
    out.print("\nlinear", style="bold")
    view = _names("head", "hidden", "vocabulary", "softcap", "why")
    for head in HEADS.values():
        view.add_row(head.name, str(head.hidden), str(head.vocabulary), f"{head.softcap or '–'}", head.why)
    view.add_row(CUSTOM_HEAD, "N", "N", "C or –", "any other")
    out.print(view)


def _names(*headings: str) -> Table:
    """A table whose last column gives way where the terminal is narrow: what is typed stands in the others."""
    view = Table(*headings, box=None, pad_edge=False)
    for column in view.columns[:-1]:
        column.no_wrap = True
    view.columns[-1].overflow = "fold"
    return view


@app.command()
def env(device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "auto") -> None:
    """Print what a result records about this machine."""
    for key, value in environment(device_of(device)).items():
        typer.echo(f"{key}: {'–' if value is None else value}")
