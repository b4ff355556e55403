"""``hpo-fused-bench all``: the whole evidence for one machine, in one command, within a budget."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from . import all_report, report
from .all_units import TOKENS, Choice, Work
from .arguments import INTERRUPTED, check_writable, device_of
from .budget import Budget
from .cases import CUSTOM, Shape, parse_shape
from .display import Display
from .evidence import Evidence, Tests
from .linear.cases import CUSTOM as CUSTOM_HEAD
from .linear.cases import HeadShape, parse_head
from .matrix import Axes, Contestants, new_evidence
from .plot import PICTURES
from .plot import draw_figure as draw_logits
from .plot_command import drawing_of, part_name
from .plot_style import PlotUnavailable
from .show import wrong

RESULT, REPORT, PICTURE = "result.json", "report.md", ".svg"
BUDGET = 480.0
# Of the budget, and seconds at most, for pictures and report.
RESERVE_SHARE, RESERVE_MOST = 0.05, 12.0


def _known(names: Sequence[str], kind: str) -> list[Shape] | list[HeadShape] | None:
    """Those of ``names`` that are shapes of logits, or heads; None, for the defaults, where none is named."""
    if not names:
        return None
    parse = parse_shape if kind == "logits" else parse_head
    found = []
    for name in dict.fromkeys(names):
        try:
            found.append(parse(name))
        except ValueError:
            continue
    return found  # type: ignore[return-value]


def _choice(
    device: torch.device, shapes: Sequence[str], providers: Sequence[str], tokens: int | None, *, tests: bool,
    kernels: bool,
) -> Choice:  # fmt: skip
    try:
        operations = Axes.operations_for(shapes, ["logits", "linear"])
        who = Contestants.of(tuple(dict.fromkeys(providers)), operations, device.type)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    of_logits = _known(shapes, "logits") if "logits" in operations else []
    heads = _known(shapes, "linear") if "linear" in operations else []
    return Choice.of(device, who, of_logits, heads, tokens, tests=tests, kernels=kernels)  # type: ignore[arg-type]


def _draw(evidence: Evidence, folder: Path) -> list[str]:
    """The names of the pictures written: each of logits, and one for each head."""
    jobs: list[tuple[str, Callable[[Path], None]]] = []
    if evidence.logits is not None:
        jobs += [(kind, partial(draw_logits, evidence.logits, pictures=[kind])) for kind in PICTURES]
    jobs += [(part_name(part), drawing_of(part)) for part in evidence.linear]
    written = []
    for name, draw in jobs:
        try:
            draw(folder / f"{name}{PICTURE}")
        except PlotUnavailable as error:
            if "matplotlib" in str(error):
                evidence.dropped.append(f"pictures: {error}")
                break
        else:
            written.append(f"{name}{PICTURE}")
    return written


def _write(evidence: Evidence, folder: Path) -> None:
    evidence.settings[all_report.PICTURES] = _draw(evidence, folder)
    evidence.write(folder / RESULT)
    (folder / REPORT).write_text(all_report.markdown(evidence), encoding="utf-8")


def _finish(evidence: Evidence, folder: Path, check: bool) -> None:
    out = Console(highlight=False)
    out.print(report.environment_line(evidence), style="dim")
    for line in (*evidence.dropped, *filter(None, [report.busy_warning(evidence)])):
        out.print(line, style="yellow", markup=False)
    mistakes = list(wrong(evidence))
    for line in mistakes:
        out.print(line, style="red", markup=False)
    if evidence.interrupted:
        out.print("Interrupted: what was finished is below and in the files.", style="yellow")
    for line in all_report.verdict(evidence):
        out.print(line, markup=False)
    pictures = len(evidence.settings[all_report.PICTURES])
    seconds = evidence.settings["seconds"]
    out.print(f"Wrote {folder / REPORT}, {RESULT} and {pictures} pictures after {seconds:.0f} s.", soft_wrap=True)
    for line in all_report.summary_notes():
        out.print(line, style="dim", markup=False)
    out.print()
    out.print(all_report.summary(evidence).table())
    if evidence.interrupted:
        raise typer.Exit(INTERRUPTED)
    failed = bool(mistakes) or bool(evidence.tests and evidence.tests.failed)
    if failed or (check and not _meets_limits(evidence)):
        raise typer.Exit(1)


def _meets_limits(evidence: Evidence) -> bool:
    """Whether limits were measured, and all that were are met."""
    met = [limit.met for limit in all_report.all_limits(evidence) if limit.met is not None]
    broken = evidence.kernels is not None and bool(evidence.kernels["broken"])
    return bool(met) and all(met) and not broken


def all_(
    output: Annotated[Path, typer.Option(help=f"Folder for {REPORT}, {RESULT} and pictures.")],
    budget: Annotated[float, typer.Option(min=1.0, help="Seconds of everything.")] = BUDGET,
    shape: Annotated[
        list[str],
        typer.Option(help=f"Only this shape or head (see `shapes`), {CUSTOM} or {CUSTOM_HEAD}; repeatable."),
    ] = [],  # noqa: B006
    tokens: Annotated[
        int | None, typer.Option(min=1, help=f"Rows ({TOKENS['cuda']} on a GPU, {TOKENS['cpu']} on a CPU).")
    ] = None,
    provider: Annotated[list[str], typer.Option(help="Only these (see `providers`); repeatable.")] = [],  # noqa: B006
    tests: Annotated[bool, typer.Option("--tests/--no-tests", help="Run the equivalence suite.")] = True,
    kernels: Annotated[
        bool, typer.Option("--kernels/--no-kernels", help="Compile the kernels for GPUs and judge their machine code.")
    ] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto is a GPU if there is one.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the random inputs.")] = 0,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 if a limit is missed, too.")] = False,
) -> None:
    """The whole evidence for this machine: tests, accuracy, speed, memory, machine code; a report with pictures.

    Everything takes `--budget` seconds. Where that is not enough there are fewer rounds first, then less is measured,
    and the report says what was left out. The first shape and the first head are measured whatever the budget. Ctrl-C
    keeps what is finished. The exit status is 1 if a result was wrong or a test failed.
    """
    begun = time.monotonic()
    where = device_of(device)
    choice = _choice(where, shape, provider, tokens, tests=tests, kernels=kernels)
    check_writable(output / RESULT)
    words = ["hpo-fused-bench", "all", f"--budget={budget:g}", f"--output={output.name}", f"--device={where.type}"]
    words += [f"--shape={name}" for name in shape] + ([f"--tokens={tokens}"] if tokens else [])
    words += [f"--provider={name}" for name in provider] + ([f"--seed={seed}"] if seed else [])
    words += [*([] if tests else ["--no-tests"]), *([] if kernels else ["--no-kernels"])]
    evidence = new_evidence(
        "all", where, budget=budget, tokens=choice.tokens, head_tokens=choice.head_tokens, seed=seed
    )
    evidence.settings[all_report.COMMAND_LINE] = shlex.join(words)
    evidence.dropped += choice.who.absent
    plan = Budget(budget, min(RESERVE_SHARE * budget, RESERVE_MOST), start=begun)
    try:
        with Display(Console(stderr=True), 1) as display:
            work = Work(choice, where, seed, evidence, display, budget)
            units = work.units()
            display.cases = len(units)
            plan.run(units)
    except KeyboardInterrupt:
        evidence.interrupt()
        evidence.dropped += [f"{unit.name}: not reached before the interruption" for unit, _ in plan.left_out]
    else:
        evidence.dropped += plan.notes()
    finally:
        if evidence.tests is None:
            evidence.tests = Tests(note="left out" if tests else "not asked for")
        evidence.settings["seconds"] = time.monotonic() - begun
        _write(evidence, output)
    _finish(evidence, output, check)
