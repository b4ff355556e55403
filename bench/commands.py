"""The commands of ``hpo-fused-bench``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table as RichTable

from . import compare as comparison
from . import parallel, pictures, plan, report, wire
from . import providers as known
from .cases import CUSTOM, SHAPES, Case, labels, parse_shape
from .environment import environment
from .machine_code.calls import TARGETS
from .machine_code.report import ReportFailed, call_table, kernel_table, run_report
from .options import (
    CaseOptions,
    DeviceName,
    Names,
    Output,
    Quick,
    Seed,
    check_writable,
    default_tokens,
    device_of,
    launch_of,
    option,
    refusing,
    repeated,
    takes_cases,
)
from .providers import Provider, Unavailable
from .providers.fused import Fused
from .results import Result
from .run import Settings, run_case

INTERRUPTED = 130  # 128 + SIGINT, as shells report it

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False,
    help="Time the fused policy losses against what people use today, on this machine.",
)  # fmt: skip


def measure(
    result: Result, cases: Sequence[Case], providers: Sequence[Provider], settings: Settings, *, named: bool = False
) -> None:
    """Every case into ``result``, which holds what is finished however this ends.

    ``named``: the providers were asked for by name, so that one without an operation says so in a row.
    """
    err, names = Console(stderr=True, highlight=False), labels(cases)

    def tell(line: str) -> None:
        err.print(f"{names[case]}: {line}", style="dim", markup=False, soft_wrap=True)

    try:
        for case in cases:
            able = [one for one in providers if named or case.operation in one.operations()]
            run_case(case, able, settings, result.rows, tell)
    except KeyboardInterrupt:
        result.interrupted = True


def finish(result: Result, output: Path | None) -> None:
    """Show and write the result, and end: 130 if it was interrupted, 1 if something was wrong."""
    out = Console(highlight=False)
    report.show(result, out)
    if output is not None:
        result.write(output)
        out.print(f"Wrote {output}", soft_wrap=True)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)
    if any(row.complaint for row in result.rows):
        raise typer.Exit(1)


@app.command()
@takes_cases
def speed(
    options: CaseOptions,
    cuda_graph: Annotated[bool, option("cuda-graph", "Time replays of a CUDA graph: no host work.")] = False,
    launch: Annotated[Names, repeated("launch", "THREADS,LOADS,ROWS: hpo_fused launched with these, too")] = None,
    device: DeviceName = "auto",
    repeats: Annotated[int | None, typer.Option(min=1, help="Rounds at most (100 on a GPU, 20 on a CPU).")] = None,
    budget: Annotated[float, option("budget", "Seconds of timing per case, though three rounds at least.")] = 30.0,
    world_size: Annotated[
        int | None, typer.Option(min=2, help="Ranks that share the vocabulary; hpo_fused alone.")
    ] = None,
    quick: Quick = False,
    seed: Seed = 0,
    output: Output = None,
) -> None:
    """Time against eager PyTorch, torch.compile, other projects, and a bare copy of the logits or bare GEMMs.

    Every combination of the options is a case. Every provider is first held against float64; one that differs is
    reported and not timed. Then all run once per round, in rotating order. The exit status is 1 if a provider was wrong
    or failed, or if hpo_fused misses a limit of its own.

    With `--world-size` as many processes share the vocabulary, and ÷ ours is their time over a shard's without group.
    """
    where = device_of(device)
    cases = options.cases(where, lambda op: [default_tokens(op, where, quick)], cuda_graph=cuda_graph)
    launched = [Fused("auto" if where.type == "cuda" else "triton", launch_of(text)) for text in launch or ()]
    repeats = repeats or (10 if quick else 100 if where.type == "cuda" else 20)
    settings = Settings(where, repeats, budget, seed)
    if world_size is None:
        run_all("speed", options, cases, launched, settings, output)
        return
    if options.provider or launched:
        raise typer.BadParameter("--world-size: expected neither --provider nor --launch beside it")
    with refusing():
        parallel.check(cases, world_size, where)
    check_writable(output)
    told = {"repeats": repeats, "budget": budget, "seed": seed, "world_size": world_size}
    result = Result("speed", environment(where), told)
    parallel.run_cases(cases, world_size, settings, result, lambda line: typer.echo(line, err=True))
    finish(result, output)


@app.command()
@takes_cases
def accuracy(options: CaseOptions, device: DeviceName = "auto", seed: Seed = 0, output: Output = None) -> None:
    """Hold every provider against float64: loss, log-probabilities, entropies and gradients.

    Nothing is timed. The exit status is 1 if a provider was wrong or failed, or if hpo_fused misses a limit of its own.
    """
    where = device_of(device)
    cases = options.cases(where, lambda op: [256], dtype=("bf16", "fp32"))
    run_all("accuracy", options, cases, [], Settings(where, 0, 0.0, seed), output)


@app.command()
@takes_cases
def memory(
    options: CaseOptions, device: DeviceName = "auto", quick: Quick = False, seed: Seed = 0, output: Output = None
) -> None:
    """Peak memory against the number of tokens. Results are held against float64, and nothing is timed."""
    where = device_of(device)
    sizes = [1024, 2048, 4096, 8192, 16384] if where.type == "cuda" else [64, 128, 256, 512]
    cases = options.cases(where, lambda op: sizes[: 3 if quick else None], op=("policy_loss", "linear_policy_loss"))
    run_all("memory", options, cases, [], Settings(where, 0, 0.0, seed), output)


def run_all(
    command: str, options: CaseOptions, cases: Sequence[Case], others: Sequence[Provider], settings: Settings,
    output: Path | None,
) -> None:  # fmt: skip
    """Measure the cases and end the command; ``others`` beside the providers of the options."""
    providers = [*options.providers(settings.device), *others]
    check_writable(output)
    told = {name: getattr(settings, name) for name in ("repeats", "budget", "seed")}
    result = Result(command, environment(settings.device), told)
    measure(result, cases, providers, settings, named=bool(options.provider))
    finish(result, output)


@app.command("all")
def all_(
    output: Annotated[Path, option("output", "Folder for result.json, report.md and pictures.")],
    budget: Annotated[float, option("budget", "Seconds after which nothing more is begun.")] = 480.0,
    quick: Annotated[bool, option("quick", "The short plan.")] = False,
    device: DeviceName = "auto",
    seed: Seed = 0,
) -> None:
    """Measure a fixed plan (bench/plan.py), the most important first, and write a report with pictures.

    The report is written anew after each case, pictures at the end: Ctrl-C and a used budget leave everything that was
    measured. On a GPU times are the device's (replays of CUDA graphs) and the step's. The exit status is 1 if a
    provider was wrong or failed, or if hpo_fused misses a limit of its own.
    """
    where, deadline = device_of(device), time.monotonic() + budget
    check_writable(output / "result.json")
    result = Result("all", environment(where), {"budget": budget, "quick": quick, "seed": seed})
    todo = [(part, case) for part in plan.PLANS[where.type, quick] for case in part.cases()]
    names = labels(case for _, case in todo)
    for part, case in todo:
        if result.interrupted:
            break
        if time.monotonic() > deadline:
            result.notes.append(f"{names[case]}: not begun, as the budget of {budget:g} s was used")
            continue
        settings = Settings(
            where, 100 if part.timed else 0, plan.SECONDS_PER_CASE[where.type] / (3 if part.who == "ours" else 1), seed,
            device_time=where.type == "cuda",
        )  # fmt: skip
        measure(result, [case], [known.create(name) for name in part.providers(where)], settings)
        write_report(result, output, draw=False)
    if time.monotonic() > deadline and not (quick or result.interrupted):
        result.notes.append(f"machine code: not begun, as the budget of {budget:g} s was used")
    elif not (quick or result.interrupted):
        try:
            compiled = run_report(plan.COMPILED_TARGETS)
            result.kernels, result.notes = compiled.as_dicts(), [*result.notes, *compiled.broken]
        except ReportFailed as error:
            result.notes.append(f"machine code: {error}")
        except KeyboardInterrupt:
            result.interrupted = True
    write_report(result, output)
    finish(result, output / "result.json")


def write_report(result: Result, folder: Path, *, draw: bool = True) -> list[str]:
    """Write result.json, report.md and, which takes a second, pictures; the names of the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    result.write(folder / "result.json")
    drawn = pictures.draw(result, folder) if draw else []
    (folder / "report.md").write_text(report.markdown(result, drawn), encoding="utf-8")
    return drawn


@app.command("report")
def report_(
    file: Annotated[Path, typer.Argument(help="A result of any command, written with --output.")],
    folder: Annotated[
        Path | None, option("output", "Write result.json, report.md and pictures to this folder.")
    ] = None,
) -> None:
    """Print a result as markdown, or write it with pictures."""
    with refusing():
        result = Result.read(file)
    if folder is None:
        typer.echo(report.markdown(result), nl=False)
    else:
        typer.echo(f"Wrote {', '.join(['result.json', 'report.md', *write_report(result, folder)])} to {folder}")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="The base.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="The new one.")],
    worse_than: Annotated[
        float | None, typer.Option(min=1.0, help="Exit with 1 where hpo_fused is worse by more than this factor.")
    ] = None,
) -> None:
    """Two results side by side, joined by case and provider.

    With `--worse-than` the exit status is 1 where hpo_fused's time or peak memory in B is more than that many times
    A's, or a row of it that was ok in A is not ok in B or missing there; it is 2 where no row of it is in both.
    """
    with refusing():
        results = Result.read(first), Result.read(second)
    found = comparison.pairs(*results)
    out = Console(highlight=False)
    comparison.table(found).print(out)
    for line in comparison.differences(*results):
        out.print(line, style="dim", markup=False)
    if not any(pair.first.ours for pair in found):
        out.print("No row of hpo_fused is in both.", style="red")
        raise typer.Exit(2)
    worse = comparison.worse(*results, worse_than) if worse_than is not None else []
    for line in worse:
        out.print(line, style="red", markup=False)
    if worse:
        raise typer.Exit(1)


@app.command("compile")
def compile_(
    target: Annotated[Names, repeated("target", f"Of {', '.join(TARGETS)} (all)")] = None,
    only: Annotated[str, option("only", "Only calls whose name contains this, on each target.")] = "",
    every: Annotated[bool, option("every", "Every call on each target, not the core set.")] = False,
    check: Annotated[bool, option("check", "Exit with 1 if a limit is broken.")] = False,
    output: Output = None,
) -> None:
    """Compile the kernels that public calls launch, without a GPU: registers, spills, accesses, instructions.

    The limits: nothing spills in a main loop, and no more than 32 bytes beside; main loops access memory 16 bytes at a
    time; a main loop takes at most 1.15 special-function operations per element, and both sweeps together 14
    instructions (19 with the entropy, 22 on AMD), softcap apart. A kernel that does not compile breaks them, too; the
    exit status is 2 where none does. A target that this Triton can compile nothing for is told and left out.
    """
    check_writable(output)
    out = Console(highlight=False)
    try:
        found = run_report(list(dict.fromkeys(target or TARGETS)), only, every or bool(target))
    except ReportFailed as error:
        typer.echo(f"hpo-fused-bench compile: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    if (view := kernel_table(found.as_dicts())) is not None:
        view.print(out)
        call_table(found.public).print(out)
    out.print()
    for line in found.unavailable:
        out.print(line, style="yellow", markup=False, soft_wrap=True)
    for line in found.broken:
        out.print(line, style="red", markup=False, soft_wrap=True)
    said = f"{len(found.broken)} limits broken" if found.broken else "all limits hold"
    out.print(f"{len(found.kernels)} kernels compiled, {said}.", style="bold")
    if output is not None:
        Result("compile", environment(torch.device("cpu")), kernels=found.as_dicts(), notes=found.broken).write(output)
    if not found.kernels or (check and found.broken):
        raise typer.Exit(1 if found.kernels else 2)


@app.command()
def providers(device: DeviceName = "auto") -> None:
    """List the providers, with the version that would run here or the reason why none would.

    `--provider module:Class` takes classes outside this package, too: see docs/benchmark.md.
    """
    where, out = device_of(device), Console(highlight=False)
    view = RichTable.grid("", "", padding=(0, 2, 1, 0))
    for name in known.PROVIDERS:
        one = known.create(name)
        try:
            usable = one.available(where)
        except Unavailable as reason:
            usable = f"no: {reason}"
        lines = [usable, one.summary, f"operations: {', '.join(one.operations())}"]
        lines += [f"leaves out: {one.leaves_out}"] if one.leaves_out else []
        view.add_row(name + " *" * (name in known.defaults(where)), "\n".join(lines))
    out.print(view, markup=False)
    out.print("* measured by default, on the operations that it has.", style="dim")


@app.command()
def shapes() -> None:
    """List the named shapes."""
    view = RichTable("shape", "vocabulary", "hidden", "softcap", "why", box=None, pad_edge=False)
    for shape in SHAPES.values():
        softcap = "–" if shape.softcap is None else f"{shape.softcap:g}"
        view.add_row(shape.name, str(shape.vocabulary), str(shape.hidden), softcap, shape.why)
    out = Console(highlight=False)
    out.print(view, markup=False)
    out.print(f"{CUSTOM}: any other", markup=False)


@app.command("wire")
def wire_(
    shape: Annotated[str, option("shape", "Named shape or custom.")] = "qwen3-8b",
    tokens: Annotated[int, typer.Option(min=1, help="Rows of a call.")] = 16384,
    markdown: Annotated[bool, option("markdown", "As docs/distributed.md has it.")] = False,
) -> None:
    """Bytes that each form sends when its work is split over ranks, and their time on 8 to 4,096 GPUs: computed."""
    with refusing():
        views = wire.tables(parse_shape(shape), tokens)
    if markdown:
        typer.echo("\n\n".join(f"#{view.markdown()}" for view in views))
        return
    for view in views:
        view.print(Console(highlight=False))


@app.command()
def env(device: DeviceName = "auto") -> None:
    """Print the part of a result that describes this machine."""
    for key, value in environment(device_of(device)).items():
        typer.echo(f"{key}: {'–' if value is None else value}")
