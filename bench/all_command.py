"""``hpo-fused-bench all``: the whole evidence for one machine, in one command, within a budget."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
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
from .limits import meets
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
clock = time.monotonic


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


def _draw(evidence: Evidence, folder: Path) -> Iterator[str]:
    """Draw each picture and yield its name: those of logits, and one for each head. What fails is told, not raised."""
    jobs: list[tuple[str, Callable[[Path], None]]] = []
    if evidence.logits is not None:
        jobs += [(kind, partial(draw_logits, evidence.logits, pictures=[kind])) for kind in PICTURES]
    jobs += [(part_name(part), drawing_of(part)) for part in evidence.linear]
    for name, draw in jobs:
        picture = folder / f"{name}{PICTURE}"
        try:
            draw(picture)
        except PlotUnavailable as error:
            if "matplotlib" in str(error):
                evidence.dropped.append(f"pictures: {error}")
                break
        except Exception as error:  # results are worth more than a picture of them
            evidence.dropped.append(f"picture {picture.name}: {type(error).__name__}: {error}")
            picture.unlink(missing_ok=True)
        except KeyboardInterrupt:
            picture.unlink(missing_ok=True)
            raise
        else:
            yield picture.name


def _replace(path: Path, text: str) -> None:
    """Write a file that is never there by half, whenever Ctrl-C comes."""
    new = path.with_name(f"{path.name}.new")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _earlier_pictures(folder: Path) -> list[Path]:
    """Those that the result in this folder, of an earlier run, says it wrote there."""
    try:
        named = json.loads((folder / RESULT).read_text(encoding="utf-8"))["settings"][all_report.PICTURES]
        return [folder / name for name in named if Path(name).name == name and name.endswith(PICTURE)]
    except (OSError, ValueError, KeyError, TypeError):  # none, of another command, or edited
        return []


def _write(evidence: Evidence, folder: Path, elapsed: Callable[[], float]) -> None:
    """Results and report at once, and once more when their pictures are drawn."""

    def write() -> None:
        evidence.settings["seconds"] = elapsed()
        _replace(folder / RESULT, evidence.to_json())
        _replace(folder / REPORT, all_report.markdown(evidence))

    pictures: list[str] = []
    evidence.settings[all_report.PICTURES] = pictures
    old = _earlier_pictures(folder)
    write()
    for path in old:
        path.unlink(missing_ok=True)
    try:
        for name in _draw(evidence, folder):
            pictures.append(name)
    except KeyboardInterrupt:
        evidence.work_on()
        evidence.interrupt()
        evidence.dropped.append(f"pictures: interrupted; `hpo-fused-bench plot {RESULT}` draws them")
    write()


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
    complaint = _complaint(evidence) if check else ""
    if complaint:
        out.print(f"--check: {complaint}.", style="red", markup=False)
    pictures = len(evidence.settings[all_report.PICTURES])
    seconds = evidence.settings["seconds"]
    out.print(f"Wrote {folder / REPORT}, {RESULT} and {pictures} pictures after {seconds:.0f} s.", soft_wrap=True)
    summary = all_report.summary(evidence)
    if summary.rows:
        for line in all_report.summary_notes(evidence):
            out.print(line, style="dim", markup=False)
        out.print()
        out.print(summary.table())
    if evidence.interrupted:
        raise typer.Exit(INTERRUPTED)
    if mistakes or complaint or (evidence.tests and evidence.tests.failed):
        raise typer.Exit(1)


def _complaint(evidence: Evidence) -> str:
    """Why --check fails, or "": a limit that is missed, one that was not measured, or machine code beyond its own."""
    broken = evidence.kernels["broken"] if evidence.kernels is not None else []
    said = [meets(all_report.all_limits(evidence)), f"machine code: {len(broken)} limits broken" if broken else ""]
    return "; ".join(filter(None, said))


def _command_line(
    output: Path, budget: float, device: str, shape: Sequence[str], tokens: int | None, provider: Sequence[str],
    seed: int, *, tests: bool, kernels: bool, check: bool,
) -> str:  # fmt: skip
    """What repeats this run."""
    words = ["hpo-fused-bench", "all", f"--budget={budget:g}", f"--output={output.name}", f"--device={device}"]
    words += [f"--shape={name}" for name in shape] + ([f"--tokens={tokens}"] if tokens else [])
    words += [f"--provider={name}" for name in provider] + ([f"--seed={seed}"] if seed else [])
    words += [*([] if tests else ["--no-tests"]), *([] if kernels else ["--no-kernels"])]
    return shlex.join([*words, *(["--check"] if check else [])])


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
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 if a limit is missed or not measured.")] = False,
) -> None:
    """The whole evidence for this machine: tests, accuracy, speed, memory, machine code; a report with pictures.

    Everything takes `--budget` seconds. Where that is not enough there are fewer rounds first, then less is measured,
    and the report says what was left out. The first shape and the first head are measured whatever the budget. Ctrl-C
    keeps what is finished. The exit status is 1 if a result was wrong or a test failed.
    """
    begun = clock()
    where = device_of(device)
    choice = _choice(where, shape, provider, tokens, tests=tests, kernels=kernels)
    check_writable(output / RESULT)
    evidence = new_evidence(
        "all", where, budget=budget, tokens=choice.tokens, head_tokens=choice.head_tokens, seed=seed
    )
    evidence.settings[all_report.KERNELS_ASKED] = kernels
    evidence.settings[all_report.COMMAND_LINE] = _command_line(
        output, budget, device, shape, tokens, provider, seed, tests=tests, kernels=kernels, check=check
    )
    evidence.dropped += choice.who.absent
    plan = Budget(budget, min(RESERVE_SHARE * budget, RESERVE_MOST), clock=clock, start=begun)
    try:
        with Display(Console(stderr=True), 1) as display:
            work = Work(choice, where, seed, evidence, display, budget)
            units = work.units()
            display.cases = len(units)
            plan.run(units)
    except KeyboardInterrupt:
        if plan.at_work is None:  # between two of them
            evidence.work_on()
        else:
            evidence.dropped.append(f"{plan.at_work.name}: interrupted")
        evidence.interrupt()
        evidence.dropped += [f"{unit.name}: not reached before the interruption" for unit, _ in plan.left_out]
    else:
        evidence.dropped += plan.notes()
    finally:
        if evidence.tests is None:
            reached = "not reached before the interruption" if evidence.interrupted else "left out"
            evidence.tests = Tests(note=reached if tests else "not asked for")
        _write(evidence, output, lambda: clock() - begun)
    _finish(evidence, output, check)
