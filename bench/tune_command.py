"""``hpo-fused-bench tune``: measure launch parameters on this GPU and store the best for later launches."""

from __future__ import annotations

import importlib.util
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from .arguments import INTERRUPTED, device_of, one_of
from .cases import CUSTOM, DTYPES, SHAPES, parse_shape
from .display import Display
from .measure import clock_for

ALL_SHAPES, BFLOAT16 = list(SHAPES), ["bf16"]


def _no_gpu(device: str) -> str:
    """Why nothing can be measured here; "" where it can."""
    if importlib.util.find_spec("triton") is None:
        return "launch parameters are Triton's, and Triton is not installed: pip install 'hpo-fused[triton]' (Linux)"
    if device == "cpu" or not torch.cuda.is_available():
        seen = "was asked for a CPU" if device == "cpu" else "PyTorch sees none here"
        return f"launch parameters are measured on a GPU, and {seen}. Without one the shipped table holds"
    from hpo_fused.kernels import interpreting

    if interpreting():
        return "TRITON_INTERPRET is set: the kernels would run in Triton's interpreter, which has no launch parameters"
    return ""


def tune(
    shape: Annotated[list[str], typer.Option(help=f"Named shape (see `shapes`) or {CUSTOM}; repeatable.")] = ALL_SHAPES,
    dtype: Annotated[list[str], typer.Option(help=f"Of the logits: {', '.join(DTYPES)}; repeatable.")] = BFLOAT16,
    tokens: Annotated[int, typer.Option(min=1, help="Rows of logits.")] = 4096,
    budget: Annotated[
        float, typer.Option(min=0.0, help="Seconds of timing for each kernel, three rounds at least.")
    ] = 20.0,
    device: Annotated[str, typer.Option(help="cuda or cuda:N.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the table, store nothing.")] = False,
) -> None:
    """Measure launch parameters on this GPU, and store what beats the shipped table.

    The file goes to the user's cache directory (HPO_FUSED_CACHE_DIR, else XDG_CACHE_HOME/hpo_fused, else
    ~/.cache/hpo_fused) and holds for this GPU model, this version of hpo_fused and this version of Triton; every later
    process reads it at its first launch. Nothing is ever measured in a training step. Exit status 2: no GPU.
    """
    from hpo_fused.backend import kernels

    dtypes = [one_of("dtype", name, DTYPES) for name in dict.fromkeys(dtype)]
    try:
        shapes = [parse_shape(name) for name in dict.fromkeys(shape)]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if reason := _no_gpu(device):
        typer.echo(f"hpo-fused-bench tune: {reason}", err=True)
        raise typer.Exit(2)
    from . import tune as tuning

    assert kernels is not None
    where = device_of(device)
    machine, gpu = kernels.launch.machine(where.index), torch.cuda.get_device_name(where)
    work, choices, interrupted = list(tuning.jobs(shapes, dtypes)), [], False
    try:
        with Display(Console(stderr=True), len(work)) as display:
            for job in work:
                display.stage(f"{job.name}: compiling and timing", timing=True)
                options = tuning.candidates(machine, job.launches)
                choices.append(tuning.choose(job, options, tuning.runner(job, tokens, where), clock_for(where), budget))
                display.advance(1)
    except KeyboardInterrupt:
        interrupted = True
    out = Console(highlight=False)
    view = Table("launches", "V", "default", "ms", "best", "ms", "ratio", "tried", "failed", box=None, pad_edge=False)
    for one in choices:
        view.add_row(
            one.job.name, str(one.job.launches.V),
            "×".join(map(str, one.default)), f"{one.seconds[one.default] * 1e3:.3f}",
            "×".join(map(str, one.best)), f"{one.seconds[one.best] * 1e3:.3f}",
            f"{one.ratio:.3f}", str(len(one.seconds)), str(len(one.failed)),
        )  # fmt: skip
    out.print(
        f"{gpu} ({machine.architecture}), {tokens} tokens; threads × loads of a thread × rows in flight", style="dim"
    )
    out.print(view)
    if not dry_run and choices:
        path = tuning.store(gpu, {one.job.launches: one.best for one in choices})
        kernels.launch.forget_parameters()
        out.print(f"Wrote {path}", soft_wrap=True)
    if interrupted:
        raise typer.Exit(INTERRUPTED)
