"""The commands of ``hpo-fused-bench``."""

from __future__ import annotations

from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from hpo_fused.objective import Objective

from . import report
from .cases import CUSTOM, DEFAULT_SHAPES, DTYPES, SHAPES, Case, parse_shape
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


class _Display:
    """The progress bar on stderr, or where that is no terminal one line for each stage."""

    def __init__(self, console: Console, cases: int) -> None:
        self.console, self.cases = console, cases
        self.done, self.started, self.title = 0.0, monotonic(), ""
        self.bar: Bar | None = None

    def __enter__(self) -> _Display:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
        self.bar = None

    def _open(self, animated: bool) -> Bar:
        """A bar that draws itself from a thread, or, as that would disturb a timing, only when told to."""
        self._close()
        columns = (SpinnerColumn(), BarColumn(bar_width=16), TextColumn("{task.description}"), TimeElapsedColumn())
        self.bar = Bar(*columns, console=self.console, transient=True, auto_refresh=animated, get_time=monotonic)
        self.bar.add_task("", total=self.cases)
        self.bar.tasks[0].start_time = self.started
        self.bar.start()
        return self.bar

    def stage(self, text: str, *, timing: bool = False) -> None:
        if self.console.is_terminal:
            fits = self.bar is not None and self.bar.live.auto_refresh is not timing
            bar = self.bar if fits and self.bar is not None else self._open(animated=not timing)
            bar.update(bar.task_ids[0], description=text, completed=self.done, refresh=timing)
            return
        title = text.partition(", round")[0]
        if title != self.title:
            self.console.print(title, highlight=False, soft_wrap=True)
        self.title = title

    def advance(self, cases: float) -> None:
        self.done += cases


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


def _show(result: Result, out: Console) -> None:
    out.print(report.environment_line(result), style="dim", highlight=False)
    out.print(report.table(result))
    for line in report.notes(result):
        out.print(line, style="dim", highlight=False, markup=False)
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
    once per round, in rotating order. The exit status is 1 if a provider was wrong or failed.
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
    if output is not None:  # now, not after minutes of measuring
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.open("a", encoding="utf-8").close()
        except OSError as error:
            raise typer.BadParameter(f"cannot write {output}: {error.strerror}") from None
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
        with _Display(Console(stderr=True), len(cases)) as display:
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
    if any(row.status in ("wrong", "failed") for row in result.rows):
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
